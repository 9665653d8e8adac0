// The GEMM on matrix registers: 16 rows and 32 outputs at a time.
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
constexpr int kMatrixPanel = 8 * kMatrixRows;

// A block's weights: pairs of inputs, each for 16 outputs, for both halves of a tile.
struct DecodedBlock {
    alignas(64) bf16 pairs[2][kBlockPairs][2 * kLanes];

    template <class Source>
    void decode(const Source& source) {
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
        source.template pairs_by_bytes<Q>(group, low, high);
        store_pairs(pairs[0][4 * group + Q], low);
        store_pairs(pairs[1][4 * group + Q], high);
    }
};

// The groups of up to 16 rows, in all panels.
inline int matrix_groups(int rows) {
    const int panels = divide_up(rows, kMatrixPanel);
    int groups = 0;
    for (int p = 0; p < panels; ++p)
        groups += divide_up(rows * (p + 1) / panels - rows * p / panels, kMatrixRows);
    return groups;
}

// totals [row][32] += sums [row][32], times the scales of the outputs.
inline void add_scaled(const float* sums, int rows, const float* scales, float* totals) {
    const Floats low = scales != nullptr ? load(scales) : broadcast(1.0f);
    const Floats high = scales != nullptr ? load(scales + kLanes) : low;
    for (int r = 0; r < rows; ++r, sums += kTile, totals += kTile) {
        store(totals, fma(load(sums), low, load(totals)));
        store(totals + kLanes, fma(load(sums + kLanes), high, load(totals + kLanes)));
    }
}

// A panel's rows in groups of up to 16, and their totals. The sums of a group are added to them
// while the next group is multiplied.
class RowGroups {
  public:
    explicit RowGroups(int rows)
        : rows_(rows),
          groups_(divide_up(rows, kMatrixRows)),
          // All groups have the same number of rows; the last may begin within the one before.
          size_(divide_up(rows, groups_)),
          registers_(size_) {}

    const float* totals() const { return totals_; }
    void clear() { std::fill(totals_, totals_ + size_t(rows_) * kTile, 0.0f); }

    // totals += a block times its 64 inputs of each row.
    void multiply(const DecodedBlock& block, const float* scales, const bf16* x, size_t x_stride,
                  Prefetcher& prefetcher) {
        for (int g = 0; g < groups_; ++g) {
            const int row = std::min(g * size_, rows_ - size_), skip = g * size_ - row;
            registers_.zero();
            if (g == 0)
                registers_.add(x, x_stride, block.pairs[0][0], block.pairs[1][0]);
            else
                registers_.add(x + row * x_stride, x_stride);
            prefetcher.prefetch_some();
            finish();
            registers_.store(sums_);
            left_ = {sums_ + skip * kTile, size_ - skip, scales, totals_ + g * size_ * kTile};
        }
    }

    // Add the last group's sums too.
    void finish() {
        add_scaled(left_.sums, left_.rows, left_.scales, left_.totals);
        left_.rows = 0;
    }

  private:
    struct Left {
        const float* sums = nullptr;
        int rows = 0;
        const float* scales = nullptr;
        float* totals = nullptr;
    };

    alignas(64) float totals_[kMatrixPanel * kTile];
    alignas(64) float sums_[kMatrixRows * kTile];
    Left left_;
    const int rows_, groups_, size_;
    SquareRegisters registers_;
};

// Tiles first to last - 1 for a panel's rows. The block after the one that is multiplied is decoded
// meanwhile.
template <class Source>
inline void multiply_panel(const Linear& w, int first, int last, const bf16* x, size_t x_stride,
                           int rows, float* y, size_t y_stride, Prefetcher& prefetcher) {
    DecodedBlock decoded[2];
    const Table table(w.table);
    RowGroups groups(rows);
    decoded[0].decode(Source(w.tile(first), table));
    int turn = 0;
    for (int tile = first; tile < last; ++tile) {
        groups.clear();
        const uint8_t* block = w.tile(tile);
        for (int b = 0; b < w.blocks(); ++b, block += block_bytes(w.kind), turn ^= 1) {
            prefetch_rows(w, tile, b, x, x_stride, rows, y, y_stride, prefetcher);
            if (b + 1 < w.blocks())
                decoded[turn ^ 1].decode(Source(block + block_bytes(w.kind), table));
            else if (tile + 1 < last)
                decoded[turn ^ 1].decode(Source(w.tile(tile + 1), table));
            groups.multiply(decoded[turn], w.scales(block), x + b * kBlock, x_stride, prefetcher);
        }
        groups.finish();
        prefetcher.inputs = false;
        store_tile(w, tile, groups.totals(), rows, y, y_stride);
    }
}

template <class Source>
inline void multiply_by_matrix(const Linear& w, int first, int last, const bf16* x, size_t x_stride,
                               int rows, float* y, size_t y_stride, Prefetcher& prefetcher) {
    const int panels = divide_up(rows, kMatrixPanel);
    for (int p = 0; p < panels; ++p) {
        const int begin = rows * p / panels, count = rows * (p + 1) / panels - begin;
        multiply_panel<Source>(w, first, last, x + begin * x_stride, x_stride, count,
                               y + begin * y_stride, y_stride, prefetcher);
    }
}

}  // namespace veneer
