// Lists the memory that a group's GEMM prefetches for later phases. Each thread prefetches the
// memory that it will itself read.
#pragma once

#include <algorithm>
#include <vector>

#include "../kernels/prefetch.h"
#include "context.h"

namespace veneer {

// A part of h = A x: up to 16 rows of a segment and up to 64 ranks.
struct ShrinkItem {
    const Segment* segment;
    const LoraGroup* group;
    int64_t row, rows;
    int chunk;
};

// Call `function` for all items of a group's shrinks. `group` is layer * kGroups + group.
template <class Function>
inline void each_shrink(const Step& step, int group, const Function& function) {
    constexpr int64_t rows = kMatrixRows;
    for (int64_t s = 0; s < step.segment_count; ++s) {
        const Segment& segment = step.segments[s];
        const LoraGroup& lora = segment.adapter->groups[group];
        if (lora.a == nullptr) continue;
        const int chunks = (lora.ranks + kRankChunk - 1) / kRankChunk;
        for (int64_t row = segment.begin; row < segment.end; row += rows)
            for (int chunk = 0; chunk < chunks; ++chunk)
                function(
                    ShrinkItem{&segment, &lora, row, std::min(rows, segment.end - row), chunk});
    }
}

inline Items shrink_items(int64_t count) { return {count, chunk_count(count, kShrinks)}; }

// A part of the KV cache that attention reads: some heads of one sequence, in its blocks `first` to
// end - 1.
struct KvRead {
    int64_t sequence;
    int first, end;
    int head, heads;
};
struct KvReads {
    std::vector<KvRead> all;   // thread by thread
    std::vector<size_t> ends;  // where each thread's reads end
};

using PrefetchLists = PrefetchList[PrefetchList::kLists];

class Prefetches {
  public:
    explicit Prefetches(const StepContext& context) : ctx_(context), model_(context.model) {}

    void prepare(const KvReads& reads) {
        reads_ = &reads;
        blocks_ = 0;
        for (const KvRead& read : reads.all) blocks_ += size_t(read.end - read.first);
    }

    // Reserve memory for the most that `list` adds.
    void reserve(PrefetchLists& lists) const {
        const size_t threads = size_t(ctx_.threads), tiles = ctx_.row_tiles.size();
        const size_t segments = size_t(ctx_.step->segment_count);
        lists[kExpanding].reserve(kMembers * (tiles + threads) + 2 * threads * segments,
                                  ctx_.threads);
        lists[kCache].reserve(2 * blocks_, ctx_.threads);
        lists[kShrinking].reserve(segments + threads, ctx_.threads);
        lists[kWeights].reserve(threads, ctx_.threads);
    }

    // List what is read after a group's GEMM: the adapters' B; after the GEMM of gate and up, the
    // next layer's KV cache; the adapters' A of the next group; and the weights with which each
    // thread begins the next group. On matrix registers a GEMM of several rows takes so little time
    // that these prefetches would cost as much as they save: there B is prefetched by the phase
    // that reads it, and the KV cache only if the step has few rows.
    void list(int layer, Group group, PrefetchLists& lists) const {
        for (PrefetchList& list : lists) list.clear();
        const int next = layer * kGroups + group + 1;
        const bool few = ctx_.step->rows <= kFewRows;
        if (ctx_.step->segment_count > 0) {
            if (!matrix::kPresent) list_expanding(layer, group, lists[kExpanding]);
            if (next < model_.layer_count * kGroups) list_shrinking(next, lists[kShrinking]);
        }
        if (group == kGateUp && layer + 1 < model_.layer_count && (few || !matrix::kPresent))
            list_cache(layer + 1, lists[kCache]);
        if (matrix::kPresent && few) list_weights(next, lists[kWeights]);
    }

  private:
    enum { kExpanding, kCache, kShrinking, kWeights };

    size_t head_numbers() const { return size_t(model_.block_size) * size_t(model_.dim); }

    void list_expanding(int layer, Group group, PrefetchList& list) const {
        const int64_t tiles = int64_t(ctx_.row_tiles.size());
        if (group == kGateUp) return list_columns(layer, list);
        const int heads = group == kQkv ? model_.kv_heads : 1;
        const Items items = ctx_.items(tiles * heads);
        for (int thread = 0; thread < ctx_.threads; ++thread) {
            const int64_t end = items.of_thread(thread + 1, ctx_.threads);
            const LoraAdapter* before = nullptr;
            for (int64_t item = items.of_thread(thread, ctx_.threads); item < end;) {
                const RowTile& tile = ctx_.row_tiles[size_t(item / heads)];
                const int first = int(item % heads);
                const int last = int(std::min<int64_t>(heads, first + end - item));
                // Adjacent row tiles may have the same adapter.
                if (tile.adapter != before && tile.adapter != nullptr)
                    for (int member = 0; member < kMembers; ++member)
                        add_outputs(layer, group, member, *tile.adapter, first, last, heads, list);
                before = tile.adapter;
                item += last - first;
            }
            list.end_thread();
        }
    }

