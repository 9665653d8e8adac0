// y = x W^T for a frozen weight W [outputs, inputs], over tiles of 32 outputs.
//
// Weights lie in the order in which a product reads them, one run a tile. Inputs are cut into
// blocks of 64, which is the block that bitsandbytes gives a scale of its own:
//
//     4 bits:  for each block: codes of outputs 0-15 (512 bytes), of outputs 16-31 (512 bytes),
//              32 scales (float)
//     8 bits:  for each block: 32 pairs of inputs, each for 32 outputs (2048 bytes), 32 scales
//     bf16:    for each block: 32 pairs of inputs, each for 32 outputs (4096 bytes)
//
// A block's sums are bfloat16 products added in float; the scale multiplies the sum, so that no
// weight is rounded once more than its code book is. What lies past the last output is zero.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace veneer {

constexpr int kTile = 32;    // outputs
constexpr int kBlock = 64;   // inputs
constexpr int kBlockPairs = kBlock / 2;
#if VENEER_AVX512
constexpr int kMostRows = 12;  // sums of 12 rows x 32 outputs: 24 of 32 registers
#else
constexpr int kMostRows = 3;  // 12 of 16 registers
#endif

enum class Kind : int32_t { four_bit = 0, bfloat16 = 1, eight_bit = 2 };

constexpr size_t code_bytes(Kind kind) {
    return kTile * kBlock * (kind == Kind::four_bit ? 4 : kind == Kind::eight_bit ? 8 : 16) / 8;
}
constexpr size_t block_bytes(Kind kind) {
    return code_bytes(kind) + (kind == Kind::bfloat16 ? 0 : kTile * sizeof(float));
}

// As it is handed over the C interface.
struct Linear {
    const uint8_t* weights;
    const float* bias;  // or null
    int32_t outputs;
    int32_t inputs;  // a multiple of 64
    Kind kind;
    int32_t reserved;
    bf16 table[16];  // of 4-bit codes

    int tiles() const { return (outputs + kTile - 1) / kTile; }
    int blocks() const { return inputs / kBlock; }
    const uint8_t* tile(int index) const {
        return weights + size_t(index) * blocks() * block_bytes(kind);
    }
};

// Bytes ahead of what is read that memory is asked for. Without it a product of 16 rows, which
// look a block up before they multiply, took a third longer.
constexpr size_t kAhead = 6 * block_bytes(Kind::four_bit);

// A block's weights as pairs, straight from 4-bit codes. Eight groups of four pairs; the Q-th
// pair of a group is the Q-th four bits of its codes.
struct FromCodes {
    const uint8_t* at;
    const Table* table;

    static FromCodes at_block(const uint8_t* block, const Table& table) { return {block, &table}; }

    void ask_ahead(int group) const {
        prefetch(at + kAhead + group * 64);
        prefetch(at + kAhead + 512 + group * 64);
        if (group < 2) prefetch(at + kAhead + 1024 + group * 64);
    }

    template <int Q>
    void pairs(int group, Pairs& low, Pairs& high) const {
        low = look_up<Q>(*table, load_codes(at + group * 64));
        high = look_up<Q>(*table, load_codes(at + 512 + group * 64));
    }
};

// The same from memory: the stored bf16 weights, or codes that were looked up before.
struct FromPairs {
    const bf16* at;
    bool streamed;  // from memory, not looked up before

    static FromPairs at_block(const uint8_t* block, const Table&) {
        return {reinterpret_cast<const bf16*>(block), true};
    }

    void ask_ahead(int group) const {
        if (!streamed) return;
        const char* line = reinterpret_cast<const char*>(at + group * 4 * 2 * kTile) + kAhead;
        for (int i = 0; i < 8; ++i) prefetch(line + i * 64);
    }

    template <int Q>
    void pairs(int group, Pairs& low, Pairs& high) const {
        const bf16* pair = at + (group * 4 + Q) * 2 * kTile;
        low = load_pairs(pair);
        high = load_pairs(pair + kTile);
    }
};

