// The GEMM on vectors with weights and inputs as floats: for CPUs that do not multiply pairs of
// bfloat16, and for a few rows on CPUs with matrix registers.
//
// Decoding a block for matrix registers takes longer than multiplying a row or two by it. So few
// rows are multiplied here, with the same additions in the same order as in the registers (see the
// software model): a row's bits are the same with any number of rows. That is why the first inputs
// of pairs are summed separately from the second ones, 32 inputs at a time, by FMAs that flush
// denormals. Without matrix registers a whole block of 64 inputs is summed at a time.
#pragma once

#include <type_traits>

#include "by_matrix.h"

#if defined(VENEER_MATRIX) || defined(VENEER_BY_NUMBERS)

namespace veneer {

// Groups of eight inputs that are summed before they are added to the block's sum.
#ifdef VENEER_MATRIX
constexpr int kSummedGroups = 4;
#else
constexpr int kSummedGroups = 8;
#endif

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
// rows for which this is faster than matrix registers.
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

// A block's weights, decoded while they are multiplied.
template <class Numbers>
struct CodedBlock {
    using Source = Numbers;
    const Numbers& numbers;
    const uint8_t* at;

    void prefetch_ahead(int group) const {
        veneer::prefetch_ahead<block_bytes(Numbers::kind), prefetch_near>(at, group);
    }
    template <int Q>
    TwoVectors weights(int group, int half) const {
        return numbers.template weights<Q>(at, group, half);
    }
};

// A block's weights, decoded once for many rows.
template <class Numbers>
struct DecodedBlock {
    using Source = Numbers;
    alignas(64) float at[8][4][2][2][kLanes];  // [group][pair][half][vector]

