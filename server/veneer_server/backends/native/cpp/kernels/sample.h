// Samples a token from a row of logits, as the torch backend's sampler does.
//
// A row's token is a function of its logits, its settings, its seed and its position.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../layout.h"
#include "simd.h"

namespace veneer {

// A row of logits, how to sample it, and its token. Python declares the same struct: see layout.h.
struct SampleRow {
    const float* logits;  // [vocab]
    uint64_t seed, position;
    double top_p;       // 1: keep all
    int64_t top_k;      // 0: keep all
    float temperature;  // below `kMinTemperature`: greedy
    float min_p;        // 0: keep all
    int64_t token;      // the result; -1 if the logits are not finite
};
constexpr Field kSampleRowFields[] = {
    VENEER_STRUCT(SampleRow),
    VENEER_FIELD(SampleRow, logits),
    VENEER_FIELD(SampleRow, seed),
    VENEER_FIELD(SampleRow, position),
    VENEER_FIELD(SampleRow, top_p),
    VENEER_FIELD(SampleRow, top_k),
    VENEER_FIELD(SampleRow, temperature),
    VENEER_FIELD(SampleRow, min_p),
    VENEER_FIELD(SampleRow, token),
};

constexpr float kMinTemperature = 1e-5f;  // dividing by less would overflow
constexpr float kFloor = 4.5e-5f;         // e^-10; less likely tokens are no candidates at first
constexpr int kSumWidth = 1024;           // probabilities in each partial sum

// The first double in [0, 1) of the random number generator Philox 4x64-10 (Salmon et al. 2011)
// with this key and counter, as in numpy.
inline double uniform(uint64_t key, uint64_t counter) {
    uint64_t c[4] = {counter + 1, 0, 0, 0}, k[2] = {key, 0};
    if (c[0] == 0) c[1] = 1;
    for (int round = 0; round < 10; ++round) {
        const unsigned __int128 a = (unsigned __int128)0xD2E7470EE14C6C93u * c[0];
        const unsigned __int128 b = (unsigned __int128)0xCA5A826395121157u * c[2];
        const uint64_t next[4] = {uint64_t(b >> 64) ^ c[1] ^ k[0], uint64_t(b),
                                  uint64_t(a >> 64) ^ c[3] ^ k[1], uint64_t(a)};
        std::copy(next, next + 4, c);
        k[0] += 0x9E3779B97F4A7C15u;
        k[1] += 0xBB67AE8584CAA73Bu;
    }
    return double(c[0] >> 11) * 0x1p-53;
}

inline Floats load_padded(const float* at, int count, float otherwise) {
    alignas(64) float padded[kLanes];
    for (int i = 0; i < kLanes; ++i) padded[i] = i < count ? at[i] : otherwise;
    return load(padded);
}

inline float largest(const float* at, int64_t count) {
    Floats most = broadcast(-INFINITY);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) most = max(most, load(at + i));
    if (i < count) most = max(most, load_padded(at + i, int(count - i), -INFINITY));
    return largest(most);
}

// The token with the largest logit; the first one if several are equal.
inline int64_t argmax(const float* logits, int64_t vocab) {
    const float most = largest(logits, vocab);
    for (int64_t i = 0; i < vocab; ++i)
        if (logits[i] == most) return i;
    return -1;  // NaN
}

// Samples tokens, and keeps its buffers from row to row.
class Sampler {
  public:
    int64_t token(const SampleRow& row, int64_t vocab) {
        if (row.temperature < kMinTemperature) return argmax(row.logits, vocab);
        weigh(row, vocab);
        if (!(total_ > 0) || !std::isfinite(total_)) return -1;
        const double random = uniform(row.seed, row.position);
        const bool cut = row.top_k > 0 || row.top_p < 1 || row.min_p > 0;
        return cut ? among_kept(row, vocab, random) : among_all(vocab, random);
    }

  private:
    struct Candidate {
        float weight;
        int32_t token;
        bool operator<(const Candidate& other) const {
            return weight != other.weight ? weight > other.weight : token < other.token;
        }
    };

