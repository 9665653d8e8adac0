// y = x W^T: by matrix registers where the CPU has them, else by vectors.
#pragma once

#include "by_matrix.h"
#include "by_vectors.h"
#include "few_rows.h"

namespace veneer {

// How often `multiply_tiles` prefetches in each block of a tile.
inline int row_groups(const Linear& w, int rows) {
    if constexpr (matrix::kPresent) return matrix_groups(rows);
    switch (w.kind) {
        case Kind::four_bit: return row_groups<FromCodes>(rows);
        case Kind::eight_bit: return row_groups<FromBytes>(rows);
        default: return row_groups<FromPairs>(rows);
    }
}

template <class Source>
inline void multiply_tiles(const Linear& w, int first, int last, const bf16* x, size_t x_stride,
                           int rows, float* y, size_t y_stride, Prefetcher& prefetcher) {
    if constexpr (matrix::kPresent)
        multiply_by_matrix<Source>(w, first, last, x, x_stride, rows, y, y_stride, prefetcher);
    else
        multiply_by_vectors<Source>(w, first, last, x, x_stride, rows, y, y_stride, prefetcher);
}

// Tiles first to last - 1 for any number of rows; between its blocks, prefetch what comes next.
inline void multiply_tiles(const Linear& w, int first, int last, const bf16* x, size_t x_stride,
                           int rows, float* y, size_t y_stride, Prefetcher& prefetcher) {
#ifdef VENEER_MATRIX
    const FlushDenormals flush;  // as the registers do: see few_rows.h
    if (multiply_few(w, first, last, x, x_stride, rows, y, y_stride, prefetcher)) return;
#endif
    switch (w.kind) {
        case Kind::four_bit:
            return multiply_tiles<FromCodes>(w, first, last, x, x_stride, rows, y, y_stride,
                                             prefetcher);
        case Kind::eight_bit:
            return multiply_tiles<FromBytes>(w, first, last, x, x_stride, rows, y, y_stride,
                                             prefetcher);
        case Kind::bfloat16:
            return multiply_tiles<FromPairs>(w, first, last, x, x_stride, rows, y, y_stride,
                                             prefetcher);
    }
}

}  // namespace veneer
