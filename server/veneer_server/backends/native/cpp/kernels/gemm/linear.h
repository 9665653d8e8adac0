// y = x W^T for a frozen weight W [outputs, inputs], over tiles of 32 outputs.
//
// Weights are stored in the order in which the GEMM reads them, tile by tile. Inputs are cut into
// blocks of 64, the blocks for which bitsandbytes has a scale:
//
//     4 bits:  for each block: codes of outputs 0-15 (512 bytes), of outputs 16-31 (512 bytes),
//              32 scales (float)
//     8 bits:  for each block: 32 pairs of inputs, each for 32 outputs (2048 bytes), 32 scales
//     bf16:    for each block: 32 pairs of inputs, each for 32 outputs (4096 bytes)
//
// Products of bfloat16 are added up in float over a block, and the sum is multiplied by the scale.
// So a 4-bit weight is only rounded in its code book. Padding past the last output is zero.
#pragma once

#include <algorithm>

#include "../../layout.h"
#include "../prefetch.h"
#include "../shared.h"
#include "../simd.h"

namespace veneer {

constexpr int kTile = 32;   // outputs
constexpr int kBlock = 64;  // inputs
constexpr int kBlockPairs = kBlock / 2;

// Most rows that are multiplied on vectors as one panel, so that its totals and inputs stay in the
// L1 cache.
constexpr int kPanel = 96;

enum class Kind : int32_t { four_bit = 0, bfloat16 = 1, eight_bit = 2 };

constexpr size_t code_bytes(Kind kind) {
    return kTile * kBlock * (kind == Kind::four_bit ? 4 : kind == Kind::eight_bit ? 8 : 16) / 8;
}
constexpr size_t block_bytes(Kind kind) {
    return code_bytes(kind) + (kind == Kind::bfloat16 ? 0 : kTile * sizeof(float));
}

// A packed weight. Python declares the same struct: see layout.h.
struct Linear {
    const uint8_t* weights;
    const float* bias;  // or null
    int32_t outputs;
    int32_t inputs;  // a multiple of 64
    Kind kind;
    int32_t parts;        // 2: gate and up, interleaved by pairs of tiles; else 1
    int32_t int8_inputs;  // 1: multiply by inputs of 8 bits, see by_int8.h
    float unit;           // unit of `bytes`; 1 for weights of 8 bits
    bf16 table[16];       // the numbers that 4-bit codes stand for
    int8_t bytes[16];     // the same numbers as multiples of `unit`

    int tiles() const { return (outputs + kTile - 1) / kTile; }
    int blocks() const { return inputs / kBlock; }
    const uint8_t* tile(int index) const {
        const int each = tiles() / parts, within = index % each;
        const int place = (within / 2 * parts + index / each) * 2 + within % 2;
        return weights + size_t(parts == 1 ? index : place) * blocks() * block_bytes(kind);
    }
    // The scales of a block's outputs; null for bfloat16, which has none.
    const float* scales(const uint8_t* block) const {
        if (kind == Kind::bfloat16) return nullptr;
        return reinterpret_cast<const float*>(block + code_bytes(kind));
    }
};
constexpr Field kLinearFields[] = {
    VENEER_STRUCT(Linear),         VENEER_FIELD(Linear, weights),     VENEER_FIELD(Linear, bias),
    VENEER_FIELD(Linear, outputs), VENEER_FIELD(Linear, inputs),      VENEER_FIELD(Linear, kind),
    VENEER_FIELD(Linear, parts),   VENEER_FIELD(Linear, int8_inputs), VENEER_FIELD(Linear, unit),
    VENEER_FIELD(Linear, table),   VENEER_FIELD(Linear, bytes),
};

// How many bytes ahead of the current block weights are prefetched.
constexpr size_t kAhead = 6 * block_bytes(Kind::four_bit);

// Prefetch an eighth of a block, kAhead bytes ahead; some groups prefetch a line more if a block's
// lines are not a multiple of eight.
template <size_t Bytes, void (*Prefetch)(const void*) = prefetch>
inline void prefetch_ahead(const void* block, int group) {
    const char* line = static_cast<const char*>(block) + kAhead;
    constexpr size_t lines = Bytes / kLine, each = lines / 8;
    for (size_t i = 0; i < each; ++i) Prefetch(line + (group * each + i) * kLine);
    if (size_t(group) < lines % 8) Prefetch(line + (8 * each + group) * kLine);
}

// The sources below return a block's weights as pairs: eight groups of four pairs. `chains`:
// partial sums per row and output, added up at a block's end. With one sum, each FMA of a single
// row would wait for the previous one. `rows`: rows multiplied at once, as many as the registers
// allow.

// Weights from 4-bit codes. The Q-th pair of a group is the Q-th four bits of its codes. Looking
// codes up again for each row group costs less than keeping the weights: with the latter, a GEMM of
// 32 rows was 20 % slower.
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

    // The pairs of 16 outputs from 16 * half on. Codes are loaded a byte further on if that saves a
    // shift, so this may read one byte past the codes, of the scales.
    template <int Q>
    Pairs half(int half, int group) const {
        return look_up<Q % 2>(table, load_codes(at + Q / 2 + half * 512 + group * 64));
    }
};

// Weights from bf16.
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

    template <int Q>
    Pairs half(int half, int group) const {
        return load_pairs(at + (group * 4 + Q) * 2 * kTile + half * kTile);
    }
};

// Weights from 8-bit numbers. Widening them takes time, which is shared by the rows multiplied at
// once.
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

    template <int Q>
    Pairs half(int half, int group) const {
        return load_bytes(at + (group * 4 + Q) * 2 * kTile + half * kTile);
    }
};

// Call before block b of a tile is multiplied: prefetch a part of the tile's results, which another
// thread has read since they were last written.
inline void prefetch_results(const Linear& w, int tile, int b, int rows, float* y,
                             size_t y_stride) {
    for (int r = rows * b / w.blocks(); r < rows * (b + 1) / w.blocks(); ++r)
        for (int i = 0; i < kTile; i += kLanes)
            __builtin_prefetch(y + r * y_stride + tile * kTile + i, 1);
}

// The same, and prefetch the next block's inputs if no tile has read them yet: other threads have
// just written some of them.
inline void prefetch_rows(const Linear& w, int tile, int b, const bf16* x, size_t x_stride,
                          int rows, float* y, size_t y_stride, const Prefetcher& prefetcher) {
    prefetch_results(w, tile, b, rows, y, y_stride);
    if (!prefetcher.inputs || b + 1 >= w.blocks()) return;
    const bf16* next = x + (b + 1) * kBlock;
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < 2; ++i) __builtin_prefetch(next + r * x_stride + i * 32);
}

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

}  // namespace veneer