    void decode(const Numbers& numbers, const uint8_t* block) {
        for (int group = 0; group < 8; ++group) {
            auto each = [&](auto q) {
                for (int half = 0; half < 2; ++half) {
                    const TwoVectors w = numbers.template weights<q>(block, group, half);
                    store(at[group][q][half][0], w.first);
                    store(at[group][q][half][1], w.second);
                }
            };
            veneer::prefetch_ahead<block_bytes(Numbers::kind), prefetch_near>(block, group);
            each(std::integral_constant<int, 0>()), each(std::integral_constant<int, 1>());
            each(std::integral_constant<int, 2>()), each(std::integral_constant<int, 3>());
        }
    }
    void prefetch_ahead(int) const {}
    template <int Q>
    TwoVectors weights(int group, int half) const {
        return {load(at[group][Q][half][0]), load(at[group][Q][half][1])};
    }
};

// sums [row][half] = products of a block's groups from `first` on, kSummedGroups of them. GCC would
// not inline it, nor its caller, and a row would take a twentieth longer.
template <int Rows, class Block>
[[gnu::always_inline]] inline void sum_groups(const Block& block, int first,
                                              const float (&x)[Rows][kBlock],
                                              Floats (&sums)[Rows][2]) {
    using Numbers = typename Block::Source;
    TwoVectors chains[Rows][2];
    for (auto& row : chains)
        for (auto& each : row) each = {zeros(), zeros()};
    // Not unrolled: GCC would extract single inputs from vectors, by instructions that compete with
    // the look-up of codes.
#pragma GCC unroll 1
    for (int group = first; group < first + kSummedGroups; ++group) {
        auto multiply = [&](auto q) {
            for (int half = 0; half < 2; ++half) {
                const TwoVectors w = block.template weights<q>(group, half);
                for (int r = 0; r < Rows; ++r) {
                    const TwoVectors input = Numbers::inputs(x[r] + group * 8 + 2 * q);
                    TwoVectors& chain = chains[r][half];
                    chain.first = fma(w.first, input.first, chain.first);
                    chain.second = fma(w.second, input.second, chain.second);
                }
            }
        };
        block.prefetch_ahead(group);
        multiply(std::integral_constant<int, 0>()), multiply(std::integral_constant<int, 1>());
        multiply(std::integral_constant<int, 2>()), multiply(std::integral_constant<int, 3>());
    }
    for (int r = 0; r < Rows; ++r)
        for (int half = 0; half < 2; ++half) sums[r][half] = Numbers::both(chains[r][half]);
}

// totals [row][32] += a block's products with Rows rows, times the outputs' scales.
template <int Rows, class Block>
[[gnu::always_inline]] inline void add_products(const Block& block, const float* scales,
                                                const bf16* x, size_t x_stride, float* totals) {
    alignas(64) float inputs[Rows][kBlock];
    widen(x, x_stride, inputs);
    Floats sums[Rows][2];
    sum_groups(block, 0, inputs, sums);
    if constexpr (kSummedGroups < 8) {
        Floats more[Rows][2];
        sum_groups(block, kSummedGroups, inputs, more);
        for (int r = 0; r < Rows; ++r)
            for (int half = 0; half < 2; ++half)  // to zero, as in the registers
                sums[r][half] = add(add(zeros(), sums[r][half]), more[r][half]);
    }
    for (int half = 0; half < 2; ++half) {
        const Floats scale = scales != nullptr ? load(scales + half * kLanes) : broadcast(1.0f);
        for (int r = 0; r < Rows; ++r) {
            float* total = totals + r * kTile + half * kLanes;
            store(total, fma(sums[r][half], scale, load(total)));
        }
    }
}

template <int Rows, class Numbers>
inline void multiply_rows(const Linear& w, int first, int last, const bf16* x, size_t x_stride,
                          float* y, size_t y_stride, Prefetcher& prefetcher) {
    const Numbers numbers(w);
    alignas(64) float totals[Rows * kTile];
    for (int tile = first; tile < last; ++tile) {
        std::fill(totals, totals + Rows * kTile, 0.0f);
        const uint8_t* block = w.tile(tile);
        for (int b = 0; b < w.blocks(); ++b, block += block_bytes(w.kind)) {
            prefetch_rows(w, tile, b, x, x_stride, Rows, y, y_stride, prefetcher);
            prefetcher.prefetch_some();
            add_products<Rows>(CodedBlock<Numbers>{numbers, block}, w.scales(block), x + b * kBlock,
                               x_stride, totals);
        }
        prefetcher.inputs = false;
        store_tile(w, tile, totals, Rows, y, y_stride);
    }
}

#ifdef VENEER_MATRIX
template <class Numbers>
constexpr int kFewRows = Numbers::rows;
#else
template <class Numbers>
constexpr int kFewRows = tiles::kNumberRows;
#endif

// Multiply a few rows by tiles first to last - 1. Returns false if there are too many rows.
template <class Numbers, int Rows = kFewRows<Numbers>>
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

#ifdef VENEER_BY_NUMBERS

// The same as `add_products` for 1 to Rows rows, where the number is only known at run time.
template <int Rows, class Block>
inline void add_products(const Block& block, const float* scales, const bf16* x, size_t x_stride,
                         int rows, float* totals) {
    if constexpr (Rows > 0) {
        if (rows == Rows) return add_products<Rows>(block, scales, x, x_stride, totals);
        add_products<Rows - 1>(block, scales, x, x_stride, rows, totals);
    }
}

// Multiply any number of rows by tiles first to last - 1. Each block is decoded once for a panel.
template <class Numbers>
inline void multiply_by_numbers(const Linear& w, int first, int last, const bf16* x,
                                size_t x_stride, int rows, float* y, size_t y_stride,
                                Prefetcher& prefetcher) {
    const Numbers numbers(w);
    alignas(64) float totals[kPanel * kTile];
    DecodedBlock<Numbers> decoded;
    for (int start = 0; start < rows; start += kPanel) {
        const int count = std::min(kPanel, rows - start);
        const int groups = divide_up(count, tiles::kNumberRows);
        const bf16* from = x + start * x_stride;
        float* to = y + start * y_stride;
        for (int tile = first; tile < last; ++tile) {
            std::fill(totals, totals + size_t(count) * kTile, 0.0f);
            const uint8_t* block = w.tile(tile);
            for (int b = 0; b < w.blocks(); ++b, block += block_bytes(w.kind)) {
                prefetch_rows(w, tile, b, from, x_stride, count, to, y_stride, prefetcher);
                decoded.decode(numbers, block);
                for (int g = 0; g < groups; ++g) {
                    prefetcher.prefetch_some();
                    const int begin = count * g / groups, end = count * (g + 1) / groups;
                    add_products<tiles::kNumberRows>(decoded, w.scales(block),
                                                     from + b * kBlock + begin * x_stride, x_stride,
                                                     end - begin, totals + begin * kTile);
                }
            }
            prefetcher.inputs = false;
            store_tile(w, tile, totals, count, to, y_stride);
        }
    }
}

inline void multiply_by_numbers(const Linear& w, int first, int last, const bf16* x,
                                size_t x_stride, int rows, float* y, size_t y_stride,
                                Prefetcher& prefetcher) {
    switch (w.kind) {
        case Kind::four_bit:
            return multiply_by_numbers<NumbersOfCodes>(w, first, last, x, x_stride, rows, y,
                                                       y_stride, prefetcher);
        case Kind::eight_bit:
            return multiply_by_numbers<NumbersOfBytes>(w, first, last, x, x_stride, rows, y,
                                                       y_stride, prefetcher);
        case Kind::bfloat16:
            return multiply_by_numbers<NumbersOfPairs>(w, first, last, x, x_stride, rows, y,
                                                       y_stride, prefetcher);
    }
}

#endif

}  // namespace veneer

#endif
