// The GEMM for a few rows, on vectors, for CPUs with matrix registers.
//
// Decoding a block for the registers takes longer than multiplying a row or two by it. So few rows
// are multiplied on vectors, with the same additions in the same order as in the registers (see the
// software model): a row's bits are the same with any number of rows. That is why the first inputs
// of pairs are summed separately from the second ones, 32 inputs at a time, by FMAs that flush
// denormals.
#pragma once

#include <type_traits>

#include "by_matrix.h"

#ifdef VENEER_MATRIX

namespace veneer {

// Two vectors of weights, of the inputs that multiply them, or of sums. Each weight has its own
// sum, and `both` adds up the sums of the same output.
struct TwoVectors {
    Floats first, second;
};

// For weights whose first vector has the first numbers of pairs, and the second one the second
// numbers.
struct PairsApart {
    static TwoVectors inputs(const float* pair) { return {broadcast(pair[0]), broadcast(pair[1])}; }
    static Floats both(const TwoVectors& sums) { return add(sums.first, sums.second); }
};

// Weights as floats; `weights` returns the Q-th pair of a group for 16 outputs. `rows`: the most
// rows for which this is faster than the registers.
struct NumbersOfCodes : PairsApart {
    static constexpr Kind kind = Kind::four_bit;
    static constexpr int rows = 1;
    const NumberTable table;
    explicit NumbersOfCodes(const Linear& w) : table(w.table) {}

    template <int Q>
    TwoVectors weights(const uint8_t* block, int group, int half) const {
        const uint8_t* codes = block + half * 512 + group * 64;
        return {look_up_number<Q>(table, codes), look_up_number<Q + 4>(table, codes)};
    }
};

struct NumbersOfPairs : PairsApart {
    static constexpr Kind kind = Kind::bfloat16;
    static constexpr int rows = 3;
    explicit NumbersOfPairs(const Linear&) {}

    template <int Q>
    TwoVectors weights(const uint8_t* block, int group, int half) const {
        const bf16* at = reinterpret_cast<const bf16*>(block) + (group * 4 + Q) * 2 * kTile;
        const Pairs pairs = load_pairs(at + half * kTile);
        return {firsts(pairs), seconds(pairs)};
    }
};

// Here the two vectors are the pairs of eight outputs, and of the next eight, as they are stored.
struct NumbersOfBytes {
    static constexpr Kind kind = Kind::eight_bit;
    static constexpr int rows = 3;
    explicit NumbersOfBytes(const Linear&) {}

