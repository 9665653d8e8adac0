// Runs whole steps of the real decoder on several threads, and samples tokens from their logits:
// built with ThreadSanitizer, it reports every pair of accesses that nothing orders.
//
// Patiently (no argument) no chunk is executed twice, memory is plain, and the decoder must be
// clean. With "stalls" chunks are executed twice at one time (VENEER_STALLS): two threads then
// write the same numbers to the same place. With VENEER_ATOMIC_NUMBERS the kernels' own functions
// for that memory (kernels/shared.h) use relaxed atomics, and the decoder must be clean again.
// Without it each report must be of such memory. Logits and tokens must be bit-identical to those
// of one thread each time.
#include "decoder/decoder.h"

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "library.cpp"

namespace {

using namespace veneer;

constexpr int kHidden = 64, kInner = 128, kHeads = 4, kKvHeads = 2, kDim = 32, kVocab = 96;
constexpr int kLayers = 3, kBlockSize = 16, kContext = 640, kBlocks = 3 * kContext / kBlockSize;

struct Base {
    std::mt19937 random{11};
    std::vector<std::vector<float>> floats;
    std::vector<std::vector<bf16>> halves;
    std::vector<Layer> layers;
    Model model{};

    float* numbers(size_t count, float spread, float middle = 0) {
        std::normal_distribution<float> draw(middle, spread);
        auto& made = floats.emplace_back(count);
        for (float& each : made) each = draw(random);
        return made.data();
    }
    bf16* rounded(size_t count, float spread) {
        const float* from = numbers(count, spread);
        auto& made = halves.emplace_back(count);
        for (size_t i = 0; i < count; ++i) made[i] = to_bf16(from[i]);
        return made.data();
    }
    Linear linear(int outputs, int inputs, int parts = 1) {
        const size_t padded = size_t((outputs + kTile - 1) / kTile * kTile);
        const bf16* weights = rounded(size_t(outputs) * inputs, 0.1f);
        bf16* packed = halves.emplace_back(padded * inputs).data();
        veneer_pack_bf16(weights, outputs, inputs, reinterpret_cast<uint8_t*>(packed), 1);
        Linear made{};
        made.weights = reinterpret_cast<const uint8_t*>(packed);
        made.outputs = outputs, made.inputs = inputs, made.kind = Kind::bfloat16;
        made.parts = parts;
        return made;
    }
    // In 8 bits, with inputs of 8 bits.
    Linear int8_linear(int outputs, int inputs, int parts = 1) {
        const size_t bytes = size_t(veneer_packed_bytes(int(Kind::eight_bit), outputs, inputs));
        const bf16* weights = rounded(size_t(outputs) * inputs, 0.1f);
        uint8_t* packed = reinterpret_cast<uint8_t*>(halves.emplace_back(bytes / 2).data());
        veneer_pack_eight_bit(weights, outputs, inputs, packed, 1);
        Linear made{};
        made.weights = packed, made.outputs = outputs, made.inputs = inputs;
        made.kind = Kind::eight_bit, made.parts = parts;
        made.int8_inputs = 1, made.unit = 1;
        return made;
    }

    Base() {
        floats.reserve(1000), halves.reserve(1000);
        const size_t cache = size_t(kBlocks) * kKvHeads * kBlockSize * kDim;
        for (int layer = 0; layer < kLayers; ++layer) {
            Layer made{};
            const auto make = [&](int outputs, int inputs, int parts = 1) {
                return layer == 2 ? linear(outputs, inputs, parts)
                                  : int8_linear(outputs, inputs, parts);
            };
            made.linears[kQkv] = make((kHeads + 2 * kKvHeads) * kDim, kHidden);
            made.linears[kOutput] = make(kHidden, kHeads * kDim);
            made.linears[kGateUp] = make(2 * kInner, kHidden, 2);
            made.linears[kDown] = make(kHidden, kInner);
            made.input_norm = numbers(kHidden, 0.1f, 1), made.post_norm = numbers(kHidden, 0.1f, 1);
            made.keys = rounded(cache, 0.5f), made.values = rounded(cache, 0.5f);
            layers.push_back(made);
        }
        model.layers = layers.data();
        model.embedding = rounded(size_t(kVocab) * kHidden, 1);
        model.final_norm = numbers(kHidden, 0.1f, 1);
        model.inv_freq = numbers(kDim / 2, 0.1f, 0.5f);
        model.head = int8_linear(kVocab, kHidden);
        model.layer_count = kLayers, model.hidden = kHidden, model.intermediate = kInner;
        model.heads = kHeads, model.kv_heads = kKvHeads, model.dim = kDim, model.vocab = kVocab;
        model.block_size = kBlockSize, model.epsilon = 1e-5f, model.rotary_scale = 1;
    }
};

// Sequences, each with `count` tokens from position `first` of its context on.
struct TokenRows {
    std::vector<int64_t> tokens, positions, slots, starts{0}, contexts, blocks, prefetches;
    int64_t sequences = 0;

