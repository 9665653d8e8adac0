// A step's attention, cut into chunks. First queries, keys and values are finished, and keys and
// values written to the KV cache; then a few rows' queries at a time attend to one key head. Long
// contexts are cut into pieces that threads share, as in flash-decoding.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "buffers.h"
#include "context.h"
#include "prefetches.h"

namespace veneer {

class Heads {
  public:
    explicit Heads(const StepContext& context) : ctx_(context), m_(context.model) {}

    void prepare() {
        prepare_angles();
        prepare_items();
        prepare_shared_pieces();
        prepare_reads();
    }

    // Floats of scratch that attention takes per thread.
    size_t scratch() const {
        return attention_scratch(m_.dim) + results_of_item() + size_t(longest_);
    }
    // Floats of `Arrays::results`.
    size_t results() const { return results_; }
    // The parts of the KV cache that attention reads.
    const KvReads& reads() const { return reads_; }

    // Whether threads share an item's pieces. The next phase then merges the pieces' results.
    bool shares_pieces() const { return !shared_pieces_.empty(); }
    int64_t items() const { return int64_t(items_.size()); }
    int64_t shared_pieces() const { return int64_t(shared_pieces_.size()); }
    int chunks() const {
        return shares_pieces() ? chunk_count(shared_pieces(), kMaxChunks)
                               : chunk_count(items(), kAttentionChunks * ctx_.threads);
    }

    // Prefetch the part of B that `rotate` reads.
    void prefetch_rotate(int index, const RowTile& row_tile, int head) const {
        const int dim = m_.dim, queries = m_.heads / m_.kv_heads * dim;
        ctx_.prefetch_update(index, kQkv, 0, row_tile, head * queries, queries);
        ctx_.prefetch_update(index, kQkv, 1, row_tile, head * dim, dim);
        ctx_.prefetch_update(index, kQkv, 2, row_tile, head * dim, dim);
    }

    // Finish the queries, keys and values of a row tile for a key head: LoRA's updates, norms and
    // the rotary embedding.
    void rotate(int index, const Arrays& at, const RowTile& row_tile, int head,
                float* scratch) const {
        const Layer& layer = m_.layers[index];
        const int group = m_.heads / m_.kv_heads, dim = m_.dim, queries = group * dim;
        const int query_at = head * queries, key_at = ctx_.query_width + head * dim;
        const int value_at = key_at + ctx_.kv_width;
        const int64_t end = row_tile.row + row_tile.rows;
        ctx_.prefetch_y(at, row_tile, query_at, queries);
        ctx_.prefetch_y(at, row_tile, key_at, dim);
        ctx_.prefetch_y(at, row_tile, value_at, dim);
        for (int64_t row = row_tile.row; row < end; ++row)
            prefetch_slot(layer.keys, layer.values, ctx_.kv, ctx_.step->slots[row], head);
        const size_t stride = size_t(queries) + 2 * size_t(dim);
        ctx_.updated(at, index, kQkv, 0, row_tile, query_at, query_at, queries, scratch, stride);
        ctx_.updated(at, index, kQkv, 1, row_tile, key_at, head * dim, dim, scratch + queries,
                     stride);
        ctx_.updated(at, index, kQkv, 2, row_tile, value_at, head * dim, dim,
                     scratch + queries + dim, stride);
        float* query = scratch;
        for (int64_t row = row_tile.row; row < end; ++row, query += 2 * dim) {
            bf16* to = at.queries + row * ctx_.query_width + query_at;
            for (int g = 0; g < group; ++g, query += dim, to += dim) {
                normalize_and_rotate(query, layer.query_norm, row);
                for (int d = 0; d < dim; d += kLanes) store_shared(to + d, load(query + d));
            }
            normalize_and_rotate(query, layer.key_norm, row);
            write_key(layer.keys, ctx_.kv, ctx_.step->slots[row], head, query);
            write_value(layer.values, ctx_.kv, ctx_.step->slots[row], head, query + dim);
        }
    }

    // Attend to one piece of one item.
    void attend_piece(int layer, const Arrays& at, int64_t number, float* scratch) const {
        const auto& [item, piece] = shared_pieces_[size_t(number)];
        attend(layer, at, items_[item], piece, scratch, at.results + items_[item].results_at);
    }
    void merge_item(int layer, const Arrays& at, int64_t item, float* scratch) const {
        merge(layer, at, items_[size_t(item)], at.results + items_[size_t(item)].results_at,
              scratch);
    }

    // Attend to all pieces of one item, and merge them.
    void attend_item(int layer, const Arrays& at, int64_t number, float* scratch) const {
        const Item& item = items_[size_t(number)];
        float* results = scratch + attention_scratch(m_.dim);
        for (int piece = 0; piece < item.pieces; ++piece)
            attend(layer, at, item, piece, scratch, results);
        merge(layer, at, item, results, results + results_of_item());
    }

  private:
    // Floats of the results of the longest item's pieces.
    size_t results_of_item() const {
        return size_t(longest_) * kMaxQueries * Piece::numbers(m_.dim);
    }

    // The queries of a few rows that attend to one key head.
    struct Item {
        int64_t sequence, row;
        int rows, kv_head, first_head, head_count;
        int pieces;         // pieces of its longest row's context
        size_t results_at;  // where its pieces' results begin, if threads share them
    };

    void prepare_angles() {
        const size_t rows = size_t(ctx_.step->rows), half = size_t(m_.dim / 2);
        cos_ = angles_.take(2 * rows * half);
        sin_ = cos_ + rows * half;
        for (size_t row = 0; row < rows; ++row) {
            for (size_t i = 0; i < half; ++i) {
                const float angle = float(ctx_.step->positions[row]) * m_.inv_freq[i];
                cos_[row * half + i] = std::cos(angle) * m_.rotary_scale;
                sin_[row * half + i] = std::sin(angle) * m_.rotary_scale;
            }
        }
    }