// From 8-bit numbers.
struct FromBytes {
    const int8_t* at;

    static FromBytes at_block(const uint8_t* block, const Table&) {
        return {reinterpret_cast<const int8_t*>(block)};
    }

    void ask_ahead(int group) const {
        for (int i = 0; i < 4; ++i) prefetch(at + kAhead + group * 256 + i * 64);
        if (group < 2) prefetch(at + kAhead + 2048 + group * 64);
    }

    template <int Q>
    void pairs(int group, Pairs& low, Pairs& high) const {
        const int8_t* pair = at + (group * 4 + Q) * 2 * kTile;
        low = load_bytes(pair);
        high = load_bytes(pair + kTile);
    }
};

template <class Source>
inline void expand(const Source& codes, bf16* pairs) {
    for (int group = 0; group < 8; ++group) {
        Pairs low, high;
        codes.ask_ahead(group);
        bf16* to = pairs + group * 4 * 2 * kTile;
        codes.template pairs<0>(group, low, high), store_pairs(to, low), store_pairs(to + 32, high);
        codes.template pairs<1>(group, low, high), store_pairs(to + 64, low), store_pairs(to + 96, high);
        codes.template pairs<2>(group, low, high), store_pairs(to + 128, low), store_pairs(to + 160, high);
        codes.template pairs<3>(group, low, high), store_pairs(to + 192, low), store_pairs(to + 224, high);
    }
}

// Add a block's products of Rows rows to `totals` [row][32].
//
// Sums of a row are added in one order, whatever rows share the product: a row's result does not
// depend on its company, to the bit. Nor would more sums, or more tiles at once, be faster where
// rows are few: one tile at a time reads memory as fast as it can be read.
template <int Rows, class Source>
inline void add_block(const Source& source, const float* scales, const bf16* x, size_t stride,
                      float* totals) {
    Floats sums[Rows][2];
    for (auto& row : sums) row[0] = row[1] = zeros();
    for (int group = 0; group < 8; ++group) {
        source.ask_ahead(group);
        Pairs low, high;
        const bf16* here = x + group * 8;
        auto multiply = [&](int q) {
            for (int r = 0; r < Rows; ++r) {
                const Pairs input = same_pair(here + r * stride + 2 * q);
                sums[r][0] = dot(sums[r][0], low, input);
                sums[r][1] = dot(sums[r][1], high, input);
            }
        };
        source.template pairs<0>(group, low, high), multiply(0);
        source.template pairs<1>(group, low, high), multiply(1);
        source.template pairs<2>(group, low, high), multiply(2);
        source.template pairs<3>(group, low, high), multiply(3);
    }
    const Floats low = scales != nullptr ? load(scales) : all(1.0f);
    const Floats high = scales != nullptr ? load(scales + 16) : low;
    for (int r = 0; r < Rows; ++r) {
        float* total = totals + r * kTile;
        store(total, fma(sums[r][0], low, load(total)));
        store(total + 16, fma(sums[r][1], high, load(total + 16)));
    }
}

// The same for a number of rows that is known when it runs.
template <class Source>
inline void add_block(const Source& source, const float* scales, const bf16* x, size_t stride,
                      int rows, float* totals) {
    switch (rows) {
#define VENEER_ROWS(n) \
    case n: return add_block<n>(source, scales, x, stride, totals);
        VENEER_ROWS(1) VENEER_ROWS(2) VENEER_ROWS(3)
#if VENEER_AVX512
        VENEER_ROWS(4) VENEER_ROWS(5) VENEER_ROWS(6) VENEER_ROWS(7) VENEER_ROWS(8)
        VENEER_ROWS(9) VENEER_ROWS(10) VENEER_ROWS(11) VENEER_ROWS(12)
#endif
#undef VENEER_ROWS
    }
}

// Rows at a time so that a panel's totals and inputs stay in the first cache.
constexpr int kPanel = 96;

