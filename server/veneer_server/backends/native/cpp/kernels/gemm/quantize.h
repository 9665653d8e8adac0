// Quantizes weights to four bits, to the same bits as bitsandbytes' `quantize_4bit` on a CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../bf16.h"
#include "../shared.h"
#include "linear.h"

namespace veneer {

// How a checkpoint stores its numbers.
enum class Stored : int32_t { bfloat16 = 0, float16 = 1, float32 = 2 };

struct Float16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(Float16 value) {
    const uint32_t rest = value.bits & 0x7fffu, sign = uint32_t(value.bits & 0x8000u) << 16;
    // With its bits moved, a number's exponent is too low by 112, the difference of the biases.
    // Multiplying by 2^112 corrects that, for subnormal numbers too. Infinity and NaN are restored
    // afterwards.
    uint32_t bits = rest << 13;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    result *= 0x1p112f;
    std::memcpy(&bits, &result, sizeof bits);
    if (rest >= 0x7c00u) bits = rest << 13 | 0x7f800000u;
    bits |= sign;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// A code book, prepared for quantizing.
struct CodeBook {
    const float* bounds;   // [15] bounds between neighbours of the sorted numbers
    const uint8_t* codes;  // [16] codes of the sorted numbers
};

// Quantize a block of 64 weights to 32 bytes of codes, the earlier of two neighbours in the high
// half, and the largest magnitude.
//
// If a weight is NaN, the largest is NaN and all codes are the last one. If a weight is infinite,
// so is the largest, and infinite weights have the last code. So a broken checkpoint shows in the
// server's outputs.
template <class Number>
inline void quantize_block(const Number* weights, const CodeBook& book, uint8_t* codes,
                           float* largest) {
    float numbers[kBlock];
    int32_t counts[kBlock], most = 0;
    for (int k = 0; k < kBlock; ++k) {
        numbers[k] = to_float(weights[k]);
        int32_t bits;
        std::memcpy(&bits, &numbers[k], sizeof bits);
        // Magnitudes are ordered like their bits, with NaN above all others.
        most = std::max(most, bits & 0x7fffffff);
    }
    float magnitude;
    std::memcpy(&magnitude, &most, sizeof magnitude);
    const float inverse = 1.0f / (magnitude < 1e-38f ? 1e-38f : magnitude);
    for (int k = 0; k < kBlock; ++k) numbers[k] *= inverse, counts[k] = 0;
    for (int b = 0; b < 15; ++b) {
        const float bound = book.bounds[b];
        // NaN is above every bound.
        for (int k = 0; k < kBlock; ++k) counts[k] += !(bound >= numbers[k]);
    }
    uint8_t packed[kBlock / 2];
    for (int k = 0; k < kBlock / 2; ++k)
        packed[k] = uint8_t(book.codes[counts[2 * k]] << 4 | book.codes[counts[2 * k + 1]]);
    store_words(codes, packed, sizeof packed);
    store_number(largest, magnitude);
}

template <class Number>
inline void quantize_blocks(const void* weights, int64_t first, int64_t last, const CodeBook& book,
                            uint8_t* codes, float* largest) {
    const Number* from = static_cast<const Number*>(weights);
    for (int64_t b = first; b < last; ++b)
        quantize_block(from + b * kBlock, book, codes + b * kBlock / 2, largest + b);
}

// Quantize blocks first to last - 1.
inline void quantize_blocks(Stored stored, const void* weights, int64_t first, int64_t last,
                            const CodeBook& book, uint8_t* codes, float* largest) {
    switch (stored) {
        case Stored::bfloat16:
            return quantize_blocks<bf16>(weights, first, last, book, codes, largest);
        case Stored::float16:
            return quantize_blocks<Float16>(weights, first, last, book, codes, largest);
        case Stored::float32:
            return quantize_blocks<float>(weights, first, last, book, codes, largest);
    }
}

}  // namespace veneer