    // Compute e^((logit - maximum) / temperature) of each token, and their sums.
    void weigh(const SampleRow& row, int64_t vocab) {
        weights_.resize(size_t(vocab + kLanes));
        sums_.clear();
        const Floats top = broadcast(largest(row.logits, vocab));
        const Floats temperature = broadcast(row.temperature);
        total_ = 0;
        for (int64_t begin = 0; begin < vocab; begin += kSumWidth) {
            const int64_t end = std::min<int64_t>(begin + kSumWidth, vocab);
            Floats sum = zeros();
            for (int64_t i = begin; i < end; i += kLanes) {
                const bool whole = i + kLanes <= end;
                const Floats logit = whole ? load(row.logits + i)
                                           : load_padded(row.logits + i, int(end - i), -INFINITY);
                const Floats x = div(sub(logit, top), temperature);
                const Floats weight = exp_or_zero(x);
                store(weights_.data() + i, weight);
                sum = add(sum, weight);
            }
            sums_.push_back(veneer::sum(sum));
            total_ += sums_.back();
        }
    }

    // Sample without a cut: return the first token, in order of ids, at which the running sum
    // exceeds the random share of the total.
    int64_t among_all(int64_t vocab, double random) const {
        const double target = total_ * random;
        double before = 0;
        int64_t last = -1;
        for (size_t s = 0; s < sums_.size(); ++s) {
            if (before + sums_[s] <= target && s + 1 < sums_.size()) {
                before += sums_[s];
                continue;
            }
            // Sums of floats and of doubles differ a little. A share that falls between the two
            // belongs to the next token.
            const int64_t begin = int64_t(s) * kSumWidth;
            for (int64_t i = begin; i < std::min<int64_t>(begin + kSumWidth, vocab); ++i) {
                if (weights_[size_t(i)] == 0) continue;
                last = i;
                before += double(weights_[size_t(i)]);
                if (before > target) return i;
            }
        }
        return last;
    }

    // Sample with a cut: the same, likeliest tokens first, among those that top-k, then top-p and
    // min-p keep.
    int64_t among_kept(const SampleRow& row, int64_t vocab, double random) {
        collect(kFloor, vocab);
        if (!enough(row)) collect(0, vocab);
        std::sort(candidates_.begin(), candidates_.end());
        size_t count = candidates_.size();
        if (row.top_k > 0) count = std::min(count, size_t(row.top_k));
        double whole = total_;
        if (row.top_k > 0) {
            whole = 0;
            for (size_t i = 0; i < count; ++i) whole += double(candidates_[i].weight);
        }
        double kept = 0;
        size_t left = 0;
        for (; left < count; ++left) {
            const float weight = candidates_[left].weight;
            const bool spent = row.top_p < 1 && kept >= row.top_p * whole;
            if (left > 0 && (spent || weight < row.min_p * candidates_[0].weight)) break;
            kept += double(weight);
        }
        const double target = kept * random;
        double before = 0;
        for (size_t i = 0; i < left; ++i) {
            before += double(candidates_[i].weight);
            if (before > target) return candidates_[i].token;
        }
        return candidates_[left - 1].token;
    }

    void collect(float least, int64_t vocab) {
        candidates_.clear();
        collected_ = 0;
        for (int64_t i = 0; i < vocab; i += kLanes) {
            uint32_t found = above(load(weights_.data() + i), broadcast(least));
            for (; found != 0; found &= found - 1) {
                const int64_t token = i + __builtin_ctz(found);
                const float weight = weights_[size_t(token)];
                candidates_.push_back({weight, int32_t(token)});
                collected_ += double(weight);
            }
        }
    }

    // Whether the collected candidates include all tokens that the cuts keep.
    bool enough(const SampleRow& row) const {
        if (row.min_p > 2 * kFloor) return true;
        if (row.top_k > 0 && candidates_.size() >= size_t(row.top_k)) return true;
        return row.top_k == 0 && row.top_p < 1 && collected_ > row.top_p * total_ * (1 + 1e-5);
    }

    std::vector<float> weights_;
    std::vector<double> sums_;
    std::vector<Candidate> candidates_;
    double total_ = 0, collected_ = 0;
};

// log(sum of e^logit) of a row.
inline float log_sum(const float* logits, int64_t vocab) {
    const float most = largest(logits, vocab);
    const Floats top = broadcast(most);
    double total = 0;
    for (int64_t begin = 0; begin < vocab; begin += kSumWidth) {
        const int64_t end = std::min<int64_t>(begin + kSumWidth, vocab);
        Floats sum = zeros();
        for (int64_t i = begin; i < end; i += kLanes) {
            const bool whole = i + kLanes <= end;
            sum = add(sum, exp_or_zero(sub(whole ? load(logits + i)
                                                 : load_padded(logits + i, int(end - i), -INFINITY),
                                           top)));
        }
        total += veneer::sum(sum);
    }
    return float(most + std::log(total));
}

}  // namespace veneer
