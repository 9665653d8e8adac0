// The GEMM with inputs of 8 bits (int8_rows.h). Weights are converted to bytes too, and products
// are added up as integers over a block, which is exact in any order. Then the sum is multiplied by
// the scales of the weights and of the inputs, and added to the row's total in float.
//
// A 4-bit code's byte is its number as a multiple of `Linear::unit` (`Linear::bytes`). Results have
// the same bits with every instruction set, except for denormals, which are flushed if there are
// matrix registers. A row's results do not depend on the other rows.
#pragma once

#include <cassert>

#include "../square.h"
#include "by_matrix.h"
#include "int8_rows.h"
#include "linear.h"

namespace veneer {

// The weights of a group of eight inputs. First index: outputs 0 to 15 or 16 to 31 (or by turns of
// four outputs, see `in_order`). Second index: the inputs 0 4 1 5 or 2 6 3 7, four bytes per
// output. The sources below add `Offset` to every byte.
using GroupBytes = Int8s[2][2];

template <int Offset>
struct BytesOfCodes {
    static constexpr Kind kind = Kind::four_bit;
    const Int8Table table;
    explicit BytesOfCodes(const Linear& w) : table(w.bytes, Offset) {}

    void group(const uint8_t* block, int group, GroupBytes& to) const {
        for (int half = 0; half < 2; ++half) {
            const Codes codes = load_codes(block + half * 512 + group * 64);
            to[half][0] = look_up_bytes<0>(table, codes);
            to[half][1] = look_up_bytes<1>(table, codes);
        }
    }
    static void in_order(Floats&, Floats&) {}
};

template <int Offset>
struct BytesOfBytes {
    static constexpr Kind kind = Kind::eight_bit;
    explicit BytesOfBytes(const Linear&) {}

    void group(const uint8_t* block, int group, GroupBytes& to) const {
        const uint8_t* pairs = block + group * 4 * 2 * kTile;
        for (int i = 0; i < 2; ++i) {
            const Int8s first = load_int8s<Offset>(pairs + i * 2 * kTile);
            const Int8s third = load_int8s<Offset>(pairs + (i + 2) * 2 * kTile);
            interleave(first, third, to[0][i], to[1][i]);
        }
    }
    // Bytes are interleaved within 16, so the first vector has outputs 0-3, 8-11, 16-19 and 24-27.
    static void in_order(Floats& low, Floats& high) { quads_in_turn(low, high); }
};

// A row's totals of 32 outputs. `add` adds a block's sums, multiplied by the scales of the weights
// and of the inputs.
template <class Source>
struct Int8Totals {
    Floats low, high;

