// Executes a whole step as a program of phases (see thread_pool.h), ten per layer, with the kernels
// of these headers alone.
//
// A chunk of a phase may be executed twice, even by two threads at the same time. So a phase never
// changes what it reads, and writes only results to memory that other threads see, by the functions
// of kernels/shared.h. Intermediate values are in registers and in the thread's own scratch.
#pragma once

#include <algorithm>
#include <vector>

#include "../step.h"
#include "buffers.h"
#include "context.h"
#include "gemms.h"
#include "heads.h"
#include "rows.h"

#ifdef VENEER_TIMES
#include <chrono>
#endif

namespace veneer {

// The kinds of phases whose time is measured if compiled with VENEER_TIMES (by the benchmark).
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
    Decoder(const Model& model, ThreadPool& pool)
        : m_(model),
          pool_(pool),
          ctx_(model, pool.size()),
          gemms_(ctx_),
          heads_(ctx_),
          rows_(ctx_),
          scratch_(size_t(pool.size())) {
        work_.push_back({kEmbed});
        for (int layer = 0; layer < m_.layer_count; ++layer) {
            const bool last = layer + 1 == m_.layer_count;
            work_.push_back({kGemm, layer, kQkv});
            work_.push_back({kRotate, layer, kQkv});
            work_.push_back({kAttend, layer});
            work_.push_back({kMerge, layer});
            work_.push_back({kGemm, layer, kOutput});
            work_.push_back({kAdd, layer, kOutput, m_.layers[layer].post_norm});
            work_.push_back({kGemm, layer, kGateUp});
            work_.push_back({kGate, layer, kGateUp});
            work_.push_back({kGemm, layer, kDown});
            work_.push_back({kAdd, layer, kDown, last ? nullptr : m_.layers[layer + 1].input_norm});
        }
        work_.push_back({kNormalize});
        work_.push_back({kLogits});
        versions_.reset(phases());
    }

    Decoder(const Decoder&) = delete;  // its members refer to one another
    Decoder& operator=(const Decoder&) = delete;

    void run(const Step& step) {
        prepare(step);
        begin_times();
        pool_.run(*this);
        add_time(phases() - 1);
    }

    double seconds[kTimes] = {};

  private:
    enum Op { kEmbed, kGemm, kRotate, kAttend, kMerge, kAdd, kGate, kNormalize, kLogits };
    struct Work {
        Op op;
        int layer = 0;
        Group group = kQkv;
        const float* norm = nullptr;  // norm after the addition; null after the last layer
    };

    void prepare(const Step& step) {
        ctx_.prepare(step);
        heads_.prepare();
        gemms_.prepare(heads_.reads());
        const size_t rows = size_t(step.rows);
        const size_t normed = std::max(rows, size_t(step.logit_count));
        hidden_.take(rows * m_.hidden);
        rounded_.take(normed * ctx_.width);
        if (uses_int8()) int8_.take(normed * ctx_.int8_stride);
        y_.take(rows * ctx_.wide);
        shrunk_.take(rows * size_t(ctx_.ranks) + kLanes);
        queries_.take(rows * ctx_.query_width);
        results_.take(heads_.results());
        for (auto& each : scratch_) each.take(std::max(ctx_.scratch(), heads_.scratch()));
        std::fill(step.finite, step.finite + step.logit_count, uint8_t(1));
    }

    // ----------------------------------------------------------------------- Program

    int phases() const override { return int(work_.size()); }

    int prepare(int phase, Stragglers stragglers) override {
        const Work& work = work_[size_t(phase)];
        if (!versions_.prepare(phase, writes(work), stragglers)) return -1;
        if (phase > 0) add_time(phase - 1);
        if (work.op == kGemm) gemms_.list(work.layer, work.group, lists(phase));
        return chunks(phase);
    }

    // The arrays that a phase writes for later phases; none if it has nothing to do.
    unsigned writes(const Work& work) const {
        switch (work.op) {
            case kEmbed:
            case kAdd: return 1u << kHidden | 1u << kRounded;
            case kGemm: return 1u << kY | 1u << kShrunk | 1u << kLists;
            case kRotate: return 1u << kQueries;
            case kAttend: return heads_.shares_pieces() ? 1u << kResults : 1u << kRounded;
            case kMerge: return heads_.shares_pieces() ? 1u << kRounded : 0;
            case kGate:
            case kNormalize: return 1u << kRounded;
            case kLogits: return 0;
        }
        return 0;
    }

    int chunks(int phase) const {
        const Work& work = work_[size_t(phase)];
        switch (work.op) {
            case kEmbed: return ctx_.chunks(ctx_.step->rows);
            case kGemm: return gemms_.chunks(work.layer, work.group, lists(phase));
            case kRotate: return ctx_.chunks(row_tiles() * m_.kv_heads);
            case kAttend: return heads_.chunks();
            case kMerge: return heads_.shares_pieces() ? ctx_.chunks(heads_.items()) : 0;
            case kAdd: return ctx_.chunks(row_tiles());
            case kGate: return ctx_.columns(work.layer, work.group).chunks;
            case kNormalize: return ctx_.chunks(ctx_.step->logit_count);
            case kLogits: return chunk_count(m_.head.tiles(), pool_.size() * kHeadChunks);
        }
        return 0;
    }

    int begin(int phase, int chunks, int thread, int size) const override {
        return work_[size_t(phase)].op == kGemm ? gemms_.begin(chunks, lists(phase), thread)
                                                : Program::begin(phase, chunks, thread, size);
    }

