// The C interface. Functions that can fail return 0, or a message to be read at once.
#include <exception>
#include <new>

#include "decoder.h"
#include "sample.h"

using namespace veneer;

namespace {

struct Engine {
    Engine(const Model& given, int threads)
        : model(given), team(threads), decoder(model, team), samplers(size_t(threads)) {}

    Model model;
    Team team;
    Decoder decoder;
    std::vector<Sampler> samplers;  // by thread
};

// Call `function(row, sampler)` for each row; by an engine's threads where there are several.
template <class Function>
void each_row(void* handle, int64_t rows, const Function& function) noexcept {
    if (handle == nullptr) {
        Sampler sampler;
        for (int64_t row = 0; row < rows; ++row) function(row, sampler);
        return;
    }
    Engine& engine = *static_cast<Engine*>(handle);
    if (rows > 1) engine.team.call();
    engine.team.each(rows, [&](int64_t row, int thread) {
        function(row, engine.samplers[size_t(thread)]);
    });
    if (rows > 1) engine.team.rest();
}

}  // namespace

extern "C" {

// Sizes of the structs, for the caller to compare with its own.
void veneer_sizes(int64_t* to) {
    to[0] = sizeof(Linear), to[1] = sizeof(Layer), to[2] = sizeof(Model), to[3] = sizeof(Step);
    to[4] = sizeof(Segment), to[5] = sizeof(LoraAdapter), to[6] = sizeof(LoraGroup);
    to[7] = sizeof(Draw);
}

const char* veneer_instructions() { return kInstructions; }

int64_t veneer_packed_bytes(int32_t kind, int32_t outputs, int32_t inputs) {
    const int64_t tiles = (outputs + kTile - 1) / kTile;
    return tiles * (inputs / kBlock) * int64_t(block_bytes(Kind(kind)));
}

void veneer_pack_four_bit(const uint8_t* codes, const float* scales, int32_t outputs,
                          int32_t inputs, uint8_t* to) {
    pack_four_bit(codes, scales, outputs, inputs, to);
}

void veneer_pack_eight_bit(const bf16* weights, int32_t outputs, int32_t inputs, uint8_t* to) {
    pack_eight_bit(weights, outputs, inputs, to);
}

void veneer_pack_bf16(const bf16* weights, int32_t outputs, int32_t inputs, bf16* to) {
    pack_bf16(weights, outputs, inputs, to);
}

// y [rows, outputs] = x [rows, inputs] W^T, on the calling thread.
void veneer_multiply(const Linear* linear, const bf16* x, int64_t rows, float* y) {
    Asking nothing;
    multiply_tiles(*linear, 0, linear->tiles(), x, size_t(linear->inputs), int(rows), y,
                   size_t(linear->outputs), nothing);
}

void* veneer_create(const Model* model, int32_t threads) {
    try {
        return new Engine(*model, threads);
    } catch (const std::exception&) {
        return nullptr;
    }
}

void veneer_destroy(void* engine) { delete static_cast<Engine*>(engine); }

const char* veneer_step(void* handle, const Step* step) {
    Engine& engine = *static_cast<Engine*>(handle);
    const char* failed = nullptr;
    engine.team.call();
    try {
        engine.decoder.run(*step);
    } catch (const std::bad_alloc&) {
        failed = "no memory for a step's buffers";
    } catch (const std::exception&) {
        failed = "the native step failed";
    }
    engine.team.rest();
    return failed;
}

// The tokens of rows of logits; without an engine on the calling thread.
void veneer_sample(void* engine, Draw* draws, int64_t count, int64_t vocab) {
    each_row(engine, count, [&](int64_t row, Sampler& sampler) {
        draws[row].token = sampler.token(draws[row], vocab);
    });
}

// log(sum of e^logit) of each row.
void veneer_log_sums(void* engine, const float* logits, int64_t rows, int64_t vocab, float* to) {
    each_row(engine, rows,
             [&](int64_t row, Sampler&) { to[row] = log_sum(logits + row * vocab, vocab); });
}

// Seconds in each part of all steps so far (`Time`); zeros unless compiled with VENEER_TIMES.
void veneer_times(void* handle, double* to) {
    const Decoder& decoder = static_cast<Engine*>(handle)->decoder;
    std::memcpy(to, decoder.seconds, sizeof decoder.seconds);
}

}  // extern "C"