    void clear() { low = high = zeros(); }
    void add(Floats first, Floats second, const float* scales, float scale) {
        Source::in_order(first, second);
        const Floats all = broadcast(scale);
        low = fma(first, mul(load(scales), all), low);
        high = fma(second, mul(load(scales + kLanes), all), high);
    }
};

inline int32_t four_bytes(const int8_t* at) {
    if constexpr (kAtomicNumbers) return load_number(reinterpret_cast<const int32_t*>(at));
    int32_t four;
    std::memcpy(&four, at, sizeof four);
    return four;
}

// Call before block b of a tile is multiplied: prefetch a part of the tile's results, and the next
// block's inputs if no tile has read them yet.
inline void prefetch_int8(const Linear& w, int tile, int b, const Int8Rows& x, int rows, float* y,
                          size_t y_stride, const Prefetcher& prefetcher) {
    prefetch_results(w, tile, b, rows, y, y_stride);
    if (!prefetcher.inputs || b + 1 >= w.blocks()) return;
    for (int r = 0; r < rows; ++r) x.prefetch_block(r, b + 1);
}

// Add the products of block b with Rows rows to their totals.
template <int Rows, class Source>
inline void add_int8_block(const Source& source, const uint8_t* block, const float* scales,
                           const Int8Rows& x, int b, bool first, float unit,
                           Int8Totals<Source>* totals) {
    constexpr int chains = Rows == 1 ? 2 : 1;  // with 1, a row's products would wait for each other
    Int32s sums[Rows][2][chains];
    for (int r = 0; r < Rows; ++r) {
        const Int32s offset = int32s(-kInt8Offset * x.sum(r, b));
        for (auto& half : sums[r]) {
            half[0] = offset;
            if (chains == 2) half[chains - 1] = int32s(0);
        }
    }
#pragma GCC unroll 8
    for (int group = 0; group < 8; ++group) {
        if (first) prefetch_ahead<block_bytes(Source::kind)>(block, group);
        GroupBytes weights;
        source.group(block, group, weights);
        for (int r = 0; r < Rows; ++r) {
            const int8_t* numbers = x.numbers(r, b) + group * 8;
            for (int half = 0; half < 2; ++half)
                for (int i = 0; i < 2; ++i) {
                    Int32s& sum = sums[r][half][i % chains];
                    sum = dot(sum, weights[half][i], four_bytes(numbers + 4 * i));
                }
        }
    }
    for (int r = 0; r < Rows; ++r) {
        Int32s low = sums[r][0][0], high = sums[r][1][0];
        if (chains == 2) low = add(low, sums[r][0][1]), high = add(high, sums[r][1][1]);
        totals[r].add(to_floats(low), to_floats(high), scales, unit * x.scale(r, b));
    }
}

// Compute the totals [row][32] of Rows rows and a tile.
template <int Rows, class Source, class Before>
inline void multiply_int8_rows(const Linear& w, const Source& source, int tile, const Int8Rows& x,
                               bool first, const Before& before, float* totals) {
    Int8Totals<Source> all[Rows];
    for (auto& each : all) each.clear();
    const uint8_t* block = w.tile(tile);
    for (int b = 0; b < w.blocks(); ++b, block += block_bytes(Source::kind)) {
        before(b);
        add_int8_block<Rows>(source, block, w.scales(block), x, b, first, w.unit, all);
    }
    for (int r = 0; r < Rows; ++r) {
        store(totals + r * kTile, all[r].low);
        store(totals + r * kTile + kLanes, all[r].high);
    }
}

// The same for 1 to Rows rows, where the number is only known at run time.
template <int Rows, class Source, class Before>
inline void multiply_int8_rows(const Linear& w, const Source& source, int tile, const Int8Rows& x,
                               int rows, bool first, const Before& before, float* totals) {
    if constexpr (Rows > 0) {
        if (rows == Rows)
            return multiply_int8_rows<Rows>(w, source, tile, x, first, before, totals);
        multiply_int8_rows<Rows - 1>(w, source, tile, x, rows, first, before, totals);
    }
}

constexpr int kInt8Panel = 96;  // rows; see kPanel

template <class Source>
inline void int8_by_vectors(const Linear& w, int first, int last, const Int8Rows& x, int rows,
                            float* y, size_t y_stride, Prefetcher& prefetcher) {
    const Source source(w);
    alignas(64) float totals[kInt8Panel * kTile];
    const int groups = divide_up(rows, tiles::kInt8Rows);
    for (int tile = first; tile < last; ++tile) {
        for (int g = 0; g < groups; ++g) {
            const int begin = rows * g / groups, count = rows * (g + 1) / groups - begin;
            const auto before = [&](int b) {
                if (g == 0) prefetch_int8(w, tile, b, x, rows, y, y_stride, prefetcher);
                prefetcher.prefetch_some();
            };
            multiply_int8_rows<tiles::kInt8Rows>(w, source, tile, x.from(begin), count, g == 0,
                                                 before, totals + begin * kTile);
        }
        prefetcher.inputs = false;
        store_tile(w, tile, totals, rows, y, y_stride);
    }
}

#ifdef VENEER_MATRIX

// The GEMM on matrix registers. A register holds all 64 inputs of a block, for 16 rows or for 16
// outputs.
template <class Source>
class Int8Groups {
  public:
    Int8Groups(const Linear& w, int first, int last, const Int8Rows& x, int rows)
        : w_(w),
          source_(w),
          x_(x),
          rows_(rows),
          groups_(divide_up(rows, kMatrixRows)),
          // All groups have the same number of rows; the last may overlap the one before.
          size_(divide_up(rows, groups_)),
          tile_(first),
          last_(last),
          next_(w.tile(first)) {
        const matrix::Shape a{size_}, b{matrix::kRows};
        matrix::set_up({a, a, a, a, b, b, b, b});
        decode(0), decode(1);
        go_on();
    }

    // The totals, [row][32].
    const float* totals() {
        static_assert(sizeof totals_[0] == kTile * sizeof(float));
        return reinterpret_cast<const float*>(totals_);
    }
    void clear() {
        for (int r = 0; r < rows_; ++r) totals_[r].clear();
    }

    // totals += products of block b of a tile, which has these scales. Meanwhile the next block is
    // decoded.
    void multiply(int b, const float* scales, Prefetcher& prefetcher) {
        for (int g = 0; g < groups_; ++g) {
            const int row = std::min(g * size_, rows_ - size_), skip = g * size_ - row;
            matrix::zero<0>(), matrix::zero<1>();
            matrix::load<2>(x_.numbers(row, b), x_.stride);
            if (g == 0) {
                const auto& now = bytes_[turn_];
                turn_ ^= 1;
                matrix::load<4>(now[0], kLine), matrix::dot_int8<0, 2, 4>();
                decode(0);
                matrix::load<5>(now[1], kLine), matrix::dot_int8<1, 2, 5>();
                decode(1);
                go_on();
            } else {
                matrix::dot_int8<0, 2, 4>(), matrix::dot_int8<1, 2, 5>();
            }
            prefetcher.prefetch_some();
            finish();
            constexpr size_t line = 2 * kLanes * sizeof(int32_t);
            matrix::store<0>(sums_, line), matrix::store<1>(sums_ + kLanes, line);
            left_ = {sums_ + skip * kTile, g * size_, size_ - skip, b, scales};
        }
    }

