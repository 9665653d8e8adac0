// A step's matrix multiplies, cut into chunks: y = W x for a group's fused linear (GEMM), and
// h = A x for all adapters (LoRA's shrink). Meanwhile memory for later phases is prefetched.
#pragma once

#include <algorithm>
#include <vector>

#include "buffers.h"
#include "context.h"
#include "prefetches.h"

namespace veneer {

class Gemms {
  public:
    explicit Gemms(const StepContext& context) : ctx_(context), prefetches_(context) {}

    // Reserve memory before a step: `list` must not allocate, since other threads are running then.
    void prepare(const KvReads& reads) {
        prefetches_.prepare(reads);
        for (Lists& lists : lists_) {
            lists.shrinks.clear(), lists.shrinks.reserve(most_shrinks());
            prefetches_.reserve(lists.prefetches);
        }
    }

    // List what a phase's chunks compute and prefetch, in the given version of the lists.
    void list(int layer, Group group, int version) {
        std::vector<ShrinkItem>& shrinks = lists_[version].shrinks;
        shrinks.clear();
        each_shrink(*ctx_.step, layer * kGroups + group,
                    [&](const ShrinkItem& item) { shrinks.push_back(item); });
        prefetches_.list(layer, group, lists_[version].prefetches);
    }

    int chunks(int layer, Group group, int version) const {
        return shrink_chunks(version) + ctx_.columns(layer, group).chunks;
    }

    // The first chunk of a thread's share. A share is an equal part of the shrinks, then an equal
    // part of the tiles, all adjacent. Shrinks come first, since a tile takes less time.
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
            const Items items{int64_t(list.shrinks.size()), shrinks};
            for (int64_t i = items.of_chunk(shrink_number); i < items.of_chunk(shrink_number + 1);
                 ++i)
                shrink(at, list.shrinks[size_t(i)], linear.inputs);
            return;
        }
        const int chunk = number - even(shrinks, thread + 1), first = even(cut.chunks, thread);
        Prefetcher prefetcher(list.prefetches, thread, chunk - first,
                              even(cut.chunks, thread + 1) - first);
        multiply(layer, group, cut, chunk, prefetcher, at);
    }

  private:
    // The shrinks and prefetches of a phase's chunks.
    struct Lists {
        std::vector<ShrinkItem> shrinks;
        PrefetchLists prefetches;
    };

    size_t most_shrinks() const {
        const size_t chunks = size_t(ctx_.ranks + kRankChunk - 1) / kRankChunk;
        return chunks * size_t(ctx_.step->segment_count + ctx_.step->rows / kMatrixRows);
    }
    int shrink_chunks(int version) const {
        return shrink_items(int64_t(lists_[version].shrinks.size())).chunks;
    }
    // The thread whose share has this chunk. Shares begin at most two chunks below an even cut, so
    // the search from there is short.
    int owner(int chunks, int version, int chunk) const {
        int thread = int(int64_t(chunk) * ctx_.threads / chunks);
        while (thread + 1 < ctx_.threads && begin(chunks, version, thread + 1) <= chunk) ++thread;
        return thread;
    }
    int even(int count, int thread) const { return ctx_.even(count, thread); }

    void multiply(int layer, Group group, const Columns& cut, int chunk, Prefetcher& prefetcher,
                  const Arrays& at) const {
        const Linear& linear = ctx_.model.layers[layer].linears[group];
        const int rows = int(ctx_.step->rows);
        const Inputs inputs = ctx_.inputs(at, ctx_.int8_inputs(layer, group));
        const int first = cut.begin(chunk), last = cut.begin(chunk + 1);
        prefetcher.spread(row_groups(linear, inputs, rows) * linear.blocks() * (last - first) *
                          linear.parts);
        // Multiply tiles in the order in which they lie in memory.
        const int run = linear.parts == 1 ? last - first : 2;
        for (int tile = first; tile < last; tile += run)
            for (int p = 0; p < linear.parts; ++p)
                multiply_tiles(linear, p * cut.tiles + tile, p * cut.tiles + tile + run, inputs,
                               rows, at.y, size_t(ctx_.wide), prefetcher);
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

    const StepContext& ctx_;
    Prefetches prefetches_;
    Lists lists_[kVersions];
};

}  // namespace veneer
