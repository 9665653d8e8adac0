// A whole step as a program of parts (see team.h): ten a layer, with nothing but these headers'
// kernels in them.
//
// A chunk of a part may be done twice, at one time too. So a part never changes what it reads (but
// for a share in attention's pieces, which nothing else reads), and puts nothing but results into
// memory that other threads see: what is under way is in registers and in the thread's own scratch.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "state.h"
#include "step.h"

#ifdef VENEER_TIMES
#include <chrono>
#endif

namespace veneer {

// Where a step's time goes. Kept only where it is compiled with VENEER_TIMES (by the benchmark).
enum Time {
    kNormTime, kQkvTime, kRotateTime, kAttendTime, kOutputTime, kGateUpTime, kGateTime, kDownTime,
    kHeadTime,
    kTimes
};

class Decoder final : Program {
  public:
    Decoder(const Model& model, Team& team)
        : m_(model),
          team_(team),
          kv_{model.kv_heads, model.dim, model.block_size},
          query_width_(model.heads * model.dim),
          kv_width_(model.kv_heads * model.dim),
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
            work_.push_back(
                {kAdd, layer, kDown, last ? nullptr : m_.layers[layer + 1].input_norm});
        }
        work_.push_back({kNormalize});
        work_.push_back({kLogits});
        places_.reset(parts());
    }

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

    // Where a part's arrays are: those it reads, and those it writes.
    struct Arrays {
        const float* hidden_before;
        const bf16* rounded_before;
        float* hidden;
        bf16* rounded;
        float* y;
        float* shrunk;
        bf16* queries;
        float* results;
    };

    // ----------------------------------------------------------------------- program

    int parts() const override { return int(work_.size()); }

    int prepare(int part, Stragglers stragglers) override {
        const Work& work = work_[size_t(part)];
        if (!places_.prepare(part, writes(work), stragglers)) return -1;
        if (part > 0) add_time(part - 1);
        if (work.what == kProduct) list(part);
        return chunks(part);
    }

    // What later parts read: nothing where a part is left out.
    unsigned writes(const Work& work) const {
        switch (work.what) {
            case kEmbed: case kAdd: return 1u << kHidden | 1u << kRounded;
            case kProduct: return 1u << kY | 1u << kShrunk | 1u << kLists;
            case kRotate: return 1u << kQueries;
            case kAttend: return in_parts() ? 1u << kResults : 1u << kRounded;
            case kGather: return in_parts() ? 1u << kRounded : 0;
            case kGate: case kNormalize: return 1u << kRounded;
            case kLogits: return 0;
        }
        return 0;
    }

    int chunks(int part) const {
        const Work& work = work_[size_t(part)];
        switch (work.what) {
            case kEmbed: return few(step_->rows);
            case kProduct: return shrink_chunks(part) + columns(work).chunks;
            case kRotate: return few(bunches() * m_.kv_heads);
            case kAttend:
                return in_parts() ? few(int64_t(parts_.size()), kMostChunks)
                                  : few(int64_t(items_.size()), kAttentionChunks * team_.size());
            case kGather: return in_parts() ? few(int64_t(items_.size())) : 0;
            case kAdd: return few(bunches());
            case kGate: return columns(work).chunks;
            case kNormalize: return few(step_->logit_count);
            case kLogits: return few(m_.head.tiles(), team_.size() * kHeadChunks);
        }
        return 0;
    }

    int begin(int part, int chunks, int thread, int size) const override {
        auto even = [&](int count) { return Program::begin(part, count, thread, size); };
        if (work_[size_t(part)].what != kProduct) return even(chunks);
        // Of both kinds of chunks a share: shrinks first, since a tile is shorter, then
        // neighbouring tiles.
        const int shrinks = shrink_chunks(part);
        return even(shrinks) + even(chunks - shrinks);
    }

    void chunk(int part, int chunk, int thread) override {
        const Work& work = work_[size_t(part)];
        const Arrays at = arrays(part);
        const int count = chunks(part);
        // `function` for a chunk's share of so many.
        auto each = [&](int64_t of, const auto& function) {
            for (int64_t i = of * chunk / count; i < of * (chunk + 1) / count; ++i) function(i);
        };
        switch (work.what) {
            case kEmbed:
                return each(step_->rows, [&](int64_t row) { embed(at, row); });
            case kProduct: return product(part, at, chunk);
            case kRotate:
                return each(bunches() * m_.kv_heads, [&](int64_t item) {
                    rotate(work.layer, at, bunches_[size_t(item / m_.kv_heads)],
                         int(item % m_.kv_heads), scratch(thread));
                });
            case kAttend:
                if (in_parts())
                    return each(int64_t(parts_.size()), [&](int64_t i) {
                        const auto& [item, piece] = parts_[size_t(i)];
                        attend(work.layer, at, items_[item], piece, scratch(thread),
                             at.results + items_[item].in_parts);
                    });
                return each(int64_t(items_.size()), [&](int64_t i) {
                    const AttentionItem& item = items_[size_t(i)];
                    float* results = scratch(thread) + kAttentionScratch;
                    for (int piece = 0; piece < item.pieces; ++piece)
                        attend(work.layer, at, item, piece, scratch(thread), results);
                    gather(at, item, results);
                });
            case kGather:
                return each(int64_t(items_.size()), [&](int64_t i) {
                    const AttentionItem& item = items_[size_t(i)];
                    gather(at, item, at.results + item.in_parts);
                });
            case kAdd:
                return each(bunches(), [&](int64_t item) {
                    add(work, at, bunches_[size_t(item)], scratch(thread));
                });
            case kGate: {
                const Columns cut = columns(work);
                const int first = kTile * cut.begin(chunk), last = kTile * cut.begin(chunk + 1);
                for (const Bunch& bunch : bunches_)
                    gate(work.layer, at, bunch, first, last - first, scratch(thread));
                return;
            }
            case kNormalize:
                return each(step_->logit_count, [&](int64_t i) {
                    normalize(at.hidden + step_->logit_rows[i] * m_.hidden, m_.final_norm,
                              at.rounded + i * width_);
                });
            case kLogits: {
                const int tiles = m_.head.tiles();
                return logits(at, tiles * chunk / count, tiles * (chunk + 1) / count);
            }
        }
    }

    // No more chunks than the threads need to share them well.
    int few(int64_t count) const { return few(count, team_.size() * kChunks); }
    static int few(int64_t count, int most) {
        return int(std::min<int64_t>(count, std::min(most, kMostChunks)));
    }

    Arrays arrays(int part) const {
        auto now = [&](Array array) { return places_.wrote(part, array); };
        auto before = [&](Array array) { return places_.wrote(part > 0 ? part - 1 : 0, array); };
        return {hidden_[before(kHidden)], rounded_[before(kRounded)], hidden_[now(kHidden)],
                rounded_[now(kRounded)],  y_[now(kY)],                shrunk_[now(kShrunk)],
                queries_[now(kQueries)],  results_[now(kResults)]};
    }
    float* scratch(int thread) { return scratch_[size_t(thread)].take(0); }

