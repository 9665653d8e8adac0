// Packs weights in the layout of linear.h, a tile at a time.
//
// If the layout changes, kLayout must change too, since files of packed weights outlive this
// library. A tile may be packed twice (see thread_pool.h), so its blocks are assembled in local
// memory and then stored.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../shared.h"
#include "linear.h"

namespace veneer {

constexpr int32_t kLayout = 1;

// A block of a tile.
template <Kind kind>
struct PackedBlock {
    alignas(64) uint8_t codes[code_bytes(kind)] = {};
    float scales[kTile] = {};

    void store(uint8_t* to) const {
        store_words(to, codes, sizeof codes);
        if (kind == Kind::bfloat16) return;
        uint8_t bytes[sizeof scales];
        std::memcpy(bytes, scales, sizeof bytes);
        store_words(to + sizeof codes, bytes, sizeof bytes);
    }
};

// The high or low halves (`shift` 4 or 0) of four bytes as 16 bits, with the first byte's lowest.
inline uint32_t halves(uint32_t four, int shift) {
    uint32_t half = four >> shift & 0x0f0f0f0fu;
    half = (half | half >> 4) & 0x00ff00ffu;
    return (half | half >> 8) & 0xffffu;
}

// Pack a tile of a weight in bitsandbytes' format: codes [outputs, inputs / 2], the earlier of two
// neighbours in the high half of a byte; scales [outputs, inputs / 64].
inline void pack_four_bit(const uint8_t* codes, const float* scales, int outputs, int inputs,
                          int tile, uint8_t* to) {
    const int blocks = inputs / kBlock, count = std::min(kTile, outputs - tile * kTile);
    for (int b = 0; b < blocks; ++b) {
        PackedBlock<Kind::four_bit> block;
        for (int n = 0; n < count; ++n) {
            const size_t output = size_t(tile) * kTile + size_t(n);
            block.scales[n] = scales[output * size_t(blocks) + size_t(b)];
            const uint8_t* row = codes + (output * size_t(inputs) + size_t(b) * kBlock) / 2;
            for (int group = 0; group < 8; ++group) {
                uint32_t four;
                std::memcpy(&four, row + group * 4, sizeof four);
                // An output has 16 bits for the first inputs of the group's four pairs, and 16 for
                // the second ones: four codes of four bits each.
                const uint32_t both = halves(four, 4) | halves(four, 0) << 16;
                std::memcpy(block.codes + (n / 16 * 128 + group * 16 + n % 16) * 4, &both,
                            sizeof both);
            }
        }
        block.store(to + size_t(b) * block_bytes(Kind::four_bit));
    }
}

// Pack a tile of weights [outputs, inputs] in bf16 as 8-bit numbers: 127ths of the largest
// magnitude of their block.
inline void pack_eight_bit(const bf16* weights, int outputs, int inputs, int tile, uint8_t* to) {
    const int blocks = inputs / kBlock, count = std::min(kTile, outputs - tile * kTile);
    for (int b = 0; b < blocks; ++b) {
        PackedBlock<Kind::eight_bit> block;
        for (int n = 0; n < count; ++n) {
            const bf16* row =
                weights + (size_t(tile) * kTile + size_t(n)) * size_t(inputs) + size_t(b) * kBlock;
            float most = 0;
            for (int k = 0; k < kBlock; ++k) most = std::max(most, std::abs(to_float(row[k])));
            const float scale = block.scales[n] = most / 127;
            for (int k = 0; k < kBlock; ++k) {
                const float number = most > 0 ? to_float(row[k]) / scale : 0;
                block.codes[(k / 2 * kTile + n) * 2 + k % 2] = uint8_t(int8_t(std::lround(number)));
            }
        }
        block.store(to + size_t(b) * block_bytes(Kind::eight_bit));
    }
}

// Pack a tile of weights [outputs, inputs] in bf16.
inline void pack_bf16(const bf16* weights, int outputs, int inputs, int tile, uint8_t* to) {
    const int blocks = inputs / kBlock, count = std::min(kTile, outputs - tile * kTile);
    for (int b = 0; b < blocks; ++b) {
        PackedBlock<Kind::bfloat16> block;
        for (int n = 0; n < count; ++n) {
            const bf16* row =
                weights + (size_t(tile) * kTile + size_t(n)) * size_t(inputs) + size_t(b) * kBlock;
            for (int pair = 0; pair < kBlockPairs; ++pair)
                std::memcpy(block.codes + (pair * kTile + n) * 4, row + 2 * pair, 4);
        }
        block.store(to + size_t(b) * block_bytes(Kind::bfloat16));
    }
}

}  // namespace veneer
