// y = x W^T for a frozen weight W [outputs, inputs], over tiles of 32 outputs.
//
// Weights lie in the order in which the GEMM reads them, tile by tile. Inputs are cut into blocks
// of 64, which is the block for which bitsandbytes has a scale:
//
//     4 bits:  for each block: codes of outputs 0-15 (512 bytes), of outputs 16-31 (512 bytes),
//              32 scales (float)
//     8 bits:  for each block: 32 pairs of inputs, each for 32 outputs (2048 bytes), 32 scales
//     bf16:    for each block: 32 pairs of inputs, each for 32 outputs (4096 bytes)
//
// Products of bfloat16 are added up in float over a block, and the scale multiplies the sum: a
// weight is rounded only as its code book is. Padding past the last output is zero.
#pragma once

#include <algorithm>
#include <cmath>

#include "../layout.h"
#include "prefetch.h"
#include "shared.h"
#include "simd.h"

namespace veneer {

constexpr int kTile = 32;   // outputs
constexpr int kBlock = 64;  // inputs
constexpr int kBlockPairs = kBlock / 2;

enum class Kind : int32_t { four_bit = 0, bfloat16 = 1, eight_bit = 2 };

constexpr size_t code_bytes(Kind kind) {
    return kTile * kBlock * (kind == Kind::four_bit ? 4 : kind == Kind::eight_bit ? 8 : 16) / 8;
}
constexpr size_t block_bytes(Kind kind) {
    return code_bytes(kind) + (kind == Kind::bfloat16 ? 0 : kTile * sizeof(float));
}

// Python has the same: see layout.h.
struct Linear {
    const uint8_t* weights;
    const float* bias;  // or null
    int32_t outputs;
    int32_t inputs;  // a multiple of 64
    Kind kind;
    int32_t parts;   // 2: gate and up, interleaved by pairs of tiles; else 1
    bf16 table[16];  // of 4-bit codes

    int tiles() const { return (outputs + kTile - 1) / kTile; }
    int blocks() const { return inputs / kBlock; }
    const uint8_t* tile(int index) const {
        const int each = tiles() / parts, within = index % each;
        const int place = (within / 2 * parts + index / each) * 2 + within % 2;
        return weights + size_t(parts == 1 ? index : place) * blocks() * block_bytes(kind);
    }
};
constexpr Field kLinearFields[] = {
    VENEER_STRUCT(Linear),         VENEER_FIELD(Linear, weights), VENEER_FIELD(Linear, bias),
    VENEER_FIELD(Linear, outputs), VENEER_FIELD(Linear, inputs),  VENEER_FIELD(Linear, kind),
    VENEER_FIELD(Linear, parts),   VENEER_FIELD(Linear, table),
};

// How far ahead of what is read weights are prefetched, in bytes.
constexpr size_t kAhead = 6 * block_bytes(Kind::four_bit);

// Prefetch an eighth of a block ahead, and more where a block's lines are not a multiple of eight.
template <size_t Bytes>
inline void prefetch_ahead(const void* block, int group) {
    const char* line = static_cast<const char*>(block) + kAhead;
    constexpr size_t lines = Bytes / kLine, each = lines / 8;
    for (size_t i = 0; i < each; ++i) prefetch(line + (group * each + i) * kLine);
    if (size_t(group) < lines % 8) prefetch(line + (8 * each + group) * kLine);
}

// A block's weights as pairs: eight groups of four. `chains` is the number of sums that a row and
// an output have, added up at a block's end: with one sum, each FMA of a single row would wait for
// the one before. `rows`: how many are multiplied at once, as the registers allow.

// From 4-bit codes; the Q-th pair of a group is the Q-th four bits of its codes. Looking codes up
// again for each row group costs less than keeping the weights: a GEMM of 32 rows was 20 % slower
// so.
struct FromCodes {
    static constexpr int chains = tiles::kFourBitChains, rows = tiles::kFourBitRows;
    const uint8_t* at;
    const Table& table;

    FromCodes(const uint8_t* block, const Table& given) : at(block), table(given) {}

    void prefetch_ahead(int group) const {
        veneer::prefetch_ahead<block_bytes(Kind::four_bit)>(at, group);
    }

    template <int Q>
    void pairs(int group, Pairs& low, Pairs& high) const {
        low = look_up<Q>(table, load_codes(at + group * 64));
        high = look_up<Q>(table, load_codes(at + 512 + group * 64));
    }
};

// From weights in bf16.
struct FromPairs {
    static constexpr int chains = 1, rows = tiles::kBf16Rows;
    const bf16* at;

    FromPairs(const uint8_t* block, const Table&) : at(reinterpret_cast<const bf16*>(block)) {}

