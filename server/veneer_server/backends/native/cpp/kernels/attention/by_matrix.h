// Attention's two matrix multiplies on matrix registers.
#pragma once

#include <type_traits>

#include "cache.h"

namespace veneer {

// The registers for both multiplies: a run's K is the B operand of the scores, its V the B operand
// of the weighted sum. Registers 0 and 1: sums; 2: queries; 3: weights; 4 and 5: K; 6 and 7: V.
// They are set up once for both, since setting up takes longer than loading all of them.
class AttentionRegisters {
  public:
    explicit AttentionRegisters(int queries) : queries_(queries) {
        matrix::set_up(shapes(queries).all);
    }

    // Multiply the queries [queries][dim] by the runs' keys. The products, not scaled yet, go to
    // scores[query * stride + (run - first_run) * 16 + token].
    void score(const Sequence& sequence, const KvShape& shape, const bf16* queries, int first_run,
               int end_run, float* scores, size_t stride) const {
        for (int run = first_run; run < end_run; run += 2, scores += 2 * kRun) {
            if (run + 1 < end_run)
                score_runs<2>(sequence, shape, queries, run, scores, stride);
            else
                score_runs<1>(sequence, shape, queries, run, scores, stride);
        }
    }

    void combine(const Sequence& sequence, const KvShape& shape, int first_run, int end_run,
                 const bf16* weights, size_t stride, const Piece* to) const {
        for (int d = 0; d < shape.dim; d += 2 * kLanes)
            combine_part(sequence, shape, first_run, end_run, weights, stride, d, to);
    }

  private:
    struct Shapes {
        matrix::Shape all[matrix::kRegisters];
    };
    static Shapes shapes(int queries) {
        const matrix::Shape sums{queries}, weights{queries, kRun * int(sizeof(bf16))};
        const matrix::Shape keys{matrix::kRows}, values{kRun / 2};
        return {{sums, sums, sums, weights, keys, keys, values, values}};
    }

    template <int Runs>
    void score_runs(const Sequence& sequence, const KvShape& shape, const bf16* queries, int run,
                    float* scores, size_t stride) const {
        const bf16* keys[Runs];
        for (int i = 0; i < Runs; ++i) {
            keys[i] = sequence.keys + sequence.run(shape, run + i);
            const bf16* values = sequence.values + sequence.run(shape, run + i);
            for (size_t line = 0; line < shape.run_numbers(); line += 2 * kRun)
                prefetch(values + line);  // for `combine`
        }
        each_register<Runs>([](auto i) { matrix::zero<i>(); });
        for (int d = 0; d < shape.dim; d += 2 * matrix::kRows) {
            matrix::load<2>(queries + d, size_t(shape.dim) * sizeof(bf16));
            each_register<Runs>(
                [&](auto i) { matrix::load<4 + i>(keys[i] + d * kRun, 2 * kRun * sizeof(bf16)); });
            each_register<Runs>([](auto i) { matrix::dot<i, 2, 4 + i>(); });
        }
        each_register<Runs>(
            [&](auto i) { matrix::store<i>(scores + i * kRun, stride * sizeof(float)); });
    }

    // Compute 32 dimensions of the weighted sum of V.
    void combine_part(const Sequence& sequence, const KvShape& shape, int first_run, int end_run,
                      const bf16* weights, size_t stride, int d, const Piece* to) const {
        constexpr int vectors = 2;
        each_register<vectors>([](auto i) { matrix::zero<i>(); });
        for (int run = first_run; run < end_run; ++run) {
            const bf16* values = sequence.values + sequence.run(shape, run) + 2 * d;
            matrix::load<3>(weights + size_t(run - first_run) * kRun, stride * sizeof(bf16));
            each_register<vectors>([&](auto i) {
                matrix::load<6 + i>(values + i * 2 * kLanes, 2 * size_t(shape.dim) * sizeof(bf16));
            });
            each_register<vectors>([](auto i) { matrix::dot<i, 3, 6 + i>(); });
        }
        alignas(64) float sums[kMaxQueries][vectors][kLanes];
        each_register<vectors>([&](auto i) { matrix::store<i>(sums[0][i], sizeof sums[0]); });
        for (int q = 0; q < queries_; ++q)
            for (int v = 0; v < vectors; ++v)
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
};

}  // namespace veneer