    // Add the last group's sums to the totals.
    void finish() {
        for (int r = 0; r < left_.rows; ++r) {
            const int32_t* sums = left_.sums + r * kTile;
            totals_[left_.first + r].add(to_floats(load_int32s(sums)),
                                         to_floats(load_int32s(sums + kLanes)), left_.scales,
                                         w_.unit * x_.scale(left_.first + r, left_.block));
        }
        left_.rows = 0;
    }

  private:
    // Decode groups 4 * part to 4 * part + 3 of the next block.
    void decode(int part) {
        if (next_ == nullptr) return;
        for (int group = 4 * part; group < 4 * part + 4; ++group) {
            prefetch_ahead<block_bytes(Source::kind)>(next_, group);
            GroupBytes weights;
            source_.group(next_, group, weights);
            for (int half = 0; half < 2; ++half)
                for (int i = 0; i < 2; ++i)
                    store_int8s(bytes_[turn_][half][2 * group + i], weights[half][i]);
        }
    }
    void go_on() {
        if (next_ == nullptr) return;
        next_ += block_bytes(Source::kind);
        if (++number_ < w_.blocks()) return;
        number_ = 0;
        next_ = ++tile_ < last_ ? w_.tile(tile_) : nullptr;
    }

    struct Left {
        const int32_t* sums = nullptr;
        int first = 0, rows = 0, block = 0;
        const float* scales = nullptr;
    };

    alignas(64) Int8Totals<Source> totals_[kMatrixPanel];
    alignas(64) int32_t sums_[kMatrixRows * kTile];
    alignas(64) int8_t bytes_[2][2][matrix::kRows][kLine];
    Left left_;
    const Linear& w_;
    const Source source_;
    const Int8Rows x_;
    const int rows_, groups_, size_;
    int tile_, last_, number_ = 0, turn_ = 0;
    const uint8_t* next_;
};

template <class Source>
inline void int8_by_matrix(const Linear& w, int first, int last, const Int8Rows& x, int rows,
                           float* y, size_t y_stride, Prefetcher& prefetcher) {
    Int8Groups<Source> groups(w, first, last, x, rows);
    for (int tile = first; tile < last; ++tile) {
        groups.clear();
        const uint8_t* block = w.tile(tile);
        for (int b = 0; b < w.blocks(); ++b, block += block_bytes(w.kind)) {
            prefetch_int8(w, tile, b, x, rows, y, y_stride, prefetcher);
            groups.multiply(b, w.scales(block), prefetcher);
        }
        groups.finish();
        prefetcher.inputs = false;
        store_tile(w, tile, groups.totals(), rows, y, y_stride);
    }
}

#endif

template <template <int> class Source>
inline void multiply_int8_tiles(const Linear& w, int first, int last, const Int8Rows& x, int rows,
                                float* y, size_t y_stride, Prefetcher& prefetcher) {
#ifdef VENEER_MATRIX
    constexpr int few = 3, most = kMatrixPanel;  // up to `few` rows are faster on vectors
#else
    constexpr int most = kInt8Panel;
#endif
    const int panels = divide_up(rows, most);
    for (int p = 0; p < panels; ++p) {
        const int begin = rows * p / panels, count = rows * (p + 1) / panels - begin;
        float* to = y + begin * y_stride;
#ifdef VENEER_MATRIX
        if (count > few) {
            int8_by_matrix<Source<0>>(w, first, last, x.from(begin), count, to, y_stride,
                                      prefetcher);
            continue;
        }
#endif
        int8_by_vectors<Source<kInt8Offset>>(w, first, last, x.from(begin), count, to, y_stride,
                                             prefetcher);
    }
}

// About how often the function below prefetches in each block of a tile.
inline int int8_row_groups(int rows) {
    if constexpr (matrix::kPresent) return matrix_groups(rows);
    return divide_up(rows, tiles::kInt8Rows);
}

// Multiply rows by tiles first to last - 1 of a weight of 4 or 8 bits.
inline void multiply_int8_tiles(const Linear& w, int first, int last, const Int8Rows& x, int rows,
                                float* y, size_t y_stride, Prefetcher& prefetcher) {
    assert(w.kind != Kind::bfloat16);
    if (w.kind == Kind::four_bit)
        multiply_int8_tiles<BytesOfCodes>(w, first, last, x, rows, y, y_stride, prefetcher);
    else
        multiply_int8_tiles<BytesOfBytes>(w, first, last, x, rows, y, y_stride, prefetcher);
}

}  // namespace veneer