    void prepare_items() {
        const Step& step = *ctx_.step;
        const int group = m_.heads / m_.kv_heads;
        const int heads_at_once = std::min(group, kMaxQueries);
        const int rows_at_once = std::max(1, kMaxQueries / group);
        longest_ = 0;
        items_.clear();
        for (int64_t s = 0; s < step.sequences; ++s) {
            longest_ = std::max(longest_, pieces(step.contexts[s]));
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
    }

    // If there are few items with long contexts, let threads share their pieces.
    void prepare_shared_pieces() {
        shared_pieces_.clear();
        results_ = 0;
        if (longest_ == 1 || int(items_.size()) >= kItemsToShare * ctx_.threads) return;
        for (size_t i = 0; i < items_.size(); ++i) {
            items_[i].results_at = results_;
            results_ += size_t(items_[i].pieces) * kMaxQueries * Piece::numbers(m_.dim);
            for (int piece = 0; piece < items_[i].pieces; ++piece)
                shared_pieces_.emplace_back(i, piece);
        }
    }

    void prepare_reads() {
        reads_.all.clear(), reads_.ends.clear();
        const bool shared = shares_pieces();
        const Items of{shared ? shared_pieces() : items(), chunks()};
        for (int thread = 0; thread < ctx_.threads; ++thread) {
            const size_t first = reads_.all.size();
            const int64_t end = of.of_thread(thread + 1, ctx_.threads);
            for (int64_t i = of.of_thread(thread, ctx_.threads); i < end; ++i)
                add_read(first, items_[shared ? shared_pieces_[size_t(i)].first : size_t(i)],
                         shared ? shared_pieces_[size_t(i)].second : -1);
            reads_.ends.push_back(reads_.all.size());
        }
    }

    // Add the blocks that an item reads for one piece, or for all pieces (-1). If the thread's last
    // read is of the same blocks, only add a head to it. The thread's reads begin with number
    // `first`.
    void add_read(size_t first, const Item& item, int piece) {
        const auto blocks = [&](int64_t tokens) {
            return int((tokens + m_.block_size - 1) / m_.block_size);
        };
        const int all = blocks(ctx_.step->contexts[item.sequence]);
        const int begin = piece < 0 ? 0 : piece * kPiece / m_.block_size;
        const int end = piece < 0 ? all : std::min(all, blocks((piece + 1) * kPiece));
        if (reads_.all.size() > first) {
            KvRead& last = reads_.all.back();
            if (last.sequence == item.sequence && last.first == begin && last.end == end) {
                const int within = item.kv_head - last.head;
                if (within == last.heads) ++last.heads;
                if (within >= 0 && within < last.heads) return;
            }
        }
        reads_.all.push_back({item.sequence, begin, end, item.kv_head, 1});
    }

    void normalize_and_rotate(float* head, const float* norm, int64_t row) const {
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

    // Write an item's queries to `to`, row by row, and return their number.
    int queries(const Layer& layer, const Arrays& at, const Item& item, Query* to) const {
        int count = 0;
        for (int64_t row = item.row; row < item.row + item.rows; ++row) {
            const int64_t end = ctx_.step->positions[row] + 1;
            const int64_t first = layer.window > 0 ? std::max<int64_t>(0, end - layer.window) : 0;
            for (int h = 0; h < item.head_count; ++h) {
                const int column = (item.first_head + h) * m_.dim;
                to[count++] = {at.queries + row * ctx_.query_width + column, int(first), int(end)};
            }
        }
        return count;
    }

    // Attend to one piece of an item. The results go to results[piece][query].
    void attend(int index, const Arrays& at, const Item& item, int piece, float* scratch,
                float* results) const {
        const Layer& layer = m_.layers[index];
        Query found[kMaxQueries];
        Piece to[kMaxQueries];
        const int count = queries(layer, at, item, found);
        for (int q = 0; q < count; ++q)
            to[q].at = results + size_t(piece * kMaxQueries + q) * Piece::numbers(m_.dim);
        const Sequence sequence{layer.keys, layer.values,
                                ctx_.step->block_tables + item.sequence * ctx_.step->table_width,
                                item.kv_head};
        veneer::attend(sequence, ctx_.kv, found, count, piece, 1.0f / std::sqrt(float(m_.dim)),
                       scratch, to);
    }

    void merge(int layer, const Arrays& at, const Item& item, float* results, float* shares) const {
        const size_t numbers = Piece::numbers(m_.dim);
        const int first = item.first_head * m_.dim, end = first + item.head_count * m_.dim;
        const bool int8 = ctx_.int8_inputs(layer, kOutput);
        for (int64_t row = item.row; row < item.row + item.rows; ++row) {
            for (int h = 0; h < item.head_count; ++h, results += numbers)
                veneer::merge(ctx_.kv, results, item.pieces, kMaxQueries * numbers, shares,
                              at.rounded + row * ctx_.width + (item.first_head + h) * m_.dim);
            if (int8) ctx_.write_int8(at, row, first, end);
        }
    }

    static constexpr int kAttentionChunks = 16;  // per thread
    static constexpr int kItemsToShare = 8;  // per thread; with more items, whole ones balance well

    const StepContext& ctx_;
    const Model& m_;
    Buffer<float> angles_;
    float *cos_ = nullptr, *sin_ = nullptr;
    int longest_ = 0;  // pieces
    size_t results_ = 0;
    KvReads reads_;
    std::vector<Item> items_;
    std::vector<std::pair<size_t, int>> shared_pieces_;  // item and piece
};

}  // namespace veneer
