// The GEMM on matrix registers: 16 rows and 32 outputs at a time.
//
// A block's weights are decoded to pairs of bfloat16 once for all rows of a panel; the next block
// is decoded while this one is multiplied. The registers sum up a block's products, and the sum is
// multiplied by the scale in float, as on vectors. A row's result must not depend on how many other
// rows are in the batch, so by_numbers.h computes the same sums on vectors.
#pragma once

#include "../square.h"
#include "linear.h"

namespace veneer {

// Most rows that are multiplied as one panel, so that its totals and inputs stay in the L1 cache.
constexpr int kMatrixPanel = 8 * kMatrixRows;

// Decodes the blocks of tiles first to last - 1, one after the other, by quarters. Quarter q has 16
// outputs from 16 * (q % 2) on, and 32 inputs from 32 * (q / 2) on: as many as a register holds.
//
// A quarter is decoded two quarters before it is loaded, since registers are only loaded from the
// cache, and the decoded numbers must have got there by then. One quarter before was slower, three
// were no faster.
template <class Source>
class Quarters {
  public:
    Quarters(const Linear& w, int first, int last)
        : w_(w), table_(w.table), tile_(first), last_(last), block_(w.tile(first)) {
        decode<0>(), decode<1>();
    }

    // Return quarter Q of the next block: pairs of inputs, each for 16 outputs.
    template <int Q>
    const bf16* next() {
        if constexpr (Q == 2) go_on();
        decode<(Q + 2) % 4>();
        return pairs_[Q][0];
    }

  private:
    void go_on() {
        block_ += block_bytes(w_.kind);
        if (++number_ < w_.blocks()) return;
        number_ = 0;
        if (++tile_ < last_)
            block_ = w_.tile(tile_);
        else
            ended_ = true;
    }

    template <int Q>
    void decode() {
        if (ended_) return;
        const Source source(block_, table_);
        source.prefetch_ahead(2 * Q), source.prefetch_ahead(2 * Q + 1);
        for (int i = 0; i < 4; ++i) {
            const int group = Q / 2 * 4 + i;
            store_pairs(pairs_[Q][4 * i], source.template half<0>(Q % 2, group));
            store_pairs(pairs_[Q][4 * i + 1], source.template half<1>(Q % 2, group));
            store_pairs(pairs_[Q][4 * i + 2], source.template half<2>(Q % 2, group));
            store_pairs(pairs_[Q][4 * i + 3], source.template half<3>(Q % 2, group));
        }
    }

    alignas(64) bf16 pairs_[4][kBlockPairs / 2][2 * kLanes];
    const Linear& w_;
    const Table table_;
    int tile_, last_, number_ = 0;
    const uint8_t* block_;
    bool ended_ = false;
};

// The number of groups of up to 16 rows in all panels.
inline int matrix_groups(int rows) {
    const int panels = divide_up(rows, kMatrixPanel);
    int groups = 0;
    for (int p = 0; p < panels; ++p)
        groups += divide_up(rows * (p + 1) / panels - rows * p / panels, kMatrixRows);
    return groups;
}

// totals [row][32] += sums [row][32] times the outputs' scales.
inline void add_scaled(const float* sums, int rows, const float* scales, float* totals) {
    const Floats low = scales != nullptr ? load(scales) : broadcast(1.0f);
    const Floats high = scales != nullptr ? load(scales + kLanes) : low;
    for (int r = 0; r < rows; ++r, sums += kTile, totals += kTile) {
        store(totals, fma(load(sums), low, load(totals)));
        store(totals + kLanes, fma(load(sums + kLanes), high, load(totals + kLanes)));
    }
}

// A panel's rows in groups of up to 16, and their totals. A group's sums are added to the totals
// while the next group is multiplied.
class RowGroups {
  public:
    explicit RowGroups(int rows)
        : rows_(rows),
          groups_(divide_up(rows, kMatrixRows)),
          // All groups have the same number of rows; the last may overlap the one before.
          size_(divide_up(rows, groups_)),
          registers_(size_) {}

    const float* totals() const { return totals_; }
    void clear() { std::fill(totals_, totals_ + size_t(rows_) * kTile, 0.0f); }

    // totals += the next block times each row's 64 inputs.
    template <class Source>
    void multiply(Quarters<Source>& quarters, const float* scales, const bf16* x, size_t x_stride,
                  Prefetcher& prefetcher) {
        for (int g = 0; g < groups_; ++g) {
            const int row = std::min(g * size_, rows_ - size_), skip = g * size_ - row;
            registers_.zero();
            if (g == 0)
                registers_.add_quarters(x, x_stride, quarters);
            else
                registers_.add(x + row * x_stride, x_stride);
            prefetcher.prefetch_some();
            finish();
            registers_.store(sums_);
            left_ = {sums_ + skip * kTile, size_ - skip, scales, totals_ + g * size_ * kTile};
        }
    }

    // Add the last group's sums to the totals.
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

// Multiply a panel's rows by tiles first to last - 1.
template <class Source>
inline void multiply_panel(const Linear& w, int first, int last, const bf16* x, size_t x_stride,
                           int rows, float* y, size_t y_stride, Prefetcher& prefetcher) {
    RowGroups groups(rows);
    Quarters<Source> quarters(w, first, last);
    for (int tile = first; tile < last; ++tile) {
        groups.clear();
        const uint8_t* block = w.tile(tile);
        for (int b = 0; b < w.blocks(); ++b, block += block_bytes(w.kind)) {
            prefetch_rows(w, tile, b, x, x_stride, rows, y, y_stride, prefetcher);
            groups.multiply(quarters, w.scales(block), x + b * kBlock, x_stride, prefetcher);
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