    void add(int64_t first, int64_t count) {
        for (int64_t at = first; at < first + count; ++at) {
            tokens.push_back((7 * sequences + 5 * at) % kVocab), positions.push_back(at);
            slots.push_back(sequences * kContext + at),
                prefetches.push_back(int64_t(prefetches.size()));
        }
        for (int64_t i = 0; i < kContext / kBlockSize; ++i)
            blocks.push_back(sequences * kContext / kBlockSize + i);
        starts.push_back(int64_t(tokens.size())), contexts.push_back(first + count), ++sequences;
    }
};

// The logits of some steps on so many threads, then a token of each row; with the same base and
// adapter each time.
std::vector<float> results(const TokenRows& rows, int threads, bool patient, int steps) {
    Base base;
    constexpr int kRank = 8;
    std::vector<LoraGroup> groups(size_t(kLayers) * kGroups);
    for (int layer = 0; layer < kLayers; ++layer) {
        LoraGroup& group = groups[size_t(layer) * kGroups + kQkv];
        group.a = base.rounded(size_t(kHidden) * kRank, 0.1f), group.ranks = kRank;
        group.members[0] = {base.rounded(size_t(kRank) * kHeads * kDim, 0.1f), kRank, 0, 2, 0};
    }
    const LoraAdapter adapter{groups.data(), 0, 0};
    const auto count = int64_t(rows.tokens.size());
    const Segment segment{count / 4, count - count / 4, &adapter};
    std::vector<float> logits(size_t(count) * kVocab), all;
    std::vector<uint8_t> finite(size_t(count), 0);
    const Step step{rows.tokens.data(),
                    rows.positions.data(),
                    rows.slots.data(),
                    rows.starts.data(),
                    rows.contexts.data(),
                    rows.blocks.data(),
                    &segment,
                    rows.prefetches.data(),
                    logits.data(),
                    finite.data(),
                    count,
                    rows.sequences,
                    kContext / kBlockSize,
                    1,
                    count};
    ThreadPool pool(threads, patient);
    Decoder decoder(base.model, pool);
    for (int i = 0; i < steps; ++i) {
        pool.wake();
        decoder.run(step);
        pool.let_sleep();
        all.insert(all.end(), logits.begin(), logits.end());
    }
    if (patient) return all;
    // By the C interface, whose thread pool is not patient.
    void* engine = nullptr;
    if (veneer_create(&base.model, threads, &engine) != kOk) return {};
    std::vector<SampleRow> draws;
    for (int64_t row = 0; row < count; ++row)
        draws.push_back({logits.data() + row * kVocab, 3, uint64_t(row), 0.9, 0, 1, 0, 0});
    for (int i = 0; i < steps; ++i) {
        std::vector<float> sums(static_cast<size_t>(count), 0);
        veneer_sample(engine, draws.data(), count, kVocab);
        veneer_log_sums(engine, logits.data(), count, kVocab, sums.data());
        for (const SampleRow& draw : draws) all.push_back(float(draw.token));
        all.insert(all.end(), sums.begin(), sums.end());
    }
    veneer_destroy(engine);
    return all;
}

}  // namespace

int main(int count, char** words) {
    const bool patient = count < 2 || std::strcmp(words[1], "stalls") != 0;
    constexpr int kSteps = 20;
    TokenRows prompts, long_contexts;
    for (int i = 0; i < 3; ++i) prompts.add(0, 8);
    // So long that threads share an item's pieces.
    for (const int64_t context : {600, 530}) long_contexts.add(context - 2, 2);
    for (const TokenRows* rows : {&prompts, &long_contexts}) {
        const std::vector<float> expected = results(*rows, 1, patient, kSteps);
        for (const int threads : {2, 3, 5}) {
            const std::vector<float> got = results(*rows, threads, patient, kSteps);
            if (got.size() != expected.size() ||
                std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)) != 0) {
                std::printf("%d threads computed other logits or tokens\n", threads);
                return 1;
            }
        }
    }
    std::printf("%d steps by 2, 3 and 5 threads: in order, the same logits\n", 2 * kSteps);
}
