// Rows of a GEMM's inputs, rounded to 8 bits.
//
// The inputs of a block of 64 are expressed in 127ths of its largest magnitude, rounded to nearest,
// ties to even. In memory a row has its blocks' numbers, then a scale for each block, then the sum
// of each block's numbers. Eight neighbours are stored in the order 0 4 1 5 2 6 3 7, in which the
// weights' bytes are decoded from 4-bit codes (by_int8.h).
#pragma once

#include <algorithm>
#include <cmath>

#include "../shared.h"
#include "linear.h"

namespace veneer {

struct Int8Rows {
    const uint8_t* at;
    size_t stride;  // bytes
    size_t width;   // numbers of a row, a multiple of 64

    // Bytes of a row of `width` numbers.
    static constexpr size_t bytes(size_t width) {
        return width + width / kBlock * (sizeof(float) + sizeof(int32_t));
    }

    Int8Rows from(int row) const { return {at + size_t(row) * stride, stride, width}; }
    const int8_t* numbers(int row, int block) const {
        return reinterpret_cast<const int8_t*>(at + size_t(row) * stride) + block * kBlock;
    }
    float scale(int row, int block) const {
        return load_number(reinterpret_cast<const float*>(tail(row)) + block);
    }
    int32_t sum(int row, int block) const {
        const uint8_t* sums = tail(row) + width / kBlock * sizeof(float);
        return load_number(reinterpret_cast<const int32_t*>(sums) + block);
    }
    // Prefetch a row's block, which another thread may have just written; with block 1 also the
    // row's scales and sums.
    void prefetch_block(int row, int block) const {
        __builtin_prefetch(numbers(row, block));
        if (block != 1) return;
        const uint8_t* end = at + size_t(row) * stride + bytes(width);
        for (const uint8_t* line = tail(row); line < end; line += kLine) __builtin_prefetch(line);
    }

  private:
    const uint8_t* tail(int row) const { return at + size_t(row) * stride + width; }
};

// Memory to which rows are written.
struct Int8Output {
    uint8_t* at;
    size_t stride, width;

    // Round blocks first to last - 1 of a row x. With a NaN or infinity the block's scale is not
    // finite, so that it shows in the result.
    void write(int64_t row, const bf16* x, int first, int last) const {
        uint8_t* to = at + size_t(row) * stride;
        float* scales = reinterpret_cast<float*>(to + width);
        int32_t* sums = reinterpret_cast<int32_t*>(to + width + width / kBlock * sizeof(float));
        for (int b = first; b < last; ++b) {
            alignas(64) int8_t numbers[kBlock];
            int32_t sum;
            store_number(scales + b, round_block(x + b * kBlock, numbers, sum));
            store_words(to + b * kBlock, reinterpret_cast<const uint8_t*>(numbers), kBlock);
            store_number(sums + b, sum);
        }
    }

  private:
    // Round a block, and return its scale.
    static float round_block(const bf16* x, int8_t (&numbers)[kBlock], int32_t& sum) {
        constexpr int vectors = kBlock / kLanes;
        Floats all[vectors], most = zeros(), total = zeros();
        for (int i = 0; i < vectors; ++i) {
            all[i] = load_shared(x + i * kLanes);
            most = max(most, max(all[i], sub(zeros(), all[i])));
        }
        const float largest = veneer::largest(most);
        // Numbers so small that 127 divided by them may overflow, or a 127th of them is denormal,
        // become zero.
        const Floats inverse = broadcast(largest > 2e-36f ? 127 / largest : 0);
        for (int i = 0; i < vectors; ++i) {
            all[i] = round(mul(all[i], inverse));
            total = add(total, all[i]);
        }
        // Exact, or NaN if a number is NaN or infinite (times an inverse of 0).
        const float exact = veneer::sum(total);
        const bool finite = exact == exact;
        sum = finite ? int32_t(exact) : 0;
        for (int i = 0; i < vectors; ++i)
            store_int8(numbers + i * kLanes, finite ? all[i] : zeros());
        return finite ? largest / 127 : exact;
    }
};

}  // namespace veneer
