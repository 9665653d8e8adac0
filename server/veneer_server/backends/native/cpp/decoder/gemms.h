// A step's matrix multiplies, cut into chunks: y = W x of a group's fused linear (GEMM) and h = A x
// of all its adapters (LoRA's shrink). Meanwhile, what later phases read is prefetched.
#pragma once

#include <algorithm>
#include <vector>

#include "../kernels/prefetch.h"
#include "buffers.h"
#include "context.h"

namespace veneer {

class Gemms {
  public:
    explicit Gemms(const StepContext& context) : ctx_(context) {}

    // `blocks`: the KV cache's, in the order in which attention reads them.
    void prepare(const std::vector<int64_t>& blocks) {
        blocks_ = &blocks;
        // The most that `list` adds: it must not allocate, since other threads are at work.
        const size_t pieces =
            size_t((8 + 2 * ctx_.threads) * ctx_.step->segment_count + ctx_.threads) +
            2 * blocks.size();
        for (Lists& lists : lists_) {
            lists.shrinks.clear(), lists.shrinks.reserve(most_shrinks());
            for (PrefetchList& prefetches : lists.prefetches) prefetches.reserve(pieces);
        }
    }

    // List what a phase's chunks compute and prefetch, in one of the versions.
    void list(int layer, Group group, int version) {
        std::vector<ShrinkItem>& shrinks = lists_[version].shrinks;
        shrinks.clear();
        for (int64_t s = 0; s < ctx_.step->segment_count; ++s) {
            const Segment& segment = ctx_.step->segments[s];
            const LoraGroup& lora = group_of(*segment.adapter, layer, group);
            if (lora.a == nullptr) continue;
            const int chunks = (lora.ranks + kRankChunk - 1) / kRankChunk;
            for (int64_t row = segment.begin; row < segment.end; row += kShrinkRows)
                for (int chunk = 0; chunk < chunks; ++chunk)
                    shrinks.push_back(
                        {&segment, &lora, row, std::min(kShrinkRows, segment.end - row), chunk});
        }
        list_prefetches(layer, group, lists_[version].prefetches);
    }

    int chunks(int layer, Group group, int version) const {
        return shrink_chunks(version) + ctx_.columns(layer, group).chunks;
    }

    // The first chunk of a thread's share: an even part of the shrinks, which come first since a
    // tile takes less time, then an even part of the tiles, all neighbours.
    int begin(int chunks, int version, int thread) const {
        const int shrinks = shrink_chunks(version);
        return even(shrinks, thread) + even(chunks - shrinks, thread);
    }

    void chunk(int layer, Group group, int version, const Arrays& at, int number) const {
        const Linear& linear = ctx_.model.layers[layer].linears[group];
        const Lists& list = lists_[version];
        const Columns cut = ctx_.columns(layer, group);
        const int shrinks = shrink_chunks(version);
        const int thread = owner(shrinks + cut.chunks, version, number);
        const int shrink_number = number - even(cut.chunks, thread);
        if (shrink_number < even(shrinks, thread + 1)) {
            const size_t all = list.shrinks.size();
            const size_t end = all * (shrink_number + 1) / shrinks;
            for (size_t i = all * shrink_number / shrinks; i < end; ++i)
                shrink(at, list.shrinks[i], linear.inputs);
            return;
        }
        multiply(linear, cut, number - even(shrinks, thread + 1), list.prefetches, at);
    }

  private:
    struct ShrinkItem {
        const Segment* segment;
        const LoraGroup* group;
        int64_t row, rows;
        int chunk;
    };

    // What a phase's chunks compute and prefetch.
    struct Lists {
        std::vector<ShrinkItem> shrinks;
        PrefetchList prefetches[4];
    };

    size_t most_shrinks() const {
        const size_t chunks = size_t(ctx_.ranks + kRankChunk - 1) / kRankChunk;
        return chunks * size_t(ctx_.step->segment_count + ctx_.step->rows / kShrinkRows);
    }
    int shrink_chunks(int version) const {
        return chunk_count(int64_t(lists_[version].shrinks.size()), kShrinks);
    }
    // The thread whose share has a chunk. Shares begin at most two chunks below an even cut, so the
    // search from there is short.
    int owner(int chunks, int version, int chunk) const {
        int thread = int(int64_t(chunk) * ctx_.threads / chunks);
        while (thread + 1 < ctx_.threads && begin(chunks, version, thread + 1) <= chunk) ++thread;
        return thread;
    }
    int even(int count, int thread) const { return int(int64_t(count) * thread / ctx_.threads); }

    void multiply(const Linear& linear, const Columns& cut, int chunk,
                  const PrefetchList (&prefetches)[4], const Arrays& at) const {
        const int rows = int(ctx_.step->rows);
        const int first = cut.begin(chunk), last = cut.begin(chunk + 1);
        Prefetcher prefetcher(prefetches, chunk, cut.chunks);
        prefetcher.spread(row_groups(linear, rows) * linear.blocks() * (last - first) *
                          linear.parts);
        // In the order in which they lie in memory.
        const int run = linear.parts == 1 ? last - first : 2;
        for (int tile = first; tile < last; tile += run)
            for (int p = 0; p < linear.parts; ++p)
                multiply_tiles(linear, p * cut.tiles + tile, p * cut.tiles + tile + run,
                               at.rounded_before, size_t(ctx_.width), rows, at.y, size_t(ctx_.wide),
                               prefetcher);
    }

