// Paged attention with grouped queries (GQA), for one key head and up to 12 queries of one
// sequence.
//
// A context is cut into pieces of 512 tokens, always at the same places, as in flash-decoding. Any
// thread may compute any piece, so all threads can share one long context. The pieces are merged in
// order, so a query's result does not depend on which threads computed it.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "by_matrix.h"
#include "by_vectors.h"
#include "few_queries.h"

namespace veneer {

// Floats of scratch that `attend` takes: scores, weights, and the queries side by side. A few
// queries may be stored as floats: they fit, since there is room for kMaxQueries.
constexpr size_t attention_scratch(int dim) {
    return size_t(kMaxQueries) * size_t(kPiece + kPiece / 2 + dim / 2);
}

template <int Queries>
inline void attend(const Sequence& sequence, const KvShape& shape, const Query* queries, int number,
                   float scale, float* scratch, const Piece* to) {
    int first = queries[0].first, end = queries[0].end;
    for (int q = 1; q < Queries; ++q) {
        first = std::min(first, queries[q].first);
        end = std::max(end, queries[q].end);
    }
    first = std::max(first, number * kPiece), end = std::min(end, (number + 1) * kPiece);
    if (first >= end) {
        for (int q = 0; q < Queries; ++q) to[q].set(0, 0);
        return;
    }
    const int first_run = first / kRun, end_run = (end + kRun - 1) / kRun;
    const size_t stride = size_t(end_run - first_run) * kRun;
    bf16* weights = reinterpret_cast<bf16*>(scratch + Queries * stride);
    const auto to_weights = [&] {
        for (int q = 0; q < Queries; ++q)
            softmax(queries[q], first_run, end_run, scratch + q * stride, weights + q * stride,
                    to[q]);
    };
#ifdef VENEER_MATRIX
    // A register holds 32 numbers of a query. With a head dimension that is not a multiple of 32,
    // everything is done on vectors.
    if (shape.dim % (2 * matrix::kRows) == 0) {
        const auto scale_to_weights = [&] {
            for (size_t i = 0; i < Queries * stride; i += kLanes)
                store(scratch + i, mul(load(scratch + i), broadcast(scale)));
            to_weights();
        };
        bf16* inputs = weights + Queries * stride;  // the queries side by side
        if constexpr (Queries <= kFewQueries) {
            float* widened = reinterpret_cast<float*>(inputs);
            for (int q = 0; q < Queries; ++q)
                for (int d = 0; d < shape.dim; d += kLanes)
                    store(widened + q * shape.dim + d, load_shared(queries[q].query + d));
            score_few<Queries>(sequence, shape, widened, first_run, end_run, scratch, stride);
            scale_to_weights();
            for (size_t i = 0; i < Queries * stride; i += kLanes)
                store(scratch + i, load(weights + i));
            combine_few<Queries>(sequence, shape, first_run, end_run, scratch, stride, to);
        } else {
            const AttentionRegisters registers(Queries);
            for (int q = 0; q < Queries; ++q)
                load_numbers(inputs + q * shape.dim, queries[q].query, shape.dim);
            registers.score(sequence, shape, inputs, first_run, end_run, scratch, stride);
            scale_to_weights();
            registers.combine(sequence, shape, first_run, end_run, weights, stride, to);
        }
        return;
    }
#endif
    score<Queries>(sequence, shape, queries, first_run, end_run, scale, scratch, stride);
    to_weights();
    combine<Queries>(sequence, shape, first_run, end_run, weights, stride, to);
}

// Attend to one piece, with up to 12 queries of one sequence. Results go to to[query].
inline void attend(const Sequence& sequence, const KvShape& shape, const Query* queries, int count,
                   int number, float scale, float* scratch, const Piece* to) {
    switch (count) {
#define VENEER_QUERIES(n) \
    case n: return attend<n>(sequence, shape, queries, number, scale, scratch, to);
        // clang-format off
        VENEER_QUERIES(1) VENEER_QUERIES(2) VENEER_QUERIES(3) VENEER_QUERIES(4)
        VENEER_QUERIES(5) VENEER_QUERIES(6) VENEER_QUERIES(7) VENEER_QUERIES(8)
        VENEER_QUERIES(9) VENEER_QUERIES(10) VENEER_QUERIES(11) VENEER_QUERIES(12)
        // clang-format on
#undef VENEER_QUERIES
    }
}

// Merge the results of a query's pieces, which are `stride` floats apart. `shares` [count] is
// scratch memory of the calling thread.
inline void merge(const KvShape& shape, float* first, int count, size_t stride, float* shares,
                  bf16* out) {
    float top = -std::numeric_limits<float>::infinity(), total = 0;
    for (int i = 0; i < count; ++i) {
        const Piece piece{first + i * stride};
        // A NaN score makes the result NaN.
        if (piece.total() != 0 && !(piece.top() <= top)) top = piece.top();
    }
    for (int i = 0; i < count; ++i) {
        const Piece piece{first + i * stride};
        if (piece.total() == 0) continue;
        shares[i] = std::exp(piece.top() - top);  // e^(its maximum - maximum of all pieces)
        total += shares[i] * piece.total();
    }
    for (int d = 0; d < shape.dim; d += kLanes) {
        Floats sum = zeros();
        for (int i = 0; i < count; ++i) {
            const Piece piece{first + i * stride};
            if (piece.total() != 0)
                sum = fma(load_shared(piece.out() + d), broadcast(shares[i]), sum);
        }
        store_shared(out + d, mul(sum, broadcast(1.0f / total)));
    }
}

}  // namespace veneer
