// The read-only context of a step: its rows, the lengths of its arrays' rows in memory, and how its
// work is cut into chunks.
#pragma once

#include <algorithm>
#include <vector>

#include "../kernels/shared.h"
#include "../step.h"
#include "../thread_pool.h"

namespace veneer {

// The arrays that a phase reads and writes. A chunk may be executed by two threads at the same
// time: see kernels/shared.h for how the arrays are accessed.
struct Arrays {
    const float* hidden_before;
    const bf16* rounded_before;
    float* hidden;  // [rows, hidden]
    bf16* rounded;  // [rows, width] a GEMM's inputs
    const uint8_t* int8_before;
    uint8_t* int8;   // the same in 8 bits; see Int8Rows
    float* y;        // [rows, wide] a GEMM's results, without the adapters' updates
    float* shrunk;   // [rows, ranks]
    bf16* queries;   // [rows, query width]
    float* results;  // results of attention's pieces
};

// Adjacent rows with one adapter, or without any, whose updates are computed together.
struct RowTile {
    const LoraAdapter* adapter;  // or null
    int64_t row;
    int rows;
    bool first;  // the first row tile of its adapter's rows
};

// The number of chunks for `count` items of work: one per item, but no more than `most`, which is
// what threads need to share the work well.
inline int chunk_count(int64_t count, int most) {
    return int(std::min<int64_t>(count, std::min(most, kMaxChunks)));
}

// The items of a phase, which are grouped into chunks, and these into the threads' shares.
struct Items {
    int64_t count;
    int chunks;

    int64_t of_chunk(int chunk) const { return count * chunk / chunks; }
    // The first item of a thread's share; for thread `threads`, the end of all items.
    int64_t of_thread(int thread, int threads) const {
        return chunks == 0 ? 0 : of_chunk(int(int64_t(chunks) * thread / threads));
    }
};

// How a linear's tiles are cut into chunks. Matching columns of gate and up are computed by the
// same thread, which then finds both in its cache when it multiplies them.
struct Columns {
    int unit;   // tiles that stay together
    int tiles;  // tiles of each part
    int chunks;

    Columns(const Linear& linear, int most)
        : unit(linear.parts),
          tiles(linear.tiles() / linear.parts),
          chunks(std::min(tiles / unit, most)) {}

    // The first tile of a chunk.
    int begin(int chunk) const { return tiles / unit * chunk / chunks * unit; }
};

constexpr int kShrinks = 512;  // most chunks of a GEMM phase that compute shrinks, not tiles

struct StepContext {
    StepContext(const Model& model_, int threads_)
        : model(model_),
          threads(threads_),
          kv{model.kv_heads, model.dim, model.block_size},
          query_width(model.heads * model.dim),
          kv_width(model.kv_heads * model.dim),
          width(padded<bf16>(std::max({model.hidden, query_width, model.intermediate}))),
          int8_width(std::max({model.hidden, query_width, model.intermediate})),
          int8_stride(padded<uint8_t>(int(Int8Rows::bytes(size_t(int8_width))))),
          wide(padded<float>(
              std::max({model.hidden, query_width + 2 * kv_width, 2 * model.intermediate}))) {}

    void prepare(const Step& of) {
        step = &of;
        ranks = 0;
        for (int64_t s = 0; s < step->segment_count; ++s)
            for (int g = 0; g < model.layer_count * kGroups; ++g)
                ranks = std::max(ranks, step->segments[s].adapter->groups[g].ranks);
        cut_row_tiles();
    }

    // Whether a group's inputs are rounded to 8 bits. Attention writes the inputs of `o` by the
    // heads that share a key head, or 12 of them at a time; unless these are whole blocks, the
    // inputs are not rounded.
    bool int8_inputs(int layer, Group group) const {
        static_assert(kMaxQueries * kLanes % kBlock == 0);  // a head has a multiple of 16 numbers
        const bool whole = model.heads / model.kv_heads * model.dim % kBlock == 0;
        return model.layers[layer].linears[group].int8_inputs && (group != kOutput || whole);
    }
    // A GEMM's inputs, written by the previous phase; in 8 bits too, if `int8`.
    Inputs inputs(const Arrays& at, bool int8) const {
        return {at.rounded_before, size_t(width),
                Int8Rows{int8 ? at.int8_before : nullptr, size_t(int8_stride), size_t(int8_width)}};
    }
    // Round columns `first` to end - 1, whole blocks, of a row of `at.rounded` to 8 bits.
    void write_int8(const Arrays& at, int64_t row, int first, int end) const {
        const Int8Output to{at.int8, size_t(int8_stride), size_t(int8_width)};
        to.write(row, at.rounded + row * width, first / kBlock, end / kBlock);
    }