    template <int Q>
    TwoVectors weights(const uint8_t* block, int group, int half) const {
        const int8_t* at = reinterpret_cast<const int8_t*>(block) + (group * 4 + Q) * 2 * kTile;
        return {load_numbers_of(at + half * kTile), load_numbers_of(at + half * kTile + kLanes)};
    }
    static TwoVectors inputs(const float* pair) {
        const Floats both = broadcast_two(pair);
        return {both, both};
    }
    static Floats both(const TwoVectors& sums) { return add_neighbours(sums.first, sums.second); }
};

// Convert inputs to floats: Rows rows of Count numbers.
template <int Rows, int Count>
inline void widen(const bf16* x, size_t x_stride, float (&to)[Rows][Count]) {
    for (int r = 0; r < Rows; ++r)
        for (int i = 0; i < Count; i += kLanes) store(to[r] + i, load_shared(x + r * x_stride + i));
}

// sums [row][half] = products of a block's groups first to first + 3, which are 32 inputs.
template <int Rows, class Numbers>
inline void sum_groups(const Numbers& numbers, const uint8_t* block, int first,
                       const float (&x)[Rows][kBlock], Floats (&sums)[Rows][2]) {
    TwoVectors chains[Rows][2];
    for (auto& row : chains)
        for (auto& each : row) each = {zeros(), zeros()};
    // Not unrolled: GCC would extract single inputs from vectors, by instructions that compete with
    // the look-up of codes.
#pragma GCC unroll 1
    for (int group = first; group < first + 4; ++group) {
        auto multiply = [&](auto q) {
            for (int half = 0; half < 2; ++half) {
                const TwoVectors w = numbers.template weights<q>(block, group, half);
                for (int r = 0; r < Rows; ++r) {
                    const TwoVectors input = Numbers::inputs(x[r] + group * 8 + 2 * q);
                    TwoVectors& chain = chains[r][half];
                    chain.first = fma(w.first, input.first, chain.first);
                    chain.second = fma(w.second, input.second, chain.second);
                }
            }
        };
        prefetch_ahead<block_bytes(Numbers::kind), prefetch_near>(block, group);
        multiply(std::integral_constant<int, 0>()), multiply(std::integral_constant<int, 1>());
        multiply(std::integral_constant<int, 2>()), multiply(std::integral_constant<int, 3>());
    }
    for (int r = 0; r < Rows; ++r)
        for (int half = 0; half < 2; ++half) sums[r][half] = Numbers::both(chains[r][half]);
}

template <int Rows, class Numbers>
inline void multiply_rows(const Linear& w, int first, int last, const bf16* x, size_t x_stride,
                          float* y, size_t y_stride, Prefetcher& prefetcher) {
    const Numbers numbers(w);
    alignas(64) float totals[Rows * kTile], inputs[Rows][kBlock];
    for (int tile = first; tile < last; ++tile) {
        std::fill(totals, totals + Rows * kTile, 0.0f);
        const uint8_t* block = w.tile(tile);
        for (int b = 0; b < w.blocks(); ++b, block += block_bytes(w.kind)) {
            prefetch_rows(w, tile, b, x, x_stride, Rows, y, y_stride, prefetcher);
            prefetcher.prefetch_some();
            widen(x + b * kBlock, x_stride, inputs);
            Floats sums[Rows][2], more[Rows][2];
            sum_groups(numbers, block, 0, inputs, sums);
            sum_groups(numbers, block, 4, inputs, more);
            const float* scales = w.scales(block);
            for (int half = 0; half < 2; ++half) {
                const Floats scale =
                    scales != nullptr ? load(scales + half * kLanes) : broadcast(1.0f);
                for (int r = 0; r < Rows; ++r) {
                    float* total = totals + r * kTile + half * kLanes;
                    const Floats sum = add(add(zeros(), sums[r][half]), more[r][half]);
                    store(total, fma(sum, scale, load(total)));
                }
            }
        }
        prefetcher.inputs = false;
        store_tile(w, tile, totals, Rows, y, y_stride);
    }
}

// Multiply a few rows by tiles first to last - 1. Returns false if there are too many rows.
template <class Numbers, int Rows = Numbers::rows>
inline bool multiply_few(const Linear& w, int first, int last, const bf16* x, size_t x_stride,
                         int rows, float* y, size_t y_stride, Prefetcher& prefetcher) {
    if constexpr (Rows == 0) {
        return false;
    } else {
        if (rows != Rows)
            return multiply_few<Numbers, Rows - 1>(w, first, last, x, x_stride, rows, y, y_stride,
                                                   prefetcher);
        multiply_rows<Rows, Numbers>(w, first, last, x, x_stride, y, y_stride, prefetcher);
        return true;
    }
}

inline bool multiply_few(const Linear& w, int first, int last, const bf16* x, size_t x_stride,
                         int rows, float* y, size_t y_stride, Prefetcher& prefetcher) {
    switch (w.kind) {
        case Kind::four_bit:
            return multiply_few<NumbersOfCodes>(w, first, last, x, x_stride, rows, y, y_stride,
                                                prefetcher);
        case Kind::eight_bit:
            return multiply_few<NumbersOfBytes>(w, first, last, x, x_stride, rows, y, y_stride,
                                                prefetcher);
        case Kind::bfloat16:
            return multiply_few<NumbersOfPairs>(w, first, last, x, x_stride, rows, y, y_stride,
                                                prefetcher);
    }
    return false;
}

}  // namespace veneer

#endif
