// Low-rank updates of the rows that have an adapter: h = x A^T (shrink), then y += s h B^T
// (expand).
//
// Rows with the same adapter are adjacent (a segment). The adapter's matrices are transposed, as
// laid out by the server's loaders (step/layout.py): A^T [inputs, ranks of a group side by side]
// and, for each projection, B^T [rank, outputs], in bfloat16 or float, of any rank. In bfloat16,
// A^T is stored in pairs of inputs: [inputs / 2, ranks, 2]. x is the bfloat16 input of the base's
// GEMM too; sums and h are float.
#pragma once

#include <algorithm>

#include "../layout.h"
#include "shared.h"
#include "simd.h"
#include "square.h"

namespace veneer {

constexpr int kMembers = 3;  // projections that share an input: q, k, v

// One adapted projection. Python declares this struct and the next three too: see layout.h.
struct LoraMember {
    const void* b;  // null: not adapted
    int32_t rank;
    int32_t first;  // its first column of h
    float scaling;
    int32_t reserved;
};
constexpr Field kLoraMemberFields[] = {
    VENEER_STRUCT(LoraMember),         VENEER_FIELD(LoraMember, b),
    VENEER_FIELD(LoraMember, rank),    VENEER_FIELD(LoraMember, first),
    VENEER_FIELD(LoraMember, scaling), VENEER_FIELD(LoraMember, reserved),
};

// An adapter in one group of one layer.
struct LoraGroup {
    const void* a;  // null: nothing adapted
    int32_t ranks;  // of all members together
    int32_t reserved;
    LoraMember members[kMembers];
};
constexpr Field kLoraGroupFields[] = {
    VENEER_STRUCT(LoraGroup),         VENEER_FIELD(LoraGroup, a),
    VENEER_FIELD(LoraGroup, ranks),   VENEER_FIELD(LoraGroup, reserved),
    VENEER_FIELD(LoraGroup, members),
};

// An adapter: its groups in all layers, [layer][group].
struct LoraAdapter {
    const LoraGroup* groups;
    int32_t is_float;  // else bfloat16
    int32_t reserved;
};
constexpr Field kLoraAdapterFields[] = {
    VENEER_STRUCT(LoraAdapter),
    VENEER_FIELD(LoraAdapter, groups),
    VENEER_FIELD(LoraAdapter, is_float),
    VENEER_FIELD(LoraAdapter, reserved),
};

inline size_t number_bytes(const LoraAdapter& adapter) {
    return adapter.is_float ? sizeof(float) : sizeof(bf16);
}

struct Segment {
    int64_t begin, end;  // rows
    const LoraAdapter* adapter;
};
constexpr Field kSegmentFields[] = {
    VENEER_STRUCT(Segment),
    VENEER_FIELD(Segment, begin),
    VENEER_FIELD(Segment, end),
    VENEER_FIELD(Segment, adapter),
};

constexpr int kRankChunk = 64;  // ranks that one call of `shrink` computes

// The weights of sixteen ranks for two neighbouring inputs.
template <class Number>
struct TwoInputs;

template <>
struct TwoInputs<bf16> {
    Pairs pairs;
    TwoInputs() = default;
    // Load the weights of inputs k and k + 1, from `rank` on.
    TwoInputs(const bf16* a, size_t k, int ranks, int rank)
        : pairs(load_pairs(a + k * size_t(ranks) + 2 * rank)) {}
    TwoInputs(const bf16* a, size_t k, int ranks, int rank, int count)
        : pairs(load_pairs(a + k * size_t(ranks) + 2 * rank, count)) {}
    Floats dot(Floats sums, const bf16* x) const {
        return veneer::dot(sums, pairs, broadcast_pair_shared(x));
    }
};

template <>
struct TwoInputs<float> {
    Floats first, second;
    TwoInputs() = default;
    TwoInputs(const float* a, size_t k, int ranks, int rank)
        : first(load(a + k * size_t(ranks) + rank)),
          second(load(a + (k + 1) * size_t(ranks) + rank)) {}
    TwoInputs(const float* a, size_t k, int ranks, int rank, int count)
        : first(load(a + k * size_t(ranks) + rank, count)),
          second(load(a + (k + 1) * size_t(ranks) + rank, count)) {}
    Floats dot(Floats sums, const bf16* x) const {
        return fma(second, broadcast(to_float(load_number(x + 1))),
                   fma(first, broadcast(to_float(load_number(x))), sums));
    }
};

template <int Rows, int Vectors, class Number>
inline void shrink_rows(const Number* a, int ranks, int first, int width, const bf16* x,
                        size_t x_stride, int inputs, float* h, size_t h_stride) {
    // Several sums per result, so that an FMA need not wait for the previous one. Their number does
    // not depend on the number of rows, so a row's result is bit-identical whatever else is in the
    // batch.
    constexpr int chains = Vectors == 1 ? 4 : 2;
    Floats sums[chains][Rows][Vectors];
    for (auto& chain : sums)
        for (auto& row : chain)
            for (auto& each : row) each = zeros();
    // The last vector may be short: past it is the next input's row, or memory that is not ours.
    const int tail = width - (Vectors - 1) * kLanes;
    for (int k = 0; k < inputs; k += 2 * chains) {  // inputs: a multiple of 64
        for (int c = 0; c < chains; ++c) {
            const bf16* input = x + k + 2 * c;
            TwoInputs<Number> weights[Vectors];
            for (int v = 0; v < Vectors; ++v) {
                const size_t at = size_t(k) + 2 * size_t(c);
                const int rank = first + v * kLanes;
                const bool whole = v + 1 < Vectors || tail == kLanes;
                weights[v] = whole ? TwoInputs<Number>(a, at, ranks, rank)
                                   : TwoInputs<Number>(a, at, ranks, rank, tail);
            }
            for (int r = 0; r < Rows; ++r)
                for (int v = 0; v < Vectors; ++v)
                    sums[c][r][v] = weights[v].dot(sums[c][r][v], input + r * x_stride);
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int v = 0; v < Vectors; ++v) {
            Floats total = sums[0][r][v];
            for (int c = 1; c < chains; ++c) total = add(total, sums[c][r][v]);
            store_shared(h + r * h_stride + v * kLanes, total, v + 1 < Vectors ? kLanes : tail);
        }
    }
}

template <int Most, int Vectors, class Number>
inline void shrink_width(const Number* a, int ranks, int first, int width, const bf16* x,
                         size_t x_stride, int inputs, int rows, float* h, size_t h_stride) {
    if constexpr (Most > 0) {
        int r = 0;
        for (; r + Most <= rows; r += Most)
            shrink_rows<Most, Vectors>(a, ranks, first, width, x + r * x_stride, x_stride, inputs,
                                       h + r * h_stride, h_stride);
        if (r < rows)
            shrink_width<Most - 1, Vectors>(a, ranks, first, width, x + r * x_stride, x_stride,
                                            inputs, rows - r, h + r * h_stride, h_stride);
    }
}

// Add the products for up to 32 ranks on matrix registers, if one of the two vectors of ranks is
// short. Pairs are copied first, since loading a whole register would read beyond A.
inline void shrink_copied(const SquareRegisters& registers, const bf16* a, int ranks, int left,
                          int right, const bf16* x, size_t x_stride, int inputs) {
    // Two copies, used in turn, so that a block's pairs are copied while the previous block is
    // multiplied.
    alignas(64) bf16 pairs[2][2][kMatrixInputs / 2][2 * kLanes];
    int turn = 0;
    for (int k = 0; k < inputs; k += kMatrixInputs, turn ^= 1) {
        auto& block = pairs[turn];
        const bf16* line = a + size_t(k) * ranks;
        for (int pair = 0; pair < kMatrixInputs / 2; ++pair, line += 2 * ranks) {
            store_pairs(block[0][pair], load_pairs(line, left));
            if (right > 0) store_pairs(block[1][pair], load_pairs(line + 2 * left, right));
        }
        if (right > 0)
            registers.add(x + k, x_stride, block[0][0], block[1][0], 2 * kLanes);
        else
            registers.add(x + k, x_stride, block[0][0], 2 * kLanes);
    }
}

// The same as `shrink_width` on matrix registers.
inline void shrink_by_matrix(const bf16* a, int ranks, int first, int width, const bf16* x,
                             size_t x_stride, int inputs, int rows, float* h, size_t h_stride) {
    alignas(64) float sums[kMatrixRows * 2 * kLanes];
    const SquareRegisters registers(rows);
    for (int column = 0; column < width; column += 2 * kLanes) {
        const int left = std::min(kLanes, width - column);
        const int right = std::min(kLanes, width - column - left);
        const bf16* from = a + 2 * (first + column);
        const size_t stride = 2 * size_t(ranks);
        registers.zero();
        if (left < kLanes || (right > 0 && right < kLanes))
            shrink_copied(registers, from, ranks, left, right, x, x_stride, inputs);
        else  // inputs: a multiple of 64
            for (int k = 0; k < inputs; k += kMatrixInputs) {
                const bf16* line = from + size_t(k) * ranks;
                if (right > 0)
                    registers.add(x + k, x_stride, line, line + 2 * kLanes, stride);
                else
                    registers.add(x + k, x_stride, line, stride);
            }
        registers.store(sums);
        for (int r = 0; r < rows; ++r) {
            const float* sum = sums + r * 2 * kLanes;
            float* to = h + r * h_stride + column;
            store_shared(to, load(sum), left);
            store_shared(to + left, load(sum + kLanes), right);
        }
    }
}

// Compute up to 64 columns of h [rows, ranks], from column chunk * 64 on, for at most kMatrixRows
// rows.
template <class Number>
inline void shrink(const LoraGroup& group, int chunk, const bf16* x, size_t x_stride, int inputs,
                   int rows, float* h, size_t h_stride) {
    const int n = chunk * kRankChunk, ranks = group.ranks;
    const int width = std::min(kRankChunk, ranks - n);
    const Number* a = static_cast<const Number*>(group.a);
    h += n;
    if constexpr (matrix::kPresent && sizeof(Number) == sizeof(bf16))
        return shrink_by_matrix(a, ranks, n, width, x, x_stride, inputs, rows, h, h_stride);
    switch ((width + kLanes - 1) / kLanes) {  // each case has 16 to 24 sums
        case 1:
            return shrink_width<4, 1>(a, ranks, n, width, x, x_stride, inputs, rows, h, h_stride);
        case 2:
            return shrink_width<4, 2>(a, ranks, n, width, x, x_stride, inputs, rows, h, h_stride);
        case 3:
            return shrink_width<4, 3>(a, ranks, n, width, x, x_stride, inputs, rows, h, h_stride);
        default:
            return shrink_width<3, 4>(a, ranks, n, width, x, x_stride, inputs, rows, h, h_stride);
    }
}

// Most rows of a row tile. Their updates are computed together, so that B is read and widened once
// for all of them.
constexpr int kRowTile = 4;

// Rows of h [rows, h_stride], and of y [rows, y_stride], to which the updates are added.
struct Expanded {
    const float* h;
    size_t h_stride;
    float* y;
    size_t y_stride;
};

// y[row][n to n + width - 1] += s (h B^T)[the same], repeated while a whole width is left. Returns
// the column where it stopped. Sums run over the ranks in order, whatever the number of rows.
template <int Rows, int Vectors, class Number>
inline int expand_vectors(const LoraMember& member, int outputs, const Number* b,
                          const Expanded& rows, int n, int count) {
    constexpr int width = Vectors * kLanes;
    for (; n + width <= count; n += width) {
        Floats sums[Rows][Vectors];
        for (auto& row : sums)
            for (auto& each : row) each = zeros();
        const Number* line = b + n;
        for (int rank = 0; rank < member.rank; ++rank, line += outputs) {
            Floats weights[Vectors];
            for (int v = 0; v < Vectors; ++v) weights[v] = load(line + v * kLanes);
            for (int r = 0; r < Rows; ++r) {
                const Floats input = broadcast(load_number(rows.h + r * rows.h_stride + rank));
                for (int v = 0; v < Vectors; ++v) sums[r][v] = fma(weights[v], input, sums[r][v]);
            }
        }
        for (int r = 0; r < Rows; ++r) {
            for (int v = 0; v < Vectors; ++v) {
                float* to = rows.y + r * rows.y_stride + n + v * kLanes;
                store(to, fma(sums[r][v], broadcast(member.scaling), load(to)));
            }
        }
    }
    return n;
}

template <int Rows, class Number>
inline void expand_rows(const LoraMember& member, int outputs, const Number* b,
                        const Expanded& rows, int count) {
    int n = expand_vectors<Rows, tiles::expand_vectors(Rows)>(member, outputs, b, rows, 0, count);
    n = expand_vectors<Rows, 4>(member, outputs, b, rows, n, count);
    n = expand_vectors<Rows, 1>(member, outputs, b, rows, n, count);
    if (n == count) return;
    const int width = count - n;
    for (int r = 0; r < Rows; ++r) {
        Floats total = zeros();
        for (int rank = 0; rank < member.rank; ++rank)
            total = fma(load(b + size_t(rank) * outputs + n, width),
                        broadcast(load_number(rows.h + r * rows.h_stride + rank)), total);
        float* to = rows.y + r * rows.y_stride + n;
        store(to, fma(total, broadcast(member.scaling), load(to, width)), width);
    }
}

template <class Number>
inline void expand(const LoraMember& member, int outputs, int first, int count, int row_count,
                   Expanded rows) {
    const Number* b = static_cast<const Number*>(member.b) + first;
    rows.h += member.first;
    switch (row_count) {
        case 1: return expand_rows<1>(member, outputs, b, rows, count);
        case 2: return expand_rows<2>(member, outputs, b, rows, count);
        case 3: return expand_rows<3>(member, outputs, b, rows, count);
        default: return expand_rows<kRowTile>(member, outputs, b, rows, count);
    }
}

// y[row][0 to count - 1] += s (h B^T)[row][first to first + count - 1] for up to kRowTile rows.
inline void expand(const LoraAdapter& adapter, const LoraMember& member, int outputs, int first,
                   int count, int row_count, const Expanded& rows) {
    if (member.b == nullptr) return;
    if (adapter.is_float)
        expand<float>(member, outputs, first, count, row_count, rows);
    else
        expand<bf16>(member, outputs, first, count, row_count, rows);
}

}  // namespace veneer
