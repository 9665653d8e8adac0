// The structs of the C interface: plain pointers and numbers, owned by the caller.
#pragma once

#include "kernels/attention.h"
#include "kernels/linear.h"
#include "kernels/lora.h"

namespace veneer {

constexpr int kGroups = 4;  // projections with one input: q, k, v; o; gate, up; down
enum Group { kQkv, kOutput, kGateUp, kDown };

struct Layer {
    Linear linears[kGroups];
    const float* input_norm;  // [hidden]
    const float* post_norm;   // [hidden]
    const float* query_norm;  // [dim], or null
    const float* key_norm;    // [dim], or null
    bf16* keys;               // the layer's KV cache; see attention.h
    bf16* values;
    int64_t window;  // sliding window: tokens that a token attends to, itself included; 0: all
};

struct Model {
    const Layer* layers;
    const bf16* embedding;  // [vocab, hidden]
    const float* final_norm;
    const float* inv_freq;  // [dim / 2]
    Linear head;
    int32_t layer_count, hidden, intermediate, heads;
    int32_t kv_heads, dim, vocab, block_size;
    float epsilon, rotary_scale;
};

inline const LoraGroup& group_of(const LoraAdapter& adapter, int layer, Group group) {
    return adapter.groups[layer * kGroups + group];
}

// `StepArrays` of step/arrays.py, and where its logits go.
struct Step {
    const int64_t* tokens;
    const int64_t* positions;
    const int64_t* slots;
    const int64_t* row_starts;
    const int64_t* contexts;
    const int64_t* block_tables;
    const Segment* segments;
    const int64_t* logit_rows;
    float* logits;    // [logit_count, vocab]
    uint8_t* finite;  // [logit_count] 1 where all of a row's logits are finite, else 0
    int64_t rows, sequences, table_width, segment_count, logit_count;
};

}  // namespace veneer
