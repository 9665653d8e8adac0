// Attention's two matrix multiplies for a few queries, on vectors, for CPUs with matrix registers.
//
// Loading a run's K or V into matrix registers takes longer than multiplying it by the few queries
// of a decoding row. So few queries are multiplied on vectors, with the same additions in the same
// order as in the registers (see the software model): a query's bits are the same with any number
// of queries.
#pragma once

#include "cache.h"

#ifdef VENEER_MATRIX

namespace veneer {

constexpr int kFewQueries = 4;

// The sums of the products of pairs: first and second numbers are summed separately.
struct PairSums {
    Floats first = zeros(), second = zeros();

    void add(Floats firsts, Floats seconds, const float* pair) {
        first = fma(firsts, broadcast(pair[0]), first);
        second = fma(seconds, broadcast(pair[1]), second);
    }
    Floats added_to(Floats total) const { return veneer::add(total, veneer::add(first, second)); }
};

// Compute the scores of Runs runs from `run` on. `queries` is [Queries][dim].
template <int Queries, int Runs>
inline void score_few_runs(const Sequence& sequence, const KvShape& shape, const float* queries,
                           int run, int end_run, float* scores, size_t stride) {
    const bf16 *keys[Runs], *values[Runs], *next[Runs];
    for (int r = 0; r < Runs; ++r) {
        const size_t at = sequence.run(shape, run + r);
        keys[r] = sequence.keys + at, values[r] = sequence.values + at;
        next[r] = sequence.keys + sequence.run(shape, std::min(run + Runs + r, end_run - 1));
    }
    Floats totals[Runs][Queries];
    for (auto& row : totals)
        for (auto& each : row) each = zeros();
    for (int d = 0; d < shape.dim; d += 2 * kRun) {
        PairSums sums[Runs][Queries];
        for (int i = d; i < d + 2 * kRun; i += 2) {
            const size_t line = size_t(i) * kRun;
            for (int r = 0; r < Runs; ++r) {
                // Prefetch as `score` does.
                prefetch(next[r] + line), prefetch(values[r] + line);
                const Pairs key = load_pairs_shared(keys[r] + line);
                const Floats first = firsts(key), second = seconds(key);
                for (int q = 0; q < Queries; ++q)
                    sums[r][q].add(first, second, queries + q * shape.dim + i);
            }
        }
        for (int r = 0; r < Runs; ++r)
            for (int q = 0; q < Queries; ++q) totals[r][q] = sums[r][q].added_to(totals[r][q]);
    }
    for (int r = 0; r < Runs; ++r)
        for (int q = 0; q < Queries; ++q) store(scores + q * stride + r * kRun, totals[r][q]);
}

template <int Queries>
inline void score_few(const Sequence& sequence, const KvShape& shape, const float* queries,
                      int first_run, int end_run, float* scores, size_t stride) {
    const FlushDenormals flush;
    int run = first_run;
    for (; run + 2 <= end_run; run += 2, scores += 2 * kRun)
        score_few_runs<Queries, 2>(sequence, shape, queries, run, end_run, scores, stride);
    if (run < end_run)
        score_few_runs<Queries, 1>(sequence, shape, queries, run, end_run, scores, stride);
}

template <int Queries>
inline void combine_few(const Sequence& sequence, const KvShape& shape, int first_run, int end_run,
                        const float* weights, size_t stride, const Piece* to) {
    const FlushDenormals flush;
    constexpr int vectors = 2;
    for (int d = 0; d < shape.dim; d += vectors * kLanes) {
        Floats totals[Queries][vectors];
        for (auto& row : totals)
            for (auto& each : row) each = zeros();
        for (int run = first_run; run < end_run; ++run) {
            const bf16* values = sequence.values + sequence.run(shape, run) + 2 * d;
            const float* here = weights + size_t(run - first_run) * kRun;
            PairSums sums[Queries][vectors];
            for (int pair = 0; pair < kRun / 2; ++pair, values += 2 * shape.dim) {
                for (int v = 0; v < vectors; ++v) {
                    const Pairs value = load_pairs_shared(values + v * 2 * kLanes);
                    const Floats first = firsts(value), second = seconds(value);
                    for (int q = 0; q < Queries; ++q)
                        sums[q][v].add(first, second, here + q * stride + 2 * pair);
                }
            }
            for (int q = 0; q < Queries; ++q)
                for (int v = 0; v < vectors; ++v) totals[q][v] = sums[q][v].added_to(totals[q][v]);
        }
        for (int q = 0; q < Queries; ++q)
            for (int v = 0; v < vectors; ++v)
                store_shared(to[q].out() + d + v * kLanes, totals[q][v]);
    }
}

}  // namespace veneer

#endif