    // See `chunk_count`.
    int chunks(int64_t count) const { return chunk_count(count, threads * kChunks); }

    // Where a thread's share of `count` chunks begins, if all shares are equal.
    int even(int count, int thread) const { return int(int64_t(count) * thread / threads); }

    Columns columns(int layer, Group group) const {
        return {model.layers[layer].linears[group], chunks(kMaxChunks - kShrinks)};
    }

    Items items(int64_t count) const { return {count, chunks(count)}; }

    // Floats of a thread's scratch that a row tile takes.
    size_t scratch() const {
        const int head_group = (model.heads / model.kv_heads + 2) * model.dim;
        return size_t(kRowTile * std::max({model.hidden, head_group, 2 * model.intermediate}));
    }

    int member_outputs(Group group, int member) const {
        switch (group) {
            case kQkv: return member == 0 ? query_width : kv_width;
            case kGateUp: return model.intermediate;
            default: return model.hidden;
        }
    }

    // Compute a row tile's outputs of one projection, with its adapter's update: `count` outputs
    // from output `first` on, to `to` [rows, stride]. In `at.y` they begin at `column`.
    void updated(const Arrays& at, int layer, Group group, int member, const RowTile& row_tile,
                 int column, int first, int count, float* to, size_t stride) const {
        for (int row = 0; row < row_tile.rows; ++row)
            load_numbers(to + row * stride, at.y + (row_tile.row + row) * wide + column, count);
        if (row_tile.adapter == nullptr) return;
        expand(*row_tile.adapter, group_of(*row_tile.adapter, layer, group).members[member],
               member_outputs(group, member), first, count, row_tile.rows,
               {at.shrunk + row_tile.row * ranks, size_t(ranks), to, stride});
    }

    // Prefetch the part of B that `updated` reads with the same arguments.
    void prefetch_update(int layer, Group group, int member, const RowTile& row_tile, int first,
                         int count) const {
        if (row_tile.adapter == nullptr) return;
        const LoraMember& update = group_of(*row_tile.adapter, layer, group).members[member];
        if (update.b == nullptr) return;
        const size_t number = number_bytes(*row_tile.adapter), bytes = number * size_t(count);
        const size_t stride = number * size_t(member_outputs(group, member));
        const char* line = static_cast<const char*>(update.b) + number * size_t(first);
        for (int rank = 0; rank < update.rank; ++rank, line += stride)
            for (size_t i = 0; i < bytes; i += kLine) prefetch_near(line + i);
    }

    // Prefetch a row tile's y[first to first + count - 1]: other threads have just written some of
    // it, and their cores may be far away.
    void prefetch_y(const Arrays& at, const RowTile& row_tile, int first, int count) const {
        for (int64_t row = row_tile.row; row < row_tile.row + row_tile.rows; ++row)
            for (int i = 0; i < count; i += kLanes)
                __builtin_prefetch(at.y + row * wide + first + i);
    }

    const Model& model;
    const int threads;
    const KvShape kv;
    const int query_width, kv_width;
    const int width;                    // numbers that a row of `rounded` takes in memory
    const int int8_width, int8_stride;  // numbers of a row of `int8`, and the bytes it takes
    const int wide;                     // numbers that a row of `y` takes in memory
    const Step* step = nullptr;
    int ranks = 0;  // largest sum of ranks of any group of any adapter in the step
    std::vector<RowTile> row_tiles;

  private:
    static constexpr int kChunks =
        8;  // per thread and phase; bounds the work that the slowest thread still has to do

    // A row's length in memory: an odd number of cache lines. With an even number, as most bases
    // have, rows would share a few sets of a cache and evict each other.
    template <class Number>
    static int padded(int width) {
        constexpr int line = kLine / sizeof(Number);
        return ((width + line - 1) / line | 1) * line;
    }

    void cut_row_tiles() {
        // Cut enough row tiles for all threads, and none larger than `expand` takes.
        const int64_t most = std::clamp<int64_t>(step->rows / threads, 1, kRowTile);
        row_tiles.clear();
        int64_t row = 0;
        auto cut = [&](int64_t end, const LoraAdapter* adapter) {
            const int64_t begin = row;
            for (; row < end; row = std::min(row + most, end))
                row_tiles.push_back({adapter, row, int(std::min(most, end - row)), row == begin});
        };
        for (int64_t s = 0; s < step->segment_count; ++s) {
            cut(step->segments[s].begin, nullptr);
            cut(step->segments[s].end, step->segments[s].adapter);
        }
        cut(step->rows, nullptr);
    }
};

}  // namespace veneer