    void shrink(const Arrays& at, const ShrinkItem& item, int inputs) const {
        const bf16* x = at.rounded_before + item.row * ctx_.width;
        float* h = at.shrunk + item.row * ctx_.ranks;
        if (item.segment->adapter->is_float)
            veneer::shrink<float>(*item.group, item.chunk, x, size_t(ctx_.width), inputs,
                                  int(item.rows), h, size_t(ctx_.ranks));
        else
            veneer::shrink<bf16>(*item.group, item.chunk, x, size_t(ctx_.width), inputs,
                                 int(item.rows), h, size_t(ctx_.ranks));
    }

    // What is read after a group's GEMM: its adapters' B; after the GEMM of q, k and v the KV
    // cache; the adapters' A of the next group; and where each thread begins to read the next
    // group's weights.
    void list_prefetches(int layer, Group group, PrefetchList (&lists)[4]) const {
        PrefetchList& expanding = lists[0];
        PrefetchList& cache = lists[1];
        PrefetchList& shrinking = lists[2];
        for (PrefetchList& list : lists) list.clear();
        const Model& model = ctx_.model;
        for (int64_t s = 0; s < ctx_.step->segment_count; ++s) {
            const LoraGroup& lora = group_of(*ctx_.step->segments[s].adapter, layer, group);
            for (int member = 0; member < kMembers; ++member) {
                const LoraMember& update = lora.members[member];
                if (update.b != nullptr && group != kGateUp)
                    expanding.add(update.b, bytes(ctx_.step->segments[s], update.rank) *
                                                size_t(ctx_.member_outputs(group, member)));
            }
        }
        if (group == kGateUp) list_prefetches_of_columns(layer, expanding);
        const size_t block = size_t(model.kv_heads) * model.block_size * model.dim;
        if (group == kGateUp && layer + 1 < model.layer_count &&
            2 * blocks_->size() * block * sizeof(bf16) <= kMostCache) {
            for (const int64_t id : *blocks_) {
                cache.add(model.layers[layer + 1].keys + size_t(id) * block, block * sizeof(bf16));
                cache.add(model.layers[layer + 1].values + size_t(id) * block,
                          block * sizeof(bf16));
            }
        }
        const int next = layer * kGroups + group + 1;
        if (matrix::kPresent && ctx_.step->rows <= kFewRows)
            list_prefetches_of_weights(next, lists[3]);
        if (next == model.layer_count * kGroups) return;
        const int inputs = model.layers[next / kGroups].linears[next % kGroups].inputs;
        for (int64_t s = 0; s < ctx_.step->segment_count; ++s) {
            const LoraGroup& lora = ctx_.step->segments[s].adapter->groups[next];
            if (lora.a != nullptr)
                shrinking.add(lora.a, bytes(ctx_.step->segments[s], lora.ranks) * size_t(inputs));
        }
    }

    // Where each thread begins to read a group's weights, or after the last group the head's. The
    // GEMM itself prefetches what comes some blocks later.
    void list_prefetches_of_weights(int next, PrefetchList& weights) const {
        const Model& model = ctx_.model;
        const bool head = next == model.layer_count * kGroups;
        const int layer = next / kGroups;
        const Group group = Group(next % kGroups);
        for (int thread = 0; thread < ctx_.threads; ++thread) {
            if (head) {
                weights.add(model.head.tile(even(model.head.tiles(), thread)), kAhead);
                continue;
            }
            const Columns cut = ctx_.columns(layer, group);
            const int first = cut.begin(even(cut.chunks, thread));
            weights.add(model.layers[layer].linears[group].tile(first), kAhead);
        }
    }

    // For each thread, the columns of B that belong to its tiles.
    void list_prefetches_of_columns(int layer, PrefetchList& expanding) const {
        const Columns cut = ctx_.columns(layer, kGateUp);
        for (int thread = 0; thread < ctx_.threads; ++thread) {
            const int first = kTile * cut.begin(even(cut.chunks, thread));
            const int last = kTile * cut.begin(even(cut.chunks, thread + 1));
            for (int64_t s = 0; s < ctx_.step->segment_count; ++s) {
                const Segment& segment = ctx_.step->segments[s];
                const LoraGroup& lora = group_of(*segment.adapter, layer, kGateUp);
                for (int member = 0; member < 2; ++member) {
                    const LoraMember& update = lora.members[member];
                    if (update.b == nullptr) continue;
                    expanding.add(static_cast<const char*>(update.b) + bytes(segment, first),
                                  bytes(segment, last - first), size_t(update.rank),
                                  bytes(segment, ctx_.model.intermediate));
                }
            }
        }
    }

    static size_t bytes(const Segment& segment, int numbers) {
        return size_t(numbers) * (segment.adapter->is_float ? sizeof(float) : sizeof(bf16));
    }

    static constexpr int64_t kShrinkRows = kMatrixRows;
    // With more rows a multiply has no time to spare for the beginning of the next weights.
    static constexpr int64_t kFewRows = 3;
    // Bytes of the KV cache that are prefetched, at most. A multiply on matrix registers takes so
    // little time that more would delay it, and evict B.
    static constexpr size_t kMostCache = matrix::kPresent ? 2 << 20 : SIZE_MAX;

    const StepContext& ctx_;
    const std::vector<int64_t>* blocks_ = nullptr;
    Lists lists_[kVersions];
};

}  // namespace veneer
