// A whole step as a program of parts (see team.h): ten a layer, with nothing but these headers'
// kernels in them.
//
// A chunk of a part may be executed twice, at one time too. So a part never changes what it reads,
// and puts nothing but results into memory that other threads see, by the functions of shared.h:
// what is under way is in registers and in the thread's own scratch.
#pragma once

#include <algorithm>
#include <vector>

#include "frame.h"
#include "heads.h"
#include "products.h"
#include "rows.h"
#include "state.h"
#include "step.h"

#ifdef VENEER_TIMES
#include <chrono>
#endif

namespace veneer {

// Where a step's time goes. Kept only where it is compiled with VENEER_TIMES (by the benchmark).
enum Time {
    kNormTime,
    kQkvTime,
    kRotateTime,
    kAttendTime,
    kOutputTime,
    kGateUpTime,
    kGateTime,
    kDownTime,
    kHeadTime,
    kTimes
};

class Decoder final : Program {
  public:
    Decoder(const Model& model, Team& team)
        : m_(model),
          team_(team),
          f_(model, team.size()),
          products_(f_),
          heads_(f_),
          rows_(f_),
          scratch_(size_t(team.size())) {
        work_.push_back({kEmbed});
        for (int layer = 0; layer < m_.layer_count; ++layer) {
            const bool last = layer + 1 == m_.layer_count;
            work_.push_back({kProduct, layer, kQkv});
            work_.push_back({kRotate, layer, kQkv});
            work_.push_back({kAttend, layer});
            work_.push_back({kGather, layer});
            work_.push_back({kProduct, layer, kOutput});
            work_.push_back({kAdd, layer, kOutput, m_.layers[layer].post_norm});
            work_.push_back({kProduct, layer, kGateUp});
            work_.push_back({kGate, layer, kGateUp});
            work_.push_back({kProduct, layer, kDown});
            work_.push_back({kAdd, layer, kDown, last ? nullptr : m_.layers[layer + 1].input_norm});
        }
        work_.push_back({kNormalize});
        work_.push_back({kLogits});
        places_.reset(parts());
    }

    Decoder(const Decoder&) = delete;  // its parts refer to one another
    Decoder& operator=(const Decoder&) = delete;

    void run(const Step& step) {
        prepare(step);
        begin_times();
        team_.run(*this);
        add_time(parts() - 1);
    }

    double seconds[kTimes] = {};

  private:
    enum What { kEmbed, kProduct, kRotate, kAttend, kGather, kAdd, kGate, kNormalize, kLogits };
    struct Work {
        What what;
        int layer = 0;
        Group group = kQkv;
        const float* norm = nullptr;  // of what is added; null after the last layer
    };

    void prepare(const Step& step) {
        f_.prepare(step);
        heads_.prepare();
        products_.prepare(heads_.blocks());
        const size_t rows = size_t(step.rows);
        const size_t normed = std::max(rows, size_t(step.logit_count));
        hidden_.take(rows * m_.hidden);
        rounded_.take(normed * f_.width);
        y_.take(rows * f_.wide);
        shrunk_.take(rows * size_t(f_.ranks) + kLanes);
        queries_.take(rows * f_.query_width);
        results_.take(heads_.results());
        for (auto& each : scratch_) each.take(std::max(f_.scratch(), heads_.scratch()));
        std::fill(step.finite, step.finite + step.logit_count, uint8_t(1));
    }

    // ----------------------------------------------------------------------- program

    int parts() const override { return int(work_.size()); }

    int prepare(int part, Stragglers stragglers) override {
        const Work& work = work_[size_t(part)];
        if (!places_.prepare(part, writes(work), stragglers)) return -1;
        if (part > 0) add_time(part - 1);
        if (work.what == kProduct) products_.list(work.layer, work.group, lists(part));
        return chunks(part);
    }

    // What later parts read: nothing where a part is left out.
    unsigned writes(const Work& work) const {
        switch (work.what) {
            case kEmbed:
            case kAdd: return 1u << kHidden | 1u << kRounded;
            case kProduct: return 1u << kY | 1u << kShrunk | 1u << kLists;
            case kRotate: return 1u << kQueries;
            case kAttend: return heads_.in_parts() ? 1u << kResults : 1u << kRounded;
            case kGather: return heads_.in_parts() ? 1u << kRounded : 0;
            case kGate:
            case kNormalize: return 1u << kRounded;
            case kLogits: return 0;
        }
        return 0;
    }

    int chunks(int part) const {
        const Work& work = work_[size_t(part)];
        switch (work.what) {
            case kEmbed: return f_.chunks(f_.step->rows);
            case kProduct: return products_.chunks(work.layer, work.group, lists(part));
            case kRotate: return f_.chunks(bunches() * m_.kv_heads);
            case kAttend: return heads_.chunks();
            case kGather: return heads_.in_parts() ? f_.chunks(heads_.items()) : 0;
            case kAdd: return f_.chunks(bunches());
            case kGate: return f_.columns(work.layer, work.group).chunks;
            case kNormalize: return f_.chunks(f_.step->logit_count);
            case kLogits: return few(m_.head.tiles(), team_.size() * kHeadChunks);
        }
        return 0;
    }

