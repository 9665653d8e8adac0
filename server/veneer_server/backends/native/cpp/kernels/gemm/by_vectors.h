// The GEMM on vectors: a few rows at a time, as many as the registers allow.
#pragma once

#include "by_registers.h"
#include "linear.h"

namespace veneer {

// Add a block's products with Rows rows to `totals` [row][32].
//
// A row's sums are added in the same order whatever rows share the GEMM, so its result is
// bit-identical whatever else is in the batch.
template <int Rows, class Source>
inline void add_block(const Source& source, bool first, const float* scales, const bf16* x,
                      size_t stride, float* totals) {
    constexpr int chains = Source::chains;
    Floats sums[chains][Rows][2];
    for (auto& chain : sums)
        for (auto& row : chain) row[0] = row[1] = zeros();
    for (int group = 0; group < 8; ++group) {
        if (first) source.prefetch_ahead(group);
        const bf16* here = x + group * 8;
#ifdef VENEER_BY_REGISTERS
        static_assert(chains == 1);
        add_group(source, group, here, stride, sums[0]);
#else
        Pairs low, high;
        auto multiply = [&](int q) {
            for (int r = 0; r < Rows; ++r) {
                Floats* row = sums[q % chains][r];
                const Pairs input = broadcast_pair_shared(here + r * stride + 2 * q);
                row[0] = dot(row[0], low, input);
                row[1] = dot(row[1], high, input);
            }
        };
        source.template pairs<0>(group, low, high), multiply(0);
        source.template pairs<1>(group, low, high), multiply(1);
        source.template pairs<2>(group, low, high), multiply(2);
        source.template pairs<3>(group, low, high), multiply(3);
#endif
    }
    const Floats low = scales != nullptr ? load(scales) : broadcast(1.0f);
    const Floats high = scales != nullptr ? load(scales + 16) : low;
    for (int r = 0; r < Rows; ++r) {
        Floats first = sums[0][r][0], second = sums[0][r][1];
        for (int c = 1; c < chains; ++c) {
            first = add(first, sums[c][r][0]);
            second = add(second, sums[c][r][1]);
        }
        float* total = totals + r * kTile;
        store(total, fma(first, low, load(total)));
        store(total + 16, fma(second, high, load(total + 16)));
    }
}

// The same for 1 to Rows rows, where the number is only known at run time.
template <int Rows, class Source>
inline void add_block(const Source& source, bool first, const float* scales, const bf16* x,
                      size_t stride, int rows, float* totals) {
    if constexpr (Rows > 0) {
        if (rows == Rows) return add_block<Rows>(source, first, scales, x, stride, totals);
        add_block<Rows - 1>(source, first, scales, x, stride, rows, totals);
    }
}

// The number of groups of about equal size in which rows are multiplied.
template <class Source>
inline int row_groups(int rows) {
    return (rows + Source::rows - 1) / Source::rows;
}

// Multiply up to kPanel rows by one tile.
template <class Source>
inline void multiply_tile(const Linear& w, int tile, const bf16* x, size_t x_stride, int rows,
                          float* y, size_t y_stride, Prefetcher& prefetcher) {
    alignas(64) float totals[kPanel * kTile];
    std::fill(totals, totals + size_t(rows) * kTile, 0.0f);
    const Table table(w.table);
    const int groups = row_groups<Source>(rows);
    const size_t bytes = block_bytes(w.kind);
    const uint8_t* block = w.tile(tile);
    for (int b = 0; b < w.blocks(); ++b, block += bytes) {
        prefetch_rows(w, tile, b, x, x_stride, rows, y, y_stride, prefetcher);
        const Source source(block, table);
        for (int g = 0; g < groups; ++g) {
            prefetcher.prefetch_some();
            const int begin = rows * g / groups, end = rows * (g + 1) / groups;
            add_block<Source::rows>(source, g == 0, w.scales(block),
                                    x + b * kBlock + begin * x_stride, x_stride, end - begin,
                                    totals + begin * kTile);
        }
    }
    prefetcher.inputs = false;
    store_tile(w, tile, totals, rows, y, y_stride);
}

template <class Source>
inline void multiply_by_vectors(const Linear& w, int first, int last, const bf16* x,
                                size_t x_stride, int rows, float* y, size_t y_stride,
                                Prefetcher& prefetcher) {
    for (int begin = 0; begin < rows; begin += kPanel) {
        const int count = std::min(kPanel, rows - begin);
        for (int tile = first; tile < last; ++tile)
            multiply_tile<Source>(w, tile, x + begin * x_stride, x_stride, count,
                                  y + begin * y_stride, y_stride, prefetcher);
    }
}

}  // namespace veneer