    void prefetch_ahead(int group) const {
        veneer::prefetch_ahead<block_bytes(Kind::bfloat16)>(at, group);
    }

    template <int Q>
    void pairs(int group, Pairs& low, Pairs& high) const {
        const bf16* pair = at + (group * 4 + Q) * 2 * kTile;
        low = load_pairs(pair);
        high = load_pairs(pair + kTile);
    }
};

// From 8-bit numbers. Widening them takes time, which more rows share.
struct FromBytes {
    static constexpr int chains = 1, rows = tiles::kEightBitRows;
    const int8_t* at;

    FromBytes(const uint8_t* block, const Table&) : at(reinterpret_cast<const int8_t*>(block)) {}

    void prefetch_ahead(int group) const {
        veneer::prefetch_ahead<block_bytes(Kind::eight_bit)>(at, group);
    }

    template <int Q>
    void pairs(int group, Pairs& low, Pairs& high) const {
        const int8_t* pair = at + (group * 4 + Q) * 2 * kTile;
        low = load_bytes(pair);
        high = load_bytes(pair + kTile);
    }
};

// Add a block's products with Rows rows to `totals` [row][32].
//
// A row's sums are added in one order, whatever rows share the GEMM: its result is bit-identical
// whatever else is in the batch.
template <int Rows, class Source>
inline void add_block(const Source& source, bool first, const float* scales, const bf16* x,
                      size_t stride, float* totals) {
    constexpr int chains = Source::chains;
    Floats sums[chains][Rows][2];
    for (auto& chain : sums)
        for (auto& row : chain) row[0] = row[1] = zeros();
    for (int group = 0; group < 8; ++group) {
        if (first) source.prefetch_ahead(group);
        Pairs low, high;
        const bf16* here = x + group * 8;
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

// The same for 1 to Rows rows, a number known at run time.
template <int Rows, class Source>
inline void add_block(const Source& source, bool first, const float* scales, const bf16* x,
                      size_t stride, int rows, float* totals) {
    if constexpr (Rows > 0) {
        if (rows == Rows) return add_block<Rows>(source, first, scales, x, stride, totals);
        add_block<Rows - 1>(source, first, scales, x, stride, rows, totals);
    }
}

// Rows at a time, so that a panel's totals and inputs stay in the L1 cache.
constexpr int kPanel = 96;

// y[row * y_stride + output] = a tile's totals, plus the bias.
inline void store_tile(const Linear& w, int tile, const float* totals, int rows, float* y,
                       size_t y_stride) {
    const int width = std::min(kTile, w.outputs - tile * kTile);
    for (int r = 0; r < rows; ++r) {
        for (int half = 0; half * 16 < width; ++half) {
            const int count = std::min(16, width - half * 16);
            const int output = tile * kTile + half * 16;
            Floats result = load(totals + r * kTile + half * 16);
            if (w.bias != nullptr) result = add(result, load(w.bias + output, count));
            store_shared(y + r * y_stride + output, result, count);
        }
    }
}

// The number of groups of about equal size in which rows are multiplied.
template <class Source>
inline int row_groups(int rows) {
    return (rows + Source::rows - 1) / Source::rows;
}

// One tile for up to kPanel rows.
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
        // Prefetch where the results go, which another thread has read since they were last
        // written, ...
        for (int r = rows * b / w.blocks(); r < rows * (b + 1) / w.blocks(); ++r)
            for (int i = 0; i < kTile; i += kLanes)
                __builtin_prefetch(y + r * y_stride + tile * kTile + i, 1);
        // ... and inputs that no tile has read yet: another thread has just written half of them.
        if (prefetcher.inputs && b + 1 < w.blocks()) {
            const bf16* next = x + (b + 1) * kBlock;
            for (int r = 0; r < rows; ++r)
                for (int i = 0; i < 2; ++i) __builtin_prefetch(next + r * x_stride + i * 32);
        }
        const Source source(block, table);
        const float* scales = nullptr;
        if (w.kind != Kind::bfloat16)
            scales = reinterpret_cast<const float*>(block + code_bytes(w.kind));
        for (int g = 0; g < groups; ++g) {
            prefetcher.prefetch_some();
            const int begin = rows * g / groups, end = rows * (g + 1) / groups;
            add_block<Source::rows>(source, g == 0, scales, x + b * kBlock + begin * x_stride,
                                    x_stride, end - begin, totals + begin * kTile);
        }
    }
    prefetcher.inputs = false;
    store_tile(w, tile, totals, rows, y, y_stride);
}

template <class Source>
inline void multiply_tiles(const Linear& w, int first, int last, const bf16* x, size_t x_stride,
                           int rows, float* y, size_t y_stride, Prefetcher& prefetcher) {
    for (int begin = 0; begin < rows; begin += kPanel) {
        const int count = std::min(kPanel, rows - begin);
        for (int tile = first; tile < last; ++tile)
            multiply_tile<Source>(w, tile, x + begin * x_stride, x_stride, count,
                                  y + begin * y_stride, y_stride, prefetcher);
    }
}

// How often `multiply_tiles` prefetches in each block of a tile.
inline int row_groups(const Linear& w, int rows) {
    switch (w.kind) {
        case Kind::four_bit: return row_groups<FromCodes>(rows);
        case Kind::eight_bit: return row_groups<FromBytes>(rows);
        default: return row_groups<FromPairs>(rows);
    }
}

// Tiles first to last - 1 for any number of rows; between its blocks, prefetch what comes next.
inline void multiply_tiles(const Linear& w, int first, int last, const bf16* x, size_t x_stride,
                           int rows, float* y, size_t y_stride, Prefetcher& prefetcher) {
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

// Pack what bitsandbytes stores: codes [outputs, inputs / 2], the earlier of two neighbours in the
// high half of a byte; scales [outputs, inputs / 64].
inline void pack_four_bit(const uint8_t* codes, const float* scales, int outputs, int inputs,
                          uint8_t* to) {
    const int blocks = inputs / kBlock, tiles = (outputs + kTile - 1) / kTile;
    constexpr size_t bytes = block_bytes(Kind::four_bit);
    for (int tile = 0; tile < tiles; ++tile) {
        for (int b = 0; b < blocks; ++b, to += bytes) {
            std::memset(to, 0, bytes);
            float* tile_scales = reinterpret_cast<float*>(to + kTile * kBlock / 2);
            for (int n = 0; n < kTile; ++n) {
                const int output = tile * kTile + n;
                if (output >= outputs) break;
                tile_scales[n] = scales[size_t(output) * blocks + b];
                const uint8_t* row = codes + (size_t(output) * inputs + b * kBlock) / 2;
                for (int k = 0; k < kBlock; ++k) {
                    const unsigned code = k % 2 ? row[k / 2] & 15u : row[k / 2] >> 4;
                    // Pair k / 2 is the q-th of its group; each output has 16 bits for each half of
                    // a pair: four codes of four bits.
                    const int group = k / 8, q = k / 2 % 4;
                    const int word = n / 16 * 256 + group * 32 + n % 16 * 2 + k % 2;
                    to[word * 2 + q / 2] |= uint8_t(code << (q % 2 * 4));
                }
            }
        }
    }
}

// Pack weights [outputs, inputs] in bf16 as 8-bit numbers: 127ths of the largest of their block.
inline void pack_eight_bit(const bf16* weights, int outputs, int inputs, uint8_t* to) {
    const int blocks = inputs / kBlock, tiles = (outputs + kTile - 1) / kTile;
    constexpr size_t bytes = block_bytes(Kind::eight_bit);
    for (int tile = 0; tile < tiles; ++tile) {
        for (int b = 0; b < blocks; ++b, to += bytes) {
            std::memset(to, 0, bytes);
            float* scales = reinterpret_cast<float*>(to + code_bytes(Kind::eight_bit));
            for (int n = 0; n < kTile && tile * kTile + n < outputs; ++n) {
                const bf16* row = weights + size_t(tile * kTile + n) * inputs + b * kBlock;
                float most = 0;
                for (int k = 0; k < kBlock; ++k) most = std::max(most, std::abs(to_float(row[k])));
                scales[n] = most / 127;
                for (int k = 0; k < kBlock; ++k) {
                    const float number = most > 0 ? to_float(row[k]) / scales[n] : 0;
                    to[(k / 2 * kTile + n) * 2 + k % 2] = uint8_t(int8_t(std::lround(number)));
                }
            }
        }
    }
}

// Pack weights [outputs, inputs] in bf16.
inline void pack_bf16(const bf16* weights, int outputs, int inputs, bf16* to) {
    const int blocks = inputs / kBlock, tiles = (outputs + kTile - 1) / kTile;
    for (int tile = 0; tile < tiles; ++tile) {
        for (int pair = 0; pair < blocks * kBlockPairs; ++pair) {
            for (int n = 0; n < kTile; ++n, to += 2) {
                const int output = tile * kTile + n;
                const bf16* from = weights + size_t(output) * inputs + 2 * pair;
                to[0] = output < outputs ? from[0] : 0;
                to[1] = output < outputs ? from[1] : 0;
            }
        }
    }
}

}  // namespace veneer