    // Add B's columns of the parts first to last - 1, of `parts` equal ones.
    void add_outputs(int layer, Group group, int member, const LoraAdapter& adapter, int first,
                     int last, int parts, PrefetchList& list) const {
        const LoraMember& update = group_of(adapter, layer, group).members[member];
        if (update.b == nullptr) return;
        const size_t line = number_bytes(adapter) * size_t(ctx_.member_outputs(group, member));
        if (last - first == parts) return list.add(update.b, line * size_t(update.rank));
        const size_t part = line / size_t(parts);
        list.add(static_cast<const char*>(update.b) + part * size_t(first),
                 part * size_t(last - first), size_t(update.rank), line);
    }

    // List the columns of gate's and up's B that belong to each thread's tiles.
    void list_columns(int layer, PrefetchList& list) const {
        const Columns cut = ctx_.columns(layer, kGateUp);
        const int64_t segments = ctx_.step->segment_count;
        for (int thread = 0; thread < ctx_.threads; ++thread) {
            const int first = kTile * cut.begin(ctx_.even(cut.chunks, thread));
            const int last = kTile * cut.begin(ctx_.even(cut.chunks, thread + 1));
            for (int64_t s = 0; s < segments; ++s) {
                const LoraAdapter& adapter = *ctx_.step->segments[s].adapter;
                const size_t number = number_bytes(adapter);
                for (int member = 0; member < 2; ++member) {
                    const LoraMember& update = group_of(adapter, layer, kGateUp).members[member];
                    if (update.b == nullptr) continue;
                    list.add(static_cast<const char*>(update.b) + number * size_t(first),
                             number * size_t(last - first), size_t(update.rank),
                             number * size_t(model_.intermediate));
                }
            }
            list.end_thread();
        }
    }

    void list_cache(int layer, PrefetchList& list) const {
        const Layer& of = model_.layers[layer];
        const size_t block = size_t(model_.kv_heads) * head_numbers();
        size_t at = 0;
        for (int thread = 0; thread < ctx_.threads; ++thread) {
            for (; at < reads_->ends[size_t(thread)]; ++at) {
                const KvRead& read = reads_->all[at];
                const int64_t* table =
                    ctx_.step->block_tables + read.sequence * ctx_.step->table_width;
                const size_t bytes = size_t(read.heads) * head_numbers() * sizeof(bf16);
                for (int b = read.first; b < read.end; ++b) {
                    const size_t from =
                        size_t(table[b]) * block + size_t(read.head) * head_numbers();
                    list.add(of.keys + from, bytes), list.add(of.values + from, bytes);
                }
            }
            list.end_thread();
        }
    }

    void list_shrinking(int next, PrefetchList& list) const {
        const int inputs = model_.layers[next / kGroups].linears[next % kGroups].inputs;
        int64_t count = 0, item = 0;
        each_shrink(*ctx_.step, next, [&](const ShrinkItem&) { ++count; });
        const Items items = shrink_items(count);
        int thread = 0;
        const LoraGroup* before = nullptr;
        const auto end_threads = [&] {
            for (; thread < ctx_.threads && item >= items.of_thread(thread + 1, ctx_.threads);
                 ++thread, before = nullptr)
                list.end_thread();
        };
        each_shrink(*ctx_.step, next, [&](const ShrinkItem& shrink) {
            end_threads();
            // Several items may read one A. Each thread prefetches all of it, even if it only
            // computes some ranks.
            if (shrink.group != before)
                list.add(shrink.group->a, number_bytes(*shrink.segment->adapter) *
                                              size_t(shrink.group->ranks) * size_t(inputs));
            before = shrink.group;
            ++item;
        });
        end_threads();
    }

    // List the weights with which each thread begins a group or, after the last group, the head.
    // The GEMM itself prefetches later blocks.
    void list_weights(int next, PrefetchList& weights) const {
        const bool head = next == model_.layer_count * kGroups;
        const int layer = next / kGroups;
        const Group group = Group(next % kGroups);
        for (int thread = 0; thread < ctx_.threads; ++thread) {
            if (head) {
                weights.add(model_.head.tile(ctx_.even(model_.head.tiles(), thread)), kAhead);
            } else {
                const Columns cut = ctx_.columns(layer, group);
                const int first = cut.begin(ctx_.even(cut.chunks, thread));
                weights.add(model_.layers[layer].linears[group].tile(first), kAhead);
            }
            weights.end_thread();
        }
    }

    static constexpr int64_t kFewRows = 3;

    const StepContext& ctx_;
    const Model& model_;
    const KvReads* reads_ = nullptr;
    size_t blocks_ = 0;  // number of blocks that are read, in all sequences
};

}  // namespace veneer
