// The GEMM on matrix registers: 32 rows and 32 outputs at a time.
//
// A block's weights are decoded to pairs of bfloat16 once for all rows of a panel. The registers
// sum up a block's products; the scale multiplies the sum in float, as on vectors. Every row count
// is multiplied like this, even a single row: vectors sum in another order, and a row's result must
// not depend on how many others are in the batch.
#pragma once

#include "../square.h"
#include "linear.h"

namespace veneer {

// Rows at a time, so that a panel's totals and inputs stay in the L1 cache.
constexpr int kMatrixPanel = 4 * kMatrixRows;

// A block's weights: pairs of inputs, each for 16 outputs, for both halves of a tile.
struct DecodedBlock {
    alignas(64) bf16 pairs[2][kBlockPairs][2 * kLanes];

    template <class Source>
    explicit DecodedBlock(const Source& source) {
        for (int group = 0; group < 8; ++group) {
            source.prefetch_ahead(group);
            decode<0>(source, group), decode<1>(source, group);
            decode<2>(source, group), decode<3>(source, group);
        }
    }

  private:
    template <int Q, class Source>
    void decode(const Source& source, int group) {
        Pairs low, high;
        source.template pairs<Q>(group, low, high);
        store_pairs(pairs[0][4 * group + Q], low);
        store_pairs(pairs[1][4 * group + Q], high);
    }
};

// The groups of up to 32 rows, in all panels.
inline int matrix_groups(int rows) {
    const int panels = divide_up(rows, kMatrixPanel);
    int groups = 0;
    for (int p = 0; p < panels; ++p)
        groups += divide_up(rows * (p + 1) / panels - rows * p / panels, kMatrixRows);
    return groups;
}

// totals [row][32] += the sums of rows first to end - 1, times the scales.
inline void add_scaled(const float* sums, int first, int end, const float* scales, float* totals) {
    const Floats low = scales != nullptr ? load(scales) : broadcast(1.0f);
    const Floats high = scales != nullptr ? load(scales + kLanes) : low;
    for (int r = first; r < end; ++r) {
        float* total = totals + r * kTile;
        store(total, fma(load(sums + r * kTile), low, load(total)));
        store(total + kLanes, fma(load(sums + r * kTile + kLanes), high, load(total + kLanes)));
    }
}

template <class Source>
inline void multiply_by_matrix(const Linear& w, int first, int last, const bf16* x, size_t x_stride,
                               int rows, float* y, size_t y_stride, Prefetcher& prefetcher) {
    alignas(64) float totals[kMatrixPanel * kTile];
    alignas(64) float sums[kMatrixRows * kTile];
    const Table table(w.table);
    const int panels = divide_up(rows, kMatrixPanel);
    for (int p = 0; p < panels; ++p) {
        const int begin = rows * p / panels, count = rows * (p + 1) / panels - begin;
        const bf16* panel = x + begin * x_stride;
        float* to = y + begin * y_stride;
        // All groups have the same number of rows; the last may begin within the one before.
        const int groups = divide_up(count, kMatrixRows), size = divide_up(count, groups);
        const SquareRegisters registers(size);
        for (int tile = first; tile < last; ++tile) {
            std::fill(totals, totals + size_t(count) * kTile, 0.0f);
            const uint8_t* block = w.tile(tile);
            for (int b = 0; b < w.blocks(); ++b, block += block_bytes(w.kind)) {
                prefetch_rows(w, tile, b, panel, x_stride, count, to, y_stride, prefetcher);
                const DecodedBlock decoded{Source(block, table)};
                for (int g = 0; g < groups; ++g) {
                    prefetcher.prefetch_some();
                    const int row = std::min(g * size, count - size);
                    const bf16* inputs = panel + row * x_stride + b * kBlock;
                    registers.zero();
                    for (int pair = 0; pair < kBlockPairs; pair += matrix::kRows)
                        registers.add(inputs + 2 * pair, x_stride, decoded.pairs[0][pair],
                                      decoded.pairs[1][pair]);
                    registers.store(sums);
                    add_scaled(sums, g * size - row, size, w.scales(block), totals + row * kTile);
                }
            }
            prefetcher.inputs = false;
            store_tile(w, tile, totals, count, to, y_stride);
        }
    }
}

}  // namespace veneer