    int begin(int part, int chunks, int thread, int size) const override {
        return work_[size_t(part)].what == kProduct ? products_.begin(chunks, lists(part), thread)
                                                    : Program::begin(part, chunks, thread, size);
    }

    void chunk(int part, int chunk, int thread) override {
        const Work& work = work_[size_t(part)];
        const Arrays at = arrays(part);
        const int count = chunks(part);
        float* scratch = scratch_[size_t(thread)].take(0);
        // `function` for a chunk's share of so many.
        auto each = [&](int64_t of, const auto& function) {
            for (int64_t i = of * chunk / count; i < of * (chunk + 1) / count; ++i) function(i);
        };
        switch (work.what) {
            case kEmbed: return each(f_.step->rows, [&](int64_t row) { rows_.embed(at, row); });
            case kProduct: return products_.chunk(work.layer, work.group, lists(part), at, chunk);
            case kRotate:
                return each(bunches() * m_.kv_heads, [&](int64_t item) {
                    heads_.rotate(work.layer, at, f_.bunches[size_t(item / m_.kv_heads)],
                                  int(item % m_.kv_heads), scratch);
                });
            case kAttend:
                if (heads_.in_parts())
                    return each(heads_.parts(),
                                [&](int64_t i) { heads_.attend_part(work.layer, at, i, scratch); });
                return each(heads_.items(),
                            [&](int64_t i) { heads_.attend_item(work.layer, at, i, scratch); });
            case kGather:
                return each(heads_.items(), [&](int64_t i) { heads_.gather_item(at, i, scratch); });
            case kAdd:
                return each(bunches(), [&](int64_t i) {
                    rows_.add(work.layer, work.group, work.norm, at, f_.bunches[size_t(i)],
                              scratch);
                });
            case kGate: {
                const Columns cut = f_.columns(work.layer, work.group);
                const int first = kTile * cut.begin(chunk), end = kTile * cut.begin(chunk + 1);
                for (const Bunch& bunch : f_.bunches)
                    rows_.gate(work.layer, at, bunch, first, end - first, scratch);
                return;
            }
            case kNormalize:
                return each(f_.step->logit_count, [&](int64_t i) { rows_.normalize_last(at, i); });
            case kLogits: {
                const int tiles = m_.head.tiles();
                return rows_.logits(at, tiles * chunk / count, tiles * (chunk + 1) / count);
            }
        }
    }

    int64_t bunches() const { return int64_t(f_.bunches.size()); }
    // Which of the products' lists a part goes by.
    int lists(int part) const { return places_.wrote(part, kLists); }

    Arrays arrays(int part) const {
        auto now = [&](Array array) { return places_.wrote(part, array); };
        auto before = [&](Array array) { return places_.wrote(part > 0 ? part - 1 : 0, array); };
        return {hidden_[before(kHidden)],
                rounded_[before(kRounded)],
                hidden_[now(kHidden)],
                rounded_[now(kRounded)],
                y_[now(kY)],
                shrunk_[now(kShrunk)],
                queries_[now(kQueries)],
                results_[now(kResults)]};
    }

#ifdef VENEER_TIMES
    void begin_times() { began_ = std::chrono::steady_clock::now(); }
    void add_time(int part) {
        const auto now = std::chrono::steady_clock::now();
        seconds[time_of(work_[size_t(part)])] +=
            std::chrono::duration<double>(now - began_).count();
        began_ = now;
    }
    static Time time_of(const Work& work) {
        switch (work.what) {
            case kProduct:
                return work.group == kQkv      ? kQkvTime
                       : work.group == kOutput ? kOutputTime
                       : work.group == kGateUp ? kGateUpTime
                                               : kDownTime;
            case kRotate: return kRotateTime;
            case kAttend:
            case kGather: return kAttendTime;
            case kGate: return kGateTime;
            case kLogits: return kHeadTime;
            default: return kNormTime;
        }
    }
    std::chrono::steady_clock::time_point began_;
#else
    void begin_times() {}
    void add_time(int) {}
#endif

    static constexpr int kHeadChunks = 64;  // a thread's

    const Model& m_;
    Team& team_;
    std::vector<Work> work_;
    Places places_;
    Frame f_;
    Products products_;
    Heads heads_;
    Rows rows_;
    // What parts write.
    Placed<float> hidden_, y_, shrunk_, results_;
    Placed<bf16> rounded_, queries_;
    std::vector<Buffer<float>> scratch_;  // by thread
};

}  // namespace veneer
