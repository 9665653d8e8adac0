// Packing weights as linear.h lays them out.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "linear.h"

namespace veneer {

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
