// The memory layout of the C interface's structs, for the caller to compare with its own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/sample.h"
#include "step.h"

namespace veneer {

// A field; with an empty name, the struct itself.
struct Field {
    const char* of;
    const char* name;
    int64_t offset, size;  // bytes
};

#define VENEER_STRUCT(type) {#type, "", 0, sizeof(type)}
#define VENEER_FIELD(type, name) {#type, #name, offsetof(type, name), sizeof(type::name)}
// clang-format off
constexpr Field kFields[] = {
    VENEER_STRUCT(Linear),
    VENEER_FIELD(Linear, weights),
    VENEER_FIELD(Linear, bias),
    VENEER_FIELD(Linear, outputs),
    VENEER_FIELD(Linear, inputs),
    VENEER_FIELD(Linear, kind),
    VENEER_FIELD(Linear, parts),
    VENEER_FIELD(Linear, table),
    VENEER_STRUCT(Layer),
    VENEER_FIELD(Layer, linears),
    VENEER_FIELD(Layer, input_norm),
    VENEER_FIELD(Layer, post_norm),
    VENEER_FIELD(Layer, query_norm),
    VENEER_FIELD(Layer, key_norm),
    VENEER_FIELD(Layer, keys),
    VENEER_FIELD(Layer, values),
    VENEER_FIELD(Layer, window),
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
    VENEER_STRUCT(LoraMember),
    VENEER_FIELD(LoraMember, b),
    VENEER_FIELD(LoraMember, rank),
    VENEER_FIELD(LoraMember, first),
    VENEER_FIELD(LoraMember, scaling),
    VENEER_FIELD(LoraMember, reserved),
    VENEER_STRUCT(LoraGroup),
    VENEER_FIELD(LoraGroup, a),
    VENEER_FIELD(LoraGroup, ranks),
    VENEER_FIELD(LoraGroup, reserved),
    VENEER_FIELD(LoraGroup, members),
    VENEER_STRUCT(LoraAdapter),
    VENEER_FIELD(LoraAdapter, groups),
    VENEER_FIELD(LoraAdapter, is_float),
    VENEER_FIELD(LoraAdapter, reserved),
    VENEER_STRUCT(Segment),
    VENEER_FIELD(Segment, begin),
    VENEER_FIELD(Segment, end),
    VENEER_FIELD(Segment, adapter),
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
    VENEER_STRUCT(SampleRow),
    VENEER_FIELD(SampleRow, logits),
    VENEER_FIELD(SampleRow, seed),
    VENEER_FIELD(SampleRow, position),
    VENEER_FIELD(SampleRow, top_p),
    VENEER_FIELD(SampleRow, top_k),
    VENEER_FIELD(SampleRow, temperature),
    VENEER_FIELD(SampleRow, min_p),
    VENEER_FIELD(SampleRow, token),
    {nullptr, nullptr, 0, 0},
};
// clang-format on
#undef VENEER_STRUCT
#undef VENEER_FIELD

}  // namespace veneer
