// y = x W^T, on matrix registers if the CPU has them, else on vectors. Inputs are bfloat16 or 8
// bits.
#pragma once

#include "by_int8.h"
#include "by_matrix.h"
#include "by_numbers.h"
#include "by_vectors.h"

namespace veneer {

// A GEMM's inputs.
struct Inputs {
    const bf16* x;
    size_t stride;
    Int8Rows int8;  // the same in 8 bits; if null, multiply by bfloat16
};

// How often `multiply_tiles` calls `prefetch_some` in each block of a tile.
inline int row_groups(const Linear& w, const Inputs& inputs, int rows) {
    if (inputs.int8.at != nullptr) return int8_row_groups(rows);
    if constexpr (matrix::kPresent) return matrix_groups(rows);
#ifdef VENEER_BY_NUMBERS
    return divide_up(rows, tiles::kNumberRows);
#endif
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

// Multiply any number of rows by tiles first to last - 1. In each block, prefetch memory for later
// phases.
inline void multiply_tiles(const Linear& w, int first, int last, const Inputs& inputs, int rows,
                           float* y, size_t y_stride, Prefetcher& prefetcher) {
#ifdef VENEER_MATRIX
    const FlushDenormals flush;  // as the registers do: see by_numbers.h
#endif
    if (inputs.int8.at != nullptr)
        return multiply_int8_tiles(w, first, last, inputs.int8, rows, y, y_stride, prefetcher);
    const bf16* x = inputs.x;
    const size_t x_stride = inputs.stride;
#if defined(VENEER_MATRIX) || defined(VENEER_BY_NUMBERS)
    if (multiply_few(w, first, last, x, x_stride, rows, y, y_stride, prefetcher)) return;
#endif
#ifdef VENEER_BY_NUMBERS
    return multiply_by_numbers(w, first, last, x, x_stride, rows, y, y_stride, prefetcher);
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