    void chunk(int phase, int chunk, int thread) override {
        const Work& work = work_[size_t(phase)];
        const Arrays at = arrays(phase);
        const int count = chunks(phase);
        float* scratch = scratch_[size_t(thread)].take(0);
        // Call `function` for this chunk's share of `of` items.
        auto each = [&](int64_t of, const auto& function) {
            const Items items{of, count};
            for (int64_t i = items.of_chunk(chunk); i < items.of_chunk(chunk + 1); ++i) function(i);
        };
        // Whether to prefetch an item's B. A row tile has `parts` items. If the previous row tile
        // has the same adapter, and this chunk has its matching item too, B is in the cache.
        auto new_b = [&](int64_t of, int64_t item, int64_t parts) {
            return matrix::kPresent && (ctx_.row_tiles[size_t(item / parts)].first ||
                                        item - parts < Items{of, count}.of_chunk(chunk));
        };
        switch (work.op) {
            case kEmbed: return each(ctx_.step->rows, [&](int64_t row) { rows_.embed(at, row); });
            case kGemm: return gemms_.chunk(work.layer, work.group, lists(phase), at, chunk);
            case kRotate:
                return each(row_tiles() * m_.kv_heads, [&](int64_t item) {
                    const RowTile& row_tile = ctx_.row_tiles[size_t(item / m_.kv_heads)];
                    const int head = int(item % m_.kv_heads);
                    if (new_b(row_tiles() * m_.kv_heads, item, m_.kv_heads))
                        heads_.prefetch_rotate(work.layer, row_tile, head);
                    heads_.rotate(work.layer, at, row_tile, head, scratch);
                });
            case kAttend:
                if (heads_.shares_pieces())
                    return each(heads_.shared_pieces(), [&](int64_t i) {
                        heads_.attend_piece(work.layer, at, i, scratch);
                    });
                return each(heads_.items(),
                            [&](int64_t i) { heads_.attend_item(work.layer, at, i, scratch); });
            case kMerge:
                return each(heads_.items(),
                            [&](int64_t i) { heads_.merge_item(work.layer, at, i, scratch); });
            case kAdd:
                return each(row_tiles(), [&](int64_t i) {
                    const RowTile& row_tile = ctx_.row_tiles[size_t(i)];
                    if (new_b(row_tiles(), i, 1))
                        rows_.prefetch_add(work.layer, work.group, row_tile);
                    rows_.add(work.layer, work.group, work.norm, at, row_tile, scratch);
                });
            case kGate: {
                const Columns cut = ctx_.columns(work.layer, work.group);
                const int first = kTile * cut.begin(chunk), end = kTile * cut.begin(chunk + 1);
                for (size_t i = 0; i < ctx_.row_tiles.size(); ++i) {
                    rows_.prefetch_gate(work.layer, i, chunk, cut);
                    rows_.gate(work.layer, at, ctx_.row_tiles[i], first, end - first, scratch);
                }
                return;
            }
            case kNormalize:
                return each(ctx_.step->logit_count,
                            [&](int64_t i) { rows_.normalize_last(at, i); });
            case kLogits: {
                const int tiles = m_.head.tiles();
                return rows_.logits(at, tiles * chunk / count, tiles * (chunk + 1) / count);
            }
        }
    }

    // Whether any GEMM's inputs are rounded to 8 bits.
    bool uses_int8() const {
        bool any = m_.head.int8_inputs;
        for (int layer = 0; layer < m_.layer_count; ++layer)
            for (const Linear& linear : m_.layers[layer].linears) any |= linear.int8_inputs != 0;
        return any;
    }

    void pause() override { matrix::give_up(); }

    int64_t row_tiles() const { return int64_t(ctx_.row_tiles.size()); }
    // The version of the GEMMs' lists that a phase uses.
    int lists(int phase) const { return versions_.wrote(phase, kLists); }

    Arrays arrays(int phase) const {
        auto now = [&](Array array) { return versions_.wrote(phase, array); };
        auto before = [&](Array array) {
            return versions_.wrote(phase > 0 ? phase - 1 : 0, array);
        };
        return {hidden_[before(kHidden)],
                rounded_[before(kRounded)],
                hidden_[now(kHidden)],
                rounded_[now(kRounded)],
                int8_[before(kRounded)],
                int8_[now(kRounded)],
                y_[now(kY)],
                shrunk_[now(kShrunk)],
                queries_[now(kQueries)],
                results_[now(kResults)]};
    }

#ifdef VENEER_TIMES
    void begin_times() { began_ = std::chrono::steady_clock::now(); }
    void add_time(int phase) {
        const auto now = std::chrono::steady_clock::now();
        seconds[time_of(work_[size_t(phase)])] +=
            std::chrono::duration<double>(now - began_).count();
        began_ = now;
    }
    static Time time_of(const Work& work) {
        switch (work.op) {
            case kGemm:
                return work.group == kQkv      ? kQkvTime
                       : work.group == kOutput ? kOutputTime
                       : work.group == kGateUp ? kGateUpTime
                                               : kDownTime;
            case kRotate: return kRotateTime;
            case kAttend:
            case kMerge: return kAttendTime;
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

    static constexpr int kHeadChunks = 64;  // per thread

    const Model& m_;
    ThreadPool& pool_;
    std::vector<Work> work_;
    BufferVersions versions_;
    StepContext ctx_;
    Gemms gemms_;
    Heads heads_;
    Rows rows_;
    // The arrays that phases write.
    VersionedBuffer<float> hidden_, y_, shrunk_, results_;
    VersionedBuffer<bf16> rounded_, queries_;
    VersionedBuffer<uint8_t> int8_;
    std::vector<Buffer<float>> scratch_;  // by thread
};

}  // namespace veneer