// y[row * y_stride + output] = what was added up of a tile, and the bias.
inline void store_tile(const Linear& w, int tile, const float* totals, int rows, float* y,
                       size_t y_stride) {
    const int width = std::min(kTile, w.outputs - tile * kTile);
    for (int r = 0; r < rows; ++r) {
        for (int half = 0; half * 16 < width; ++half) {
            const int count = std::min(16, width - half * 16);
            const int output = tile * kTile + half * 16;
            Floats result = load(totals + r * kTile + half * 16);
            if (w.bias != nullptr) result = add(result, load(w.bias + output, count));
            store(y + r * y_stride + output, result, count);
        }
    }
}

// One tile for up to kPanel rows. Few rows take the weights straight as they are kept; for more
// a block is looked up once, for one group of rows after another.
template <class Source>
inline void multiply_tile(const Linear& w, int tile, const bf16* x, size_t x_stride, int rows,
                          float* y, size_t y_stride) {
    alignas(64) float totals[kPanel * kTile];
    alignas(64) bf16 looked_up[kTile * kBlock];
    std::fill(totals, totals + size_t(rows) * kTile, 0.0f);
    const Table table(w.table);
    const int groups = (rows + kMostRows - 1) / kMostRows;
    const size_t bytes = block_bytes(w.kind);
    const uint8_t* block = w.tile(tile);
    for (int b = 0; b < w.blocks(); ++b, block += bytes) {
        const bf16* here = x + b * kBlock;
        const Source source = Source::at_block(block, table);
        const float* scales = nullptr;
        if (w.kind != Kind::bfloat16)
            scales = reinterpret_cast<const float*>(block + code_bytes(w.kind));
        if (groups == 1) {
            add_block(source, scales, here, x_stride, rows, totals);
            continue;
        }
        expand(source, looked_up);
        for (int g = 0; g < groups; ++g) {  // groups of about one size
            const int begin = rows * g / groups, end = rows * (g + 1) / groups;
            add_block(FromPairs{looked_up, false}, scales, here + begin * x_stride, x_stride,
                      end - begin, totals + begin * kTile);
        }
    }
    store_tile(w, tile, totals, rows, y, y_stride);
}

template <class Source>
inline void multiply_tiles(const Linear& w, int first, int last, const bf16* x, size_t x_stride,
                           int rows, float* y, size_t y_stride) {
    for (int begin = 0; begin < rows; begin += kPanel) {
        const int count = std::min(kPanel, rows - begin);
        for (int tile = first; tile < last; ++tile)
            multiply_tile<Source>(w, tile, x + begin * x_stride, x_stride, count,
                                  y + begin * y_stride, y_stride);
    }
}

// Tiles first to last - 1 for any number of rows.
inline void multiply_tiles(const Linear& w, int first, int last, const bf16* x, size_t x_stride,
                           int rows, float* y, size_t y_stride) {
    switch (w.kind) {
        case Kind::four_bit:
            return multiply_tiles<FromCodes>(w, first, last, x, x_stride, rows, y, y_stride);
        case Kind::eight_bit:
            return multiply_tiles<FromBytes>(w, first, last, x, x_stride, rows, y, y_stride);
        case Kind::bfloat16:
            return multiply_tiles<FromPairs>(w, first, last, x, x_stride, rows, y, y_stride);
    }
}

// From what bitsandbytes keeps: codes [outputs, inputs / 2], the earlier of two neighbours in
// the high half of a byte; scales [outputs, inputs / 64].
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
                    // Pair k / 2 is the q-th of its group; each output has 16 bits for each of
                    // a pair's halves.
                    const int group = k / 8, q = k / 2 % 4;
                    const int word = n / 16 * 256 + group * 32 + n % 16 * 2 + k % 2;
                    to[word * 2 + q / 2] |= uint8_t(code << (q % 2 * 4));
                }
            }
        }
    }
}

// From weights [outputs, inputs] in bf16, rounded to 127ths of the largest of their block.
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

// From weights [outputs, inputs] in bf16.
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
