// The structs of the C interface: plain pointers and numbers, owned by the caller.
// Python declares the same structs: see layout.h.
#pragma once

#include "kernels/attention/attention.h"
#include "kernels/gemm/gemm.h"
#include "kernels/lora.h"
#include "layout.h"

namespace veneer {

constexpr int kGroups = 4;  // projections that share an input: q, k, v; o; gate, up; down
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
constexpr Field kLayerFields[] = {
    VENEER_STRUCT(Layer),
    VENEER_FIELD(Layer, linears),
    VENEER_FIELD(Layer, input_norm),
    VENEER_FIELD(Layer, post_norm),
    VENEER_FIELD(Layer, query_norm),
    VENEER_FIELD(Layer, key_norm),
    VENEER_FIELD(Layer, keys),
    VENEER_FIELD(Layer, values),
    VENEER_FIELD(Layer, window),
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
constexpr Field kModelFields[] = {
    VENEER_STRUCT(Model),
    VENEER_FIELD(Model, layers),
    VENEER_FIELD(Model, embedding),
    VENEER_FIELD(Model, final_norm),
    VENEER_FIELD(Model, inv_freq),
    VENEER_FIELD(Model, head),
    VENEER_FIELD(Model, layer_count),
    VENEER_FIELD(Model, hidden),
    VENEER_FIELD(Model, intermediate),
    VENEER_FIELD(Model, heads),
    VENEER_FIELD(Model, kv_heads),
    VENEER_FIELD(Model, dim),
    VENEER_FIELD(Model, vocab),
    VENEER_FIELD(Model, block_size),
    VENEER_FIELD(Model, epsilon),
    VENEER_FIELD(Model, rotary_scale),
};

inline const LoraGroup& group_of(const LoraAdapter& adapter, int layer, Group group) {
    return adapter.groups[layer * kGroups + group];
}

// `StepArrays` of step/arrays.py, and where to write its results.
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
    uint8_t* finite;  // [logit_count] 1 if all of a row's logits are finite, else 0
    int64_t rows, sequences, table_width, segment_count, logit_count;
};
constexpr Field kStepFields[] = {
    VENEER_STRUCT(Step),
    VENEER_FIELD(Step, tokens),
    VENEER_FIELD(Step, positions),
    VENEER_FIELD(Step, slots),
    VENEER_FIELD(Step, row_starts),
    VENEER_FIELD(Step, contexts),
    VENEER_FIELD(Step, block_tables),
    VENEER_FIELD(Step, segments),
    VENEER_FIELD(Step, logit_rows),
    VENEER_FIELD(Step, logits),
    VENEER_FIELD(Step, finite),
    VENEER_FIELD(Step, rows),
    VENEER_FIELD(Step, sequences),
    VENEER_FIELD(Step, table_width),
    VENEER_FIELD(Step, segment_count),
    VENEER_FIELD(Step, logit_count),
};

}  // namespace veneer
