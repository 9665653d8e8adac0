// Attention's two products on matrix registers.
#pragma once

#include <type_traits>

#include "cache.h"

namespace veneer {

// Both products on matrix registers: a run's K lies there as B of the scores' product, its V as B
// of the weighted sum's. Registers 0 to 3: sums; 4: queries; 5: weights; 6: K; 7: V.
class AttentionRegisters {
  public:
    explicit AttentionRegisters(int queries) : queries_(queries), registers_(shapes(queries).all) {}

    // Products of the queries [queries][dim] with the runs' keys: to
    // scores[query * stride + (run - first_run) * 16 + token], not scaled yet.
    void score(const Sequence& sequence, const KvShape& shape, const bf16* queries, int first_run,
               int end_run, float* scores, size_t stride) const {
        for (int run = first_run; run < end_run; run += 4, scores += 4 * kRun) {
            switch (end_run - run) {
                case 1: score_runs<1>(sequence, shape, queries, run, scores, stride); break;
                case 2: score_runs<2>(sequence, shape, queries, run, scores, stride); break;
                case 3: score_runs<3>(sequence, shape, queries, run, scores, stride); break;
                default: score_runs<4>(sequence, shape, queries, run, scores, stride);
            }
        }
    }

    void combine(const Sequence& sequence, const KvShape& shape, int first_run, int end_run,
                 const bf16* weights, size_t stride, const Piece* to) const {
        for (int d = 0; d < shape.dim; d += 4 * kLanes) {
            if (shape.dim - d < 4 * kLanes)  // of 32 dimensions
                combine_part<2>(sequence, shape, first_run, end_run, weights, stride, d, to);
            else
                combine_part<4>(sequence, shape, first_run, end_run, weights, stride, d, to);
        }
    }

  private:
    struct Shapes {
        matrix::Shape all[matrix::kRegisters];
    };
    static Shapes shapes(int queries) {
        const matrix::Shape sums{queries};
        return {{sums,
                 sums,
                 sums,
                 sums,
                 sums,
                 {queries, kRun * int(sizeof(bf16))},
                 {matrix::kRows},
                 {kRun / 2}}};
    }

    template <int Runs>
    void score_runs(const Sequence& sequence, const KvShape& shape, const bf16* queries, int run,
                    float* scores, size_t stride) const {
        const bf16* keys[Runs];
        for (int i = 0; i < Runs; ++i) {
            keys[i] = sequence.keys + sequence.run(shape, run + i);
            const bf16* values = sequence.values + sequence.run(shape, run + i);
            for (size_t line = 0; line < shape.run_numbers(); line += 2 * kRun)
                prefetch(values + line);  // for later
        }
        each_register<Runs>([](auto i) { matrix::zero<i>(); });
        for (int d = 0; d < shape.dim; d += 2 * matrix::kRows) {
            matrix::load<4>(queries + d, size_t(shape.dim) * sizeof(bf16));
            each_register<Runs>([&](auto i) {
                matrix::load<6>(keys[i] + d * kRun, 2 * kRun * sizeof(bf16));
                matrix::dot<i, 4, 6>();
            });
        }
        each_register<Runs>(
            [&](auto i) { matrix::store<i>(scores + i * kRun, stride * sizeof(float)); });
    }

    template <int Vectors>
    void combine_part(const Sequence& sequence, const KvShape& shape, int first_run, int end_run,
                      const bf16* weights, size_t stride, int d, const Piece* to) const {
        each_register<Vectors>([](auto i) { matrix::zero<i>(); });
        for (int run = first_run; run < end_run; ++run) {
            const bf16* values = sequence.values + sequence.run(shape, run) + 2 * d;
            matrix::load<5>(weights + size_t(run - first_run) * kRun, stride * sizeof(bf16));
            each_register<Vectors>([&](auto i) {
                matrix::load<7>(values + i * 2 * kLanes, 2 * size_t(shape.dim) * sizeof(bf16));
                matrix::dot<i, 5, 7>();
            });
        }
        alignas(64) float sums[kMaxQueries][Vectors][kLanes];
        each_register<Vectors>([&](auto i) { matrix::store<i>(sums[0][i], sizeof sums[0]); });
        for (int q = 0; q < queries_; ++q)
            for (int v = 0; v < Vectors; ++v)
                store_shared(to[q].out() + d + v * kLanes, load(sums[q][v]));
    }

    // Call `function` with the constants 0 to Count - 1.
    template <int Count, class Function>
    static void each_register(const Function& function) {
        if constexpr (Count > 0) {
            each_register<Count - 1>(function);
            function(std::integral_constant<int, Count - 1>());
        }
    }

    int queries_;
    matrix::Registers registers_;
};

}  // namespace veneer
