// Attention's two matrix multiplies on vectors.
#pragma once

#include "cache.h"

namespace veneer {

// Compute the scores of the runs [first_run, end_run):
// scores[query * stride + (run - first_run) * 16 + token].
template <int Queries>
inline void score(const Sequence& sequence, const KvShape& shape, const Query* queries,
                  int first_run, int end_run, float scale, float* scores, size_t stride) {
    for (int run = first_run; run < end_run; ++run) {
        const size_t at = sequence.run(shape, run);
        const bf16* keys = sequence.keys + at;
        const bf16* values = sequence.values + at;
        const int next = run + 1 < end_run ? run + 1 : run;
        const bf16* next_keys = sequence.keys + sequence.run(shape, next);
        Floats sums[2][Queries];
        for (auto& chain : sums)
            for (auto& each : chain) each = zeros();
        for (int pair = 0; pair < shape.dim / 2; pair += 2) {
            for (int c = 0; c < 2; ++c) {
                const size_t line = size_t(pair + c) * 2 * kRun;
                // The KV cache of many sequences does not fit the CPU's caches: prefetch the next
                // run's K, and this run's V, which `combine` reads.
                prefetch(next_keys + line);
                prefetch(values + line);
                const Pairs key = load_pairs_shared(keys + line);
                for (int q = 0; q < Queries; ++q)
                    sums[c][q] = dot(sums[c][q], key,
                                     broadcast_pair_shared(queries[q].query + 2 * (pair + c)));
            }
        }
        for (int q = 0; q < Queries; ++q)
            store(scores + q * stride + size_t(run - first_run) * kRun,
                  mul(add(sums[0][q], sums[1][q]), broadcast(scale)));
    }
}

template <int Queries>
inline void combine(const Sequence& sequence, const KvShape& shape, int first_run, int end_run,
                    const bf16* weights, size_t stride, const Piece* to) {
    for (int d = 0; d < shape.dim; d += kLanes) {
        Floats sums[Queries];
        for (auto& each : sums) each = zeros();
        for (int run = first_run; run < end_run; ++run) {
            const bf16* values = sequence.values + sequence.run(shape, run) + 2 * d;
            const bf16* here = weights + size_t(run - first_run) * kRun;
            for (int pair = 0; pair < kRun / 2; ++pair) {
                const Pairs value = load_pairs_shared(values + size_t(pair) * 2 * shape.dim);
                for (int q = 0; q < Queries; ++q)
                    sums[q] = dot(sums[q], value, broadcast_pair(here + q * stride + 2 * pair));
            }
        }
        for (int q = 0; q < Queries; ++q) store_shared(to[q].out() + d, sums[q]);
    }
}

}  // namespace veneer
