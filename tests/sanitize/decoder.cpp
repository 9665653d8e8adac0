// Whole steps of the real decoder by several threads: built with ThreadSanitizer, it tells of
// every access that nothing puts in order.
//
// Patiently (no argument) no chunk is done twice, and the decoder must be clean. With "stalls", and
// compiled with VENEER_STALLS, chunks are done twice at one time: two threads then write the same
// numbers to the same place, in plain memory, which ThreadSanitizer reports. The logits must be
// those of one thread, to the bit, either way.
//
// What is written twice, each by one chunk for itself, and read by chunks of later parts: a tile of
// y (`store_tile`), h of the adapters (`shrink_rows`), hidden states and inputs rounded to bfloat16
// (`Rows`), queries, K and V in the cache (`Heads::rotate`), attention's results (`gather`). All
// are written by vectors: an x86 CPU writes each aligned number of one as a whole, which C++ does
// not promise. Relaxed atomics would be numbers one by one.
#include "decoder.h"

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

namespace {

using namespace veneer;

constexpr int kHidden = 64, kInner = 128, kHeads = 4, kKvHeads = 2, kDim = 16, kVocab = 96;
constexpr int kLayers = 2, kBlockSize = 16, kBlocks = 8, kRows = 24, kSequences = 3;

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
        pack_bf16(weights, outputs, inputs, packed);
        Linear made{};
        made.weights = reinterpret_cast<const uint8_t*>(packed);
        made.outputs = outputs, made.inputs = inputs, made.kind = Kind::bfloat16;
        made.parts = parts;
        return made;
    }

    Base() {
        floats.reserve(1000), halves.reserve(1000);
        const size_t cache = size_t(kBlocks) * kKvHeads * kBlockSize * kDim;
        for (int layer = 0; layer < kLayers; ++layer) {
            Layer made{};
            made.linears[kQkv] = linear((kHeads + 2 * kKvHeads) * kDim, kHidden);
            made.linears[kOutput] = linear(kHidden, kHeads * kDim);
            made.linears[kGateUp] = linear(2 * kInner, kHidden, 2);
            made.linears[kDown] = linear(kHidden, kInner);
            made.input_norm = numbers(kHidden, 0.1f, 1), made.post_norm = numbers(kHidden, 0.1f, 1);
            made.keys = rounded(cache, 0), made.values = rounded(cache, 0);
            layers.push_back(made);
        }
        model.layers = layers.data();
        model.embedding = rounded(size_t(kVocab) * kHidden, 1);
        model.final_norm = numbers(kHidden, 0.1f, 1);
        model.inv_freq = numbers(kDim / 2, 0.1f, 0.5f);
        model.head = linear(kVocab, kHidden);
        model.layer_count = kLayers, model.hidden = kHidden, model.intermediate = kInner;
        model.heads = kHeads, model.kv_heads = kKvHeads, model.dim = kDim, model.vocab = kVocab;
        model.block_size = kBlockSize, model.epsilon = 1e-5f, model.rotary_scale = 1;
    }
};

// The logits of some steps by so many threads; the same base and adapter each time.
std::vector<float> logits(int threads, bool patient, int steps) {
    Base base;
    constexpr int kRank = 8;
    std::vector<LoraGroup> groups(size_t(kLayers) * kGroups);
    for (int layer = 0; layer < kLayers; ++layer) {
        LoraGroup& group = groups[size_t(layer) * kGroups + kQkv];
        group.a = base.rounded(size_t(kHidden) * kRank, 0.1f), group.ranks = kRank;
        group.members[0] = {base.rounded(size_t(kRank) * kHeads * kDim, 0.1f), kRank, 0, 2, 0};
    }
    const LoraAdapter adapter{groups.data(), 0, 0};
    const Segment segment{5, 15, &adapter};
    std::vector<int64_t> tokens, positions, slots, starts{0}, contexts, blocks, wanted;
    for (int64_t s = 0; s < kSequences; ++s) {
        for (int64_t at = 0; at < kRows / kSequences; ++at) {
            tokens.push_back((7 * s + 5 * at) % kVocab), positions.push_back(at);
            slots.push_back((s + 1) * kBlockSize + at), wanted.push_back(int64_t(wanted.size()));
        }
        starts.push_back(int64_t(tokens.size()));
        contexts.push_back(kRows / kSequences), blocks.push_back(s + 1);
    }
    std::vector<float> result(size_t(kRows) * kVocab), all;
    std::vector<uint8_t> finite(kRows);
    const Step step{tokens.data(),
                    positions.data(),
                    slots.data(),
                    starts.data(),
                    contexts.data(),
                    blocks.data(),
                    &segment,
                    wanted.data(),
                    result.data(),
                    finite.data(),
                    kRows,
                    kSequences,
                    1,
                    1,
                    kRows};
    Team team(threads, patient);
    Decoder decoder(base.model, team);
    for (int i = 0; i < steps; ++i) {
        team.call();
        decoder.run(step);
        team.rest();
        all.insert(all.end(), result.begin(), result.end());
    }
    return all;
}

}  // namespace

int main(int count, char** words) {
    const bool patient = count < 2 || std::strcmp(words[1], "stalls") != 0;
    constexpr int kSteps = 20;
    const std::vector<float> expected = logits(1, true, kSteps);
    for (const int threads : {2, 3, 5}) {
        const std::vector<float> got = logits(threads, patient, kSteps);
        if (std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)) != 0) {
            std::printf("%d threads computed other logits\n", threads);
            return 1;
        }
    }
    std::printf("%d steps by 2, 3 and 5 threads: in order, the same logits\n", kSteps);
}
