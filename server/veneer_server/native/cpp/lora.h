// Low-rank updates of the rows that have an adapter: h = x A^T, then y += s h B^T.
//
// Rows of one adapter are neighbours (a segment). Its matrices lie transposed, as the registry's
// loaders lay them out (lora/layout.py): A^T [inputs, ranks of a group side by side] and, of each
// projection, B^T [rank, outputs]; in bfloat16 or float, any rank. Sums are float, and so are x
// and h: as PEFT computes.
#pragma once

#include <algorithm>

#include "simd.h"

namespace veneer {

constexpr int kMembers = 3;  // projections that share an input: q, k, v

// One adapted projection; as it is handed over the C interface.
struct LoraMember {
    const void* b;  // null: not adapted
    int32_t rank;
    int32_t first;  // its column of h
    float scaling;
    int32_t reserved;
};

// An adapter in one group of one layer.
struct LoraGroup {
    const void* a;  // null: nothing adapted
    int32_t ranks;  // all members' together
    int32_t reserved;
    LoraMember members[kMembers];
};

// An adapter: its groups of all layers, [layer][group].
struct LoraAdapter {
    const LoraGroup* groups;
    int32_t is_float;  // else bfloat16
    int32_t reserved;
};

struct Segment {
    int64_t begin, end;  // rows
    const LoraAdapter* adapter;
};

constexpr int kRankChunk = 64;  // ranks that one call of `shrink` computes

template <int Rows, int Vectors, class Number>
inline void shrink_rows(const Number* a, int ranks, int width, const float* x, size_t x_stride,
                        int inputs, float* h, size_t h_stride) {
    // Several sums each, so that one need not wait for the last; not by the number of rows: a
    // row's result must not depend on its company.
    constexpr int chains = Vectors <= 2 ? 4 : 2;
    Floats sums[chains][Rows][Vectors];
    for (auto& chain : sums)
        for (auto& row : chain)
            for (auto& each : row) each = zeros();
    const int tail = width - (Vectors - 1) * kLanes;
    auto add_input = [&](int k, int chain) {
        const Number* line = a + size_t(k) * ranks;
        Floats weights[Vectors];
        for (int v = 0; v + 1 < Vectors; ++v) weights[v] = load(line + v * kLanes);
        // The last vector may be short; past it lies the next line, or what is not ours.
        weights[Vectors - 1] = tail == kLanes ? load(line + (Vectors - 1) * kLanes)
                                              : load(line + (Vectors - 1) * kLanes, tail);
        for (int r = 0; r < Rows; ++r) {
            const Floats input = all(x[r * x_stride + k]);
            for (int v = 0; v < Vectors; ++v)
                sums[chain][r][v] = fma(weights[v], input, sums[chain][r][v]);
        }
    };
    int k = 0;
    for (; k + chains <= inputs; k += chains)
        for (int c = 0; c < chains; ++c) add_input(k + c, c);
    for (; k < inputs; ++k) add_input(k, 0);
    for (int r = 0; r < Rows; ++r) {
        for (int v = 0; v < Vectors; ++v) {
            Floats total = sums[0][r][v];
            for (int c = 1; c < chains; ++c) total = add(total, sums[c][r][v]);
            store(h + r * h_stride + v * kLanes, total, v + 1 < Vectors ? kLanes : tail);
        }
    }
}

template <int Vectors, class Number>
inline void shrink_width(const Number* a, int ranks, int width, const float* x, size_t x_stride,
                         int inputs, int rows, float* h, size_t h_stride) {
    constexpr int most = Vectors == 1 || Vectors == 3 ? 4 : 3;  // 16 to 24 sums
    int r = 0;
    for (; r + most <= rows; r += most)
        shrink_rows<most, Vectors>(a, ranks, width, x + r * x_stride, x_stride, inputs,
                                   h + r * h_stride, h_stride);
    for (; r < rows; ++r)
        shrink_rows<1, Vectors>(a, ranks, width, x + r * x_stride, x_stride, inputs,
                                h + r * h_stride, h_stride);
}

// Columns chunk * 64 and up to 63 more of h [rows, ranks].
template <class Number>
inline void shrink(const LoraGroup& group, int chunk, const float* x, size_t x_stride, int inputs,
                   int rows, float* h, size_t h_stride) {
    const int first = chunk * kRankChunk;
    const int width = std::min(kRankChunk, group.ranks - first);
    const Number* a = static_cast<const Number*>(group.a) + first;
    h += first;
    switch ((width + kLanes - 1) / kLanes) {
        case 1: return shrink_width<1>(a, group.ranks, width, x, x_stride, inputs, rows, h, h_stride);
        case 2: return shrink_width<2>(a, group.ranks, width, x, x_stride, inputs, rows, h, h_stride);
        case 3: return shrink_width<3>(a, group.ranks, width, x, x_stride, inputs, rows, h, h_stride);
        default:
            return shrink_width<4>(a, group.ranks, width, x, x_stride, inputs, rows, h, h_stride);
    }
}

// y[0 to count - 1] += s (h B^T)[first to first + count - 1] for one row.
template <int Vectors, class Number>
inline int expand_vectors(const LoraMember& member, int outputs, const Number* b,
                          const float* shrunk, int n, int count, float* y) {
    constexpr int width = Vectors * kLanes;
    for (; n + width <= count; n += width) {
        Floats sums[Vectors];
        for (auto& each : sums) each = zeros();
        const Number* line = b + n;
        for (int r = 0; r < member.rank; ++r, line += outputs) {
            // Lines of B are far apart: ask for one that comes soon.
            for (int v = 0; v < Vectors; v += 64 / int(kLanes * sizeof(Number)))
                prefetch(line + 4 * size_t(outputs) + v * kLanes);
            const Floats input = all(shrunk[r]);
            for (int v = 0; v < Vectors; ++v) sums[v] = fma(load(line + v * kLanes), input, sums[v]);
        }
        for (int v = 0; v < Vectors; ++v) {
            float* to = y + n + v * kLanes;
            store(to, fma(sums[v], all(member.scaling), load(to)));
        }
    }
    return n;
}

template <class Number>
inline void expand_row(const LoraMember& member, int outputs, const float* h, int first, int count,
                       float* y) {
    const Number* b = static_cast<const Number*>(member.b) + first;
    const float* shrunk = h + member.first;
    int n = expand_vectors<12>(member, outputs, b, shrunk, 0, count, y);
    n = expand_vectors<4>(member, outputs, b, shrunk, n, count, y);
    n = expand_vectors<1>(member, outputs, b, shrunk, n, count, y);
    if (n == count) return;
    const int width = count - n;
    Floats total = zeros();
    for (int r = 0; r < member.rank; ++r)
        total = fma(load(b + size_t(r) * outputs + n, width), all(shrunk[r]), total);
    store(y + n, fma(total, all(member.scaling), load(y + n, width)), width);
}

inline void expand_row(const LoraAdapter& adapter, const LoraMember& member, int outputs,
                       const float* h, int first, int count, float* y) {
    if (member.b == nullptr) return;
    if (adapter.is_float)
        expand_row<float>(member, outputs, h, first, count, y);
    else
        expand_row<bf16>(member, outputs, h, first, count, y);
}

}  // namespace veneer
