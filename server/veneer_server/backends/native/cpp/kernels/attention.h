// Paged attention with grouped queries (GQA), for one key head and up to 12 queries of one
// sequence.
//
// A KV block is cut into runs of 16 tokens. In a run of a key head, K lies as pairs of dimensions,
// each for 16 tokens [dim / 2][16][2]: a lane is a token, and a score needs no sum across lanes. V
// lies as pairs of tokens, each for all dimensions [8][dim][2]. Both are bfloat16.
//
// A context is cut into pieces of 512 tokens, always at the same places, as flash-decoding does.
// Any thread may compute any piece, and the pieces are merged in order: a query's result does not
// depend on which threads computed it, and all threads can share one long context.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "shared.h"
#include "simd.h"

namespace veneer {

constexpr int kRun = 16;  // tokens
constexpr int kMaxQueries = 12;
constexpr int kPiece = 512;  // tokens

constexpr int pieces(int64_t tokens) { return int((tokens + kPiece - 1) / kPiece); }

struct KvShape {
    int32_t kv_heads, dim, block_size;  // block_size: a multiple of 16

    size_t run_numbers() const { return size_t(kRun) * dim; }
    // Where the run of a token's slot and a head begins.
    size_t run(int64_t slot, int head) const {
        const int64_t block = slot / block_size;
        const int64_t within = slot % block_size / kRun;
        return ((block * kv_heads + head) * (block_size / kRun) + within) * run_numbers();
    }
};

inline void write_key(bf16* keys, const KvShape& shape, int64_t slot, int head, const float* key) {
    bf16* to = keys + shape.run(slot, head) + slot % kRun * 2;
    for (int d = 0; d < shape.dim; ++d)
        store_number(to + d / 2 * 2 * kRun + d % 2, to_bf16(key[d]));
}

inline void write_value(bf16* values, const KvShape& shape, int64_t slot, int head,
                        const float* value) {
    const int64_t token = slot % kRun;
    bf16* to = values + shape.run(slot, head) + token / 2 * 2 * shape.dim + token % 2;
    for (int d = 0; d < shape.dim; ++d) store_number(to + 2 * d, to_bf16(value[d]));
}

// Prefetch what a token's key and value will be written to: a cache line for each pair of
// dimensions.
inline void prefetch_slot(const bf16* keys, const bf16* values, const KvShape& shape, int64_t slot,
                          int head) {
    const size_t run = shape.run(slot, head);
    const bf16* key = keys + run + slot % kRun * 2;
    const bf16* value = values + run + slot % kRun / 2 * 2 * shape.dim;
    for (int pair = 0; pair < shape.dim / 2; ++pair) __builtin_prefetch(key + pair * 2 * kRun, 1);
    for (int d = 0; d < 2 * shape.dim; d += 32) __builtin_prefetch(value + d, 1);
}

// One sequence's view of a layer's cache.
struct Sequence {
    const bf16* keys;
    const bf16* values;
    const int64_t* blocks;
    int head;

    size_t run(const KvShape& shape, int number) const {
        const int runs = shape.block_size / kRun;
        return ((blocks[number / runs] * shape.kv_heads + head) * runs + number % runs) *
               shape.run_numbers();
    }
};

// query: [dim] bfloat16; tokens first to end - 1 are seen.
struct Query {
    const bf16* query;
    int first, end;
};

// Scores of the runs [first_run, end_run): scores[query][(run - first_run) * 16 + token].
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
                // K, and V for later.
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

// A query's result for one piece: `numbers` floats.
struct Piece {
    float* at;

    static size_t numbers(int dim) { return size_t(dim) + kLanes; }
    float top() const { return load_number(at); }        // the largest score
    float total() const { return load_number(at + 1); }  // sum of e^(score - top); 0: no token seen
    float* out() const { return at + kLanes; }           // [dim] sum of e^(score - top) V

    void set(float top, float total) const { store_number(at, top), store_number(at + 1, total); }
};

// Softmax of one query's scores, in place, and as bfloat16 weights; their maximum and sum go to
// `piece`.
inline void softmax(const Query& query, int first_run, int end_run, float* scores, bf16* weights,
                    const Piece& piece) {
    const float none = -std::numeric_limits<float>::infinity();
    const int begin = first_run * kRun, count = (end_run - first_run) * kRun;
    const int unseen = std::max(query.first - begin, 0);  // before the first, ...
    const int seen = std::min(query.end - begin, count);  // ... and past the last
    if (seen <= unseen) {
        std::fill(weights, weights + count, bf16(0));
        piece.set(none, 0);
        return;
    }
    std::fill(scores, scores + unseen, none);
    std::fill(scores + seen, scores + count, none);
    Floats most = load(scores);
    for (int t = kRun; t < count; t += kRun) most = max(most, load(scores + t));
    const Floats top = broadcast(largest(most));
    Floats total = zeros();
    for (int t = 0; t < count; t += kRun) {
        // The mask made unseen scores -inf, which `exp` takes as -87: their weights are set to 0
        // below.
        store_bf16(weights + t, exp(sub(load(scores + t), top)));
        total = add(total, load(weights + t));
    }
    std::fill(weights, weights + unseen, bf16(0));
    std::fill(weights + seen, weights + count, bf16(0));
    piece.set(largest(most), sum(total));
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

// Floats of scratch that `attend` takes.
constexpr size_t kAttentionScratch = kMaxQueries * (kPiece + kPiece / 2);

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
    score<Queries>(sequence, shape, queries, first_run, end_run, scale, scratch, stride);
    for (int q = 0; q < Queries; ++q)
        softmax(queries[q], first_run, end_run, scratch + q * stride, weights + q * stride, to[q]);
    combine<Queries>(sequence, shape, first_run, end_run, weights, stride, to);
}

// Attend to one piece, for up to 12 queries of one sequence: results go to to[query].
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

// Merge a query's pieces, which lie `stride` floats apart. `shares`: [count], the caller's own
// scratch.
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
        shares[i] = std::exp(piece.top() - top);  // e^(its maximum - that of all pieces)
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