#ifdef VENEER_TIMES
    void begin_times() { began_ = std::chrono::steady_clock::now(); }
    void add_time(int part) {
        const auto now = std::chrono::steady_clock::now();
        seconds[time_of(work_[size_t(part)])] += std::chrono::duration<double>(now - began_).count();
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
            case kAttend: case kGather: return kAttendTime;
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

    // ------------------------------------------------------------------------- a step

    // Some rows' queries that see one key head.
    struct AttentionItem {
        int64_t sequence, row;
        int rows, kv_head, first_head, head_count;
        int pieces;       // of the longest row's context
        size_t in_parts;  // where its pieces' results lie, if several threads compute them
    };

    // Neighbouring rows of one adapter, or of none.
    struct Bunch {
        const LoraAdapter* adapter;  // or null
        int64_t row;
        int rows;
    };
    int64_t bunches() const { return int64_t(bunches_.size()); }

    void prepare(const Step& step) {
        step_ = &step;
        const size_t rows = size_t(step.rows), half = size_t(m_.dim / 2);
        width_ = padded<bf16>(std::max({m_.hidden, query_width_, m_.intermediate}));
        wide_ = padded<float>(
            std::max({m_.hidden, query_width_ + 2 * kv_width_, 2 * m_.intermediate}));
        ranks_ = 0;
        for (int64_t s = 0; s < step.segment_count; ++s)
            for (int g = 0; g < m_.layer_count * kGroups; ++g)
                ranks_ = std::max(ranks_, step.segments[s].adapter->groups[g].ranks);
        prepare_bunches(step);
        const size_t normed = std::max(rows, size_t(step.logit_count));
        hidden_.take(rows * m_.hidden);
        rounded_.take(normed * width_);
        y_.take(rows * wide_);
        shrunk_.take(rows * size_t(ranks_) + kLanes);
        queries_.take(rows * query_width_);
        cos_ = angles_buffer_.take(2 * rows * half);
        sin_ = cos_ + rows * half;
        for (size_t row = 0; row < rows; ++row) {
            for (size_t i = 0; i < half; ++i) {
                const float angle = float(step.positions[row]) * m_.inv_freq[i];
                cos_[row * half + i] = std::cos(angle) * m_.rotary_scale;
                sin_[row * half + i] = std::sin(angle) * m_.rotary_scale;
            }
        }
        prepare_attention(step);
        std::fill(step.finite, step.finite + step.logit_count, uint8_t(1));
        // What `list` adds at most: it is called while others are at work.
        const size_t pieces =
            size_t((8 + 2 * team_.size()) * step.segment_count) + 2 * blocks_.size();
        for (Lists& lists : lists_) {
            lists.shrinks.clear(), lists.shrinks.reserve(most_shrinks(step));
            for (Wanted& wanted : lists.wanted) wanted.reserve(pieces);
        }
    }

    // A row's length in memory. Rows that are an even number of lines apart, as those of most
    // bases are, share a few sets of a cache and push each other out.
    template <class Number>
    static int padded(int width) {
        constexpr int line = kLine / sizeof(Number);
        return ((width + line - 1) / line | 1) * line;
    }

    void prepare_bunches(const Step& step) {
        // As many as the threads can share, and no larger than `expand` takes.
        const int64_t most = std::clamp<int64_t>(step.rows / team_.size(), 1, kBunch);
        bunches_.clear();
        int64_t row = 0;
        auto cut = [&](int64_t end, const LoraAdapter* adapter) {
            for (; row < end; row = std::min(row + most, end))
                bunches_.push_back({adapter, row, int(std::min(most, end - row))});
        };
        for (int64_t s = 0; s < step.segment_count; ++s) {
            cut(step.segments[s].begin, nullptr);
            cut(step.segments[s].end, step.segments[s].adapter);
        }
        cut(step.rows, nullptr);
    }

    void prepare_attention(const Step& step) {
        const int group = m_.heads / m_.kv_heads;
        const int heads_at_once = std::min(group, kMostQueries);
        const int rows_at_once = std::max(1, kMostQueries / group);
        int longest = 0;
        items_.clear();
        blocks_.clear();
        for (int64_t s = 0; s < step.sequences; ++s) {
            longest = std::max(longest, pieces(step.contexts[s]));
            const int64_t* blocks = step.block_tables + s * step.table_width;
            const int64_t used = (step.contexts[s] + m_.block_size - 1) / m_.block_size;
            blocks_.insert(blocks_.end(), blocks, blocks + used);
            const int64_t end = step.row_starts[s + 1];
            for (int64_t row = step.row_starts[s]; row < end; row += rows_at_once) {
                const int rows = int(std::min<int64_t>(rows_at_once, end - row));
                const int seen = pieces(step.positions[row + rows - 1] + 1);
                for (int head = 0; head < m_.kv_heads; ++head)
                    for (int first = 0; first < group; first += heads_at_once)
                        items_.push_back({s, row, rows, head, head * group + first,
                                          std::min(heads_at_once, group - first), seen, 0});
            }
        }
        const size_t results = size_t(longest) * kMostQueries * Piece::numbers(m_.dim);
        const int head_group = (m_.heads / m_.kv_heads + 2) * m_.dim;
        const int widest = std::max({m_.hidden, head_group, 2 * m_.intermediate});
        for (auto& each : scratch_)
            each.take(std::max(kAttentionScratch + results, size_t(kBunch * widest)));
        prepare_parts(longest);
    }

    // A few items with long contexts have their pieces computed by all threads.
    void prepare_parts(int longest) {
        parts_.clear();
        if (longest == 1 || int(items_.size()) >= kItemsToShare * team_.size()) return;
        size_t taken = 0;
        for (size_t i = 0; i < items_.size(); ++i) {
            items_[i].in_parts = taken;
            taken += size_t(items_[i].pieces) * kMostQueries * Piece::numbers(m_.dim);
            for (int piece = 0; piece < items_[i].pieces; ++piece) parts_.push_back({i, piece});
        }
        results_.take(taken);
    }
    bool in_parts() const { return !parts_.empty(); }

    void embed(const Arrays& at, int64_t row) {
        const bf16* from = m_.embedding + step_->tokens[row] * m_.hidden;
        float* to = at.hidden + row * m_.hidden;
        for (int i = 0; i < m_.hidden; i += kLanes) store(to + i, load(from + i));
        normalize(to, m_.layers[0].input_norm, at.rounded + row * width_);
    }

    // RMS norm into a row of the next product's inputs.
    void normalize(const float* from, const float* weight, bf16* to) const {
        Floats squares = zeros();
        for (int i = 0; i < m_.hidden; i += kLanes) {
            const Floats number = load(from + i);
            squares = fma(number, number, squares);
        }
        const Floats scale = all(1.0f / std::sqrt(sum(squares) / float(m_.hidden) + m_.epsilon));
        for (int i = 0; i < m_.hidden; i += kLanes) {
            store_bf16(to + i, mul(mul(load(from + i), scale), load(weight + i)));
        }
    }

    // ---------------------------------------------------------------------- products

    struct ShrinkItem {
        const Segment* segment;
        const LoraGroup* group;
        int64_t row, rows;
        int chunk;
    };

    // What a product's chunks go by.
    struct Lists {
        std::vector<ShrinkItem> shrinks;
        Wanted wanted[3];
    };
    Lists& lists(int part) { return lists_[places_.wrote(part, kLists)]; }
    const Lists& lists(int part) const { return lists_[places_.wrote(part, kLists)]; }

    size_t most_shrinks(const Step& step) const {
        const size_t chunks = size_t(ranks_ + kRankChunk - 1) / kRankChunk;
        return chunks * size_t(step.segment_count + step.rows / kShrinkRows);
    }

    int shrink_chunks(int part) const { return few(int64_t(lists(part).shrinks.size()), kShrinks); }

    void list(int part) {
        const Work& work = work_[size_t(part)];
        std::vector<ShrinkItem>& shrinks = lists(part).shrinks;
        shrinks.clear();
        for (int64_t s = 0; s < step_->segment_count; ++s) {
            const Segment& segment = step_->segments[s];
            const LoraGroup& lora = group_of(*segment.adapter, work.layer, work.group);
            if (lora.a == nullptr) continue;
            const int chunks = (lora.ranks + kRankChunk - 1) / kRankChunk;
            for (int64_t row = segment.begin; row < segment.end; row += kShrinkRows)
                for (int chunk = 0; chunk < chunks; ++chunk)
                    shrinks.push_back({&segment, &lora, row,
                                       std::min(kShrinkRows, segment.end - row), chunk});
        }
        want(work.layer, work.group, lists(part).wanted);
    }

    // y = W x of a group's fused linear, and h = A x of all adapters. Meanwhile, what the parts
    // after it read is brought.
    void product(int part, const Arrays& at, int number) const {
        const Work& work = work_[size_t(part)];
        const Linear& linear = m_.layers[work.layer].linears[work.group];
        const Lists& list = lists(part);
        const Columns cut = columns(work);
        const int shrinks = shrink_chunks(part), size = team_.size();
        // See `begin`.
        auto even = [&](int count, int thread) { return int(int64_t(count) * thread / size); };
        int thread = size - 1;
        while (number < even(shrinks, thread) + even(cut.chunks, thread)) --thread;
        const int shrink_number = number - even(cut.chunks, thread);
        if (shrink_number < even(shrinks, thread + 1)) {
            const size_t all = list.shrinks.size();
            for (size_t i = all * shrink_number / shrinks; i < all * (shrink_number + 1) / shrinks; ++i)
                shrink(at, list.shrinks[i], linear.inputs);
            return;
        }
        const int chunk = number - even(shrinks, thread + 1);
        const int first = cut.begin(chunk), last = cut.begin(chunk + 1);
        Asking asking(list.wanted, chunk, cut.chunks);
        asking.spread(row_groups(linear, int(step_->rows)) * linear.blocks() * (last - first) *
                      linear.parts);
        // In the order in which they lie.
        const int run = linear.parts == 1 ? last - first : 2;
        for (int tile = first; tile < last; tile += run)
            for (int p = 0; p < linear.parts; ++p)
                multiply_tiles(linear, p * cut.tiles + tile, p * cut.tiles + tile + run,
                               at.rounded_before, size_t(width_), int(step_->rows), at.y,
                               size_t(wide_), asking);
    }

    // How a linear's tiles are cut into chunks. A gate and what it multiplies are computed by
    // one thread, which finds both in its cache when it goes on with them.
    struct Columns {
        int unit;   // tiles that lie together
        int tiles;  // of each part
        int chunks;

        Columns(const Linear& linear, int most)
            : unit(linear.parts),
              tiles(linear.tiles() / linear.parts),
              chunks(std::min(tiles / unit, most)) {}

        // The first tile of a chunk.
        int begin(int chunk) const { return tiles / unit * chunk / chunks * unit; }
    };
    Columns columns(const Work& work) const {
        return {m_.layers[work.layer].linears[work.group], few(kMostChunks - kShrinks)};
    }

    // What is read after a product: the adapters' B of its own group, the cache after the keys'
    // and values' own, and the adapters' A of the next group.
    void want(int layer, Group group, Wanted (&lists)[3]) const {
        Wanted& expanding = lists[0];
        Wanted& cache = lists[1];
        Wanted& shrinking = lists[2];
        for (Wanted& list : lists) list.clear();
        for (int64_t s = 0; s < step_->segment_count; ++s) {
            const LoraGroup& lora = group_of(*step_->segments[s].adapter, layer, group);
            for (int member = 0; member < kMembers; ++member) {
                const LoraMember& update = lora.members[member];
                if (update.b != nullptr && group != kGateUp)
                    expanding.add(update.b, bytes(step_->segments[s], update.rank) *
                                                size_t(member_outputs(group, member)));
            }
        }
        if (group == kGateUp) want_columns(layer, expanding);
        if (group == kGateUp && layer + 1 < m_.layer_count) {
            const size_t block = size_t(m_.kv_heads) * m_.block_size * m_.dim;
            for (const int64_t id : blocks_) {
                cache.add(m_.layers[layer + 1].keys + size_t(id) * block, block * sizeof(bf16));
                cache.add(m_.layers[layer + 1].values + size_t(id) * block, block * sizeof(bf16));
            }
        }
        const int next = layer * kGroups + group + 1;
        if (next == m_.layer_count * kGroups) return;
        const int inputs = m_.layers[next / kGroups].linears[next % kGroups].inputs;
        for (int64_t s = 0; s < step_->segment_count; ++s) {
            const LoraGroup& lora = step_->segments[s].adapter->groups[next];
            if (lora.a != nullptr)
                shrinking.add(lora.a, bytes(step_->segments[s], lora.ranks) * size_t(inputs));
        }
    }

    // Of each thread, the columns of B that belong to its tiles.
    void want_columns(int layer, Wanted& expanding) const {
        const Columns cut = columns({kProduct, layer, kGateUp});
        const int size = team_.size();
        for (int thread = 0; thread < size; ++thread) {
            const int first = kTile * cut.begin(cut.chunks * thread / size);
            const int last = kTile * cut.begin(cut.chunks * (thread + 1) / size);
            for (int64_t s = 0; s < step_->segment_count; ++s) {
                const Segment& segment = step_->segments[s];
                const LoraGroup& lora = group_of(*segment.adapter, layer, kGateUp);
                for (int member = 0; member < 2; ++member) {
                    const LoraMember& update = lora.members[member];
                    if (update.b == nullptr) continue;
                    expanding.add(static_cast<const char*>(update.b) + bytes(segment, first),
                                  bytes(segment, last - first), size_t(update.rank),
                                  bytes(segment, m_.intermediate));
                }
            }
        }
    }

    static const LoraGroup& group_of(const LoraAdapter& adapter, int layer, Group group) {
        return adapter.groups[layer * kGroups + group];
    }
    static size_t bytes(const Segment& segment, int numbers) {
        return size_t(numbers) * (segment.adapter->is_float ? sizeof(float) : sizeof(bf16));
    }
    int member_outputs(Group group, int member) const {
        switch (group) {
            case kQkv: return member == 0 ? query_width_ : kv_width_;
            case kGateUp: return m_.intermediate;
            default: return m_.hidden;
        }
    }

    void shrink(const Arrays& at, const ShrinkItem& item, int inputs) const {
        const bf16* x = at.rounded_before + item.row * width_;
        float* h = at.shrunk + item.row * ranks_;
        if (item.segment->adapter->is_float)
            veneer::shrink<float>(*item.group, item.chunk, x, size_t(width_), inputs,
                                  int(item.rows), h, size_t(ranks_));
        else
            veneer::shrink<bf16>(*item.group, item.chunk, x, size_t(width_), inputs,
                                 int(item.rows), h, size_t(ranks_));
    }

    // One of a bunch's projections with its adapter's update, `count` outputs from `first` on:
    // `at.y` from `column` on and that, into `to` [rows, stride].
    void updated(const Arrays& at, int layer, Group group, int member, const Bunch& bunch,
                 int column, int first, int count, float* to, size_t stride) const {
        for (int row = 0; row < bunch.rows; ++row)
            std::memcpy(to + row * stride, at.y + (bunch.row + row) * wide_ + column,
                        size_t(count) * sizeof(float));
        if (bunch.adapter == nullptr) return;
        expand(*bunch.adapter, group_of(*bunch.adapter, layer, group).members[member],
               member_outputs(group, member), first, count, bunch.rows,
               {at.shrunk + bunch.row * ranks_, size_t(ranks_), to, stride});
    }

    // Ask for a bunch's y[first to first + count - 1]: half of it another thread has just
    // written, and its core may be far away.
    void ask_for_y(const Arrays& at, const Bunch& bunch, int first, int count) const {
        for (int64_t row = bunch.row; row < bunch.row + bunch.rows; ++row)
            for (int i = 0; i < count; i += kLanes)
                __builtin_prefetch(at.y + row * wide_ + first + i);
    }

    // hidden + y, then the next norm.
    void add(const Work& work, const Arrays& at, const Bunch& bunch, float* scratch) const {
        ask_for_y(at, bunch, 0, m_.hidden);
        const float* from = at.y + bunch.row * wide_;
        size_t stride = size_t(wide_);
        if (bunch.adapter != nullptr) {
            stride = size_t(m_.hidden);
            updated(at, work.layer, work.group, 0, bunch, 0, 0, m_.hidden, scratch, stride);
            from = scratch;
        }
        for (int64_t row = bunch.row; row < bunch.row + bunch.rows; ++row, from += stride) {
            const float* before = at.hidden_before + row * m_.hidden;
            float* to = at.hidden + row * m_.hidden;
            for (int i = 0; i < m_.hidden; i += kLanes)
                store(to + i, veneer::add(load(before + i), load(from + i)));
            if (work.norm != nullptr) normalize(to, work.norm, at.rounded + row * width_);
        }
    }

    // --------------------------------------------------------------------- attention

    // Of a bunch and a key head: finish its queries, keys and values.
    void rotate(int index, const Arrays& at, const Bunch& bunch, int head, float* scratch) const {
        const Layer& layer = m_.layers[index];
        const int group = m_.heads / m_.kv_heads, dim = m_.dim, queries = group * dim;
        const int query_at = head * queries, key_at = query_width_ + head * dim;
        const int value_at = key_at + kv_width_;
        const int64_t end = bunch.row + bunch.rows;
        ask_for_y(at, bunch, query_at, queries);
        ask_for_y(at, bunch, key_at, dim);
        ask_for_y(at, bunch, value_at, dim);
        for (int64_t row = bunch.row; row < end; ++row)
            ask_for_slot(layer.keys, layer.values, kv_, step_->slots[row], head);
        const size_t stride = size_t(queries + 2 * dim);
        updated(at, index, kQkv, 0, bunch, query_at, query_at, queries, scratch, stride);
        updated(at, index, kQkv, 1, bunch, key_at, head * dim, dim, scratch + queries, stride);
        updated(at, index, kQkv, 2, bunch, value_at, head * dim, dim, scratch + queries + dim,
                stride);
        float* query = scratch;
        for (int64_t row = bunch.row; row < end; ++row, query += 2 * dim) {
            bf16* to = at.queries + row * query_width_ + query_at;
            for (int g = 0; g < group; ++g, query += dim, to += dim) {
                turn(query, layer.query_norm, row);
                for (int d = 0; d < dim; d += kLanes) store_bf16(to + d, load(query + d));
            }
            turn(query, layer.key_norm, row);
            write_key(layer.keys, kv_, step_->slots[row], head, query);
            write_value(layer.values, kv_, step_->slots[row], head, query + dim);
        }
    }

    void turn(float* head, const float* norm, int64_t row) const {
        const int half = m_.dim / 2;
        if (norm != nullptr) {
            float squares = 0;
            for (int d = 0; d < m_.dim; ++d) squares += head[d] * head[d];
            const float scale = 1.0f / std::sqrt(squares / float(m_.dim) + m_.epsilon);
            for (int d = 0; d < m_.dim; ++d) head[d] *= scale * norm[d];
        }
        const float* cosine = cos_ + row * half;
        const float* sine = sin_ + row * half;
        for (int d = 0; d < half; ++d) {
            const float first = head[d], second = head[d + half];
            head[d] = first * cosine[d] - second * sine[d];
            head[d + half] = second * cosine[d] + first * sine[d];
        }
    }

    // An item's queries, row by row; how many there are.
    int queries(const Layer& layer, const Arrays& at, const AttentionItem& item, Query* to) const {
        int count = 0;
        for (int64_t row = item.row; row < item.row + item.rows; ++row) {
            const int64_t end = step_->positions[row] + 1;
            const int64_t first = layer.window > 0 ? std::max<int64_t>(0, end - layer.window) : 0;
            for (int h = 0; h < item.head_count; ++h) {
                const int column = (item.first_head + h) * m_.dim;
                to[count++] = {at.queries + row * query_width_ + column, int(first), int(end)};
            }
        }
        return count;
    }

    // One piece of an item: its queries' results into results[piece][query].
    void attend(int index, const Arrays& at, const AttentionItem& item, int piece, float* scratch,
                float* results) const {
        const Layer& layer = m_.layers[index];
        Query found[kMostQueries];
        Piece to[kMostQueries];
        const int count = queries(layer, at, item, found);
        for (int q = 0; q < count; ++q)
            to[q].at = results + size_t(piece * kMostQueries + q) * Piece::numbers(m_.dim);
        const Sequence sequence{layer.keys, layer.values,
                                step_->block_tables + item.sequence * step_->table_width,
                                item.kv_head};
        veneer::attend(sequence, kv_, found, count, piece, 1.0f / std::sqrt(float(m_.dim)),
                       scratch, to);
    }

    void gather(const Arrays& at, const AttentionItem& item, float* results) const {
        const size_t numbers = Piece::numbers(m_.dim);
        for (int64_t row = item.row; row < item.row + item.rows; ++row)
            for (int h = 0; h < item.head_count; ++h, results += numbers)
                veneer::gather(kv_, results, item.pieces, kMostQueries * numbers,
                               at.rounded + row * width_ + (item.first_head + h) * m_.dim);
    }

    // -------------------------------------------------------------------- gate, head

    // silu(gate) * up, of the columns that a thread has computed.
    void gate(int layer, const Arrays& at, const Bunch& bunch, int first, int count,
              float* scratch) const {
        const float* from = at.y + bunch.row * wide_ + first;
        size_t stride = size_t(wide_), apart = size_t(m_.intermediate);
        if (bunch.adapter != nullptr) {
            apart = size_t(count), stride = 2 * apart;
            updated(at, layer, kGateUp, 0, bunch, first, first, count, scratch, stride);
            updated(at, layer, kGateUp, 1, bunch, m_.intermediate + first, first, count,
                    scratch + apart, stride);
            from = scratch;
        }
        for (int64_t row = bunch.row; row < bunch.row + bunch.rows; ++row, from += stride) {
            bf16* to = at.rounded + row * width_ + first;
            for (int i = 0; i < count; i += kLanes) {
                const Floats gate = load(from + i);
                const Floats divisor = veneer::add(all(1.0f), exp(sub(zeros(), gate)));
                store_bf16(to + i, mul(div(gate, divisor), load(from + apart + i)));
            }
        }
    }

    void logits(const Arrays& at, int tile, int end) const {
        Asking asking;  // for nothing: it is the last
        multiply_tiles(m_.head, tile, end, at.rounded, size_t(width_), int(step_->logit_count),
                       step_->logits, size_t(m_.vocab), asking);
        const int first = tile * kTile, count = std::min(end * kTile, m_.vocab) - first;
        for (int64_t i = 0; i < step_->logit_count; ++i)
            if (!finite(step_->logits + i * m_.vocab + first, count))
                __atomic_store_n(step_->finite + i, uint8_t(0), __ATOMIC_RELAXED);
    }

    static bool finite(const float* numbers, int count) {
        Floats none = zeros();  // 0 times a number is 0, of what is none it is none
        int i = 0;
        for (; i + kLanes <= count; i += kLanes) none = fma(load(numbers + i), zeros(), none);
        if (i < count) none = fma(load(numbers + i, count - i), zeros(), none);
        return sum(none) == 0;
    }

    static constexpr int kChunks = 8;  // a thread and part: what the slowest still has to do
    static constexpr int kAttentionChunks = 16;
    static constexpr int kItemsToShare = 8;  // a thread's; more are shared well enough whole
    static constexpr int kHeadChunks = 64;
    static constexpr int64_t kShrinkRows = 32;

    static constexpr int kShrinks = 512;

    const Model& m_;
    Team& team_;
    const KvShape kv_;
    const int query_width_, kv_width_;
    std::vector<Work> work_;
    Places places_;
    // Of the step under way; what no part changes.
    const Step* step_ = nullptr;
    int width_ = 0, wide_ = 0, ranks_ = 0;
    Buffer<float> angles_buffer_;
    float *cos_ = nullptr, *sin_ = nullptr;
    std::vector<Bunch> bunches_;
    std::vector<int64_t> blocks_;  // of the cache, in the order in which attention reads them
    std::vector<AttentionItem> items_;
    std::vector<std::pair<size_t, int>> parts_;  // item and piece
    // What parts write.
    Placed<float> hidden_, y_, shrunk_, results_;
    Placed<bf16> rounded_, queries_;
    Lists lists_[kPlaces];
    std::vector<Buffer<float>> scratch_;  // by thread
};

}  // namespace veneer
