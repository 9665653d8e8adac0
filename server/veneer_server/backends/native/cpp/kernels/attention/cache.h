// The data that attention reads and writes: the KV cache's layout, queries, and results of pieces.
//
// A KV block is cut into runs of 16 tokens. In a run of a key head, K lies as pairs of dimensions,
// each for 16 tokens [dim / 2][16][2]: a lane is a token, and a score needs no sum across lanes. V
// lies as pairs of tokens, each for all dimensions [8][dim][2]. Both are bfloat16.
#pragma once

#include <algorithm>
#include <limits>

#include "../shared.h"
#include "../simd.h"

namespace veneer {

constexpr int kRun = 16;  // tokens
constexpr int kMaxQueries = 12;
constexpr int kPiece = 512;  // tokens

constexpr int pieces(int64_t tokens) { return int((tokens + kPiece - 1) / kPiece); }

struct KvShape {
    int32_t kv_heads, dim, block_size;  // block_size: a multiple of 16

    size_t run_numbers() const { return size_t(kRun) * dim; }
    // Where a head's run that has a token's slot begins.
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

// Prefetch the memory to which a token's key and value will be written. The key has a cache line
// for each pair of dimensions.
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

// A query, [dim] bfloat16, that sees the tokens first to end - 1.
struct Query {
    const bf16* query;
    int first, end;
};

// A query's result for one piece: `numbers` floats.
struct Piece {
    float* at;

    static size_t numbers(int dim) { return size_t(dim) + kLanes; }
    float top() const { return load_number(at); }        // the largest score
    float total() const { return load_number(at + 1); }  // sum of e^(score - top); 0: no token seen
    float* out() const { return at + kLanes; }           // [dim] sum of e^(score - top) V

    void set(float top, float total) const { store_number(at, top), store_number(at + 1, total); }
};

// Compute the softmax weights, not yet divided by their sum, of one query's scores, as bfloat16.
// The largest score and the sum of the weights go to `piece`. Scores of unseen tokens are
// overwritten.
inline void softmax(const Query& query, int first_run, int end_run, float* scores, bf16* weights,
                    const Piece& piece) {
    const float none = -std::numeric_limits<float>::infinity();
    const int begin = first_run * kRun, count = (end_run - first_run) * kRun;
    const int unseen = std::max(query.first - begin, 0);  // number of unseen tokens at the start
    const int seen = std::min(query.end - begin, count);  // end of the seen tokens
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
        // `exp` clamps the -inf of unseen scores to -87, so their weights are set to 0 below.
        store_bf16(weights + t, exp(sub(load(scores + t), top)));
        total = add(total, load(weights + t));
    }
    std::fill(weights, weights + unseen, bf16(0));
    std::fill(weights + seen, weights + count, bf16(0));
    piece.set(largest(most), sum(total));
}

}  // namespace veneer
