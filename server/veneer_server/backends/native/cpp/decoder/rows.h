// A step's work on single rows (embeddings, norms, residual sums, gates), and the head's logits.
#pragma once

#include <algorithm>
#include <cmath>

#include "context.h"

namespace veneer {

class Rows {
  public:
    explicit Rows(const StepContext& context) : ctx_(context), m_(context.model) {}

    void embed(const Arrays& at, int64_t row) const {
        const bf16* from = m_.embedding + ctx_.step->tokens[row] * m_.hidden;
        float* to = at.hidden + row * m_.hidden;
        for (int i = 0; i < m_.hidden; i += kLanes) store_shared(to + i, load(from + i));
        normalize(to, m_.layers[0].input_norm, at.rounded + row * ctx_.width);
        if (ctx_.int8_inputs(0, kQkv)) ctx_.write_int8(at, row, 0, m_.hidden);
    }

    // Prefetch the part of B that `add` reads.
    void prefetch_add(int layer, Group group, const RowTile& row_tile) const {
        ctx_.prefetch_update(layer, group, 0, row_tile, 0, m_.hidden);
    }

    // Compute hidden + y, with the adapter's update, then the next norm unless `norm` is null.
    void add(int layer, Group group, const float* norm, const Arrays& at, const RowTile& row_tile,
             float* scratch) const {
        ctx_.prefetch_y(at, row_tile, 0, m_.hidden);
        const float* from = at.y + row_tile.row * ctx_.wide;
        size_t stride = size_t(ctx_.wide);
        if (row_tile.adapter != nullptr) {
            stride = size_t(m_.hidden);
            ctx_.updated(at, layer, group, 0, row_tile, 0, 0, m_.hidden, scratch, stride);
            from = scratch;
        }
        const bool int8 = norm != nullptr && (group == kOutput ? ctx_.int8_inputs(layer, kGateUp)
                                                               : ctx_.int8_inputs(layer + 1, kQkv));
        for (int64_t row = row_tile.row; row < row_tile.row + row_tile.rows;
             ++row, from += stride) {
            const float* before = at.hidden_before + row * m_.hidden;
            float* to = at.hidden + row * m_.hidden;
            for (int i = 0; i < m_.hidden; i += kLanes)
                store_shared(to + i, veneer::add(load_shared(before + i), load_shared(from + i)));
            if (norm != nullptr) normalize(to, norm, at.rounded + row * ctx_.width);
            if (int8) ctx_.write_int8(at, row, 0, m_.hidden);
        }
    }

    // Prefetch the part of B that `gate` reads for the row tile after number i, in this chunk or
    // the next one, which usually belongs to this thread too.
    void prefetch_gate(int layer, size_t i, int chunk, const Columns& cut) const {
        if (++i == ctx_.row_tiles.size()) i = 0, ++chunk;
        if (chunk == cut.chunks || !ctx_.row_tiles[i].first) return;
        const int first = kTile * cut.begin(chunk), count = kTile * cut.begin(chunk + 1) - first;
        for (int member = 0; member < 2; ++member)
            ctx_.prefetch_update(layer, kGateUp, member, ctx_.row_tiles[i], first, count);
    }

    // Compute silu(gate) * up for some columns of a row tile, with the adapter's updates.
    void gate(int layer, const Arrays& at, const RowTile& row_tile, int first, int count,
              float* scratch) const {
        const float* from = at.y + row_tile.row * ctx_.wide + first;
        size_t stride = size_t(ctx_.wide), apart = size_t(m_.intermediate);
        if (row_tile.adapter != nullptr) {
            apart = size_t(count), stride = 2 * apart;
            ctx_.updated(at, layer, kGateUp, 0, row_tile, first, first, count, scratch, stride);
            ctx_.updated(at, layer, kGateUp, 1, row_tile, m_.intermediate + first, first, count,
                         scratch + apart, stride);
            from = scratch;
        }
        const bool int8 = ctx_.int8_inputs(layer, kDown);
        for (int64_t row = row_tile.row; row < row_tile.row + row_tile.rows;
             ++row, from += stride) {
            bf16* to = at.rounded + row * ctx_.width + first;
            for (int i = 0; i < count; i += kLanes) {
                const Floats gate = load_shared(from + i);
                const Floats divisor = veneer::add(broadcast(1.0f), exp(sub(zeros(), gate)));
                store_shared(to + i, mul(div(gate, divisor), load_shared(from + apart + i)));
            }
            if (int8) ctx_.write_int8(at, row, first, first + count);
        }
    }

    // Compute the final norm of the i-th row whose logits are needed.
    void normalize_last(const Arrays& at, int64_t i) const {
        normalize(at.hidden + ctx_.step->logit_rows[i] * m_.hidden, m_.final_norm,
                  at.rounded + i * ctx_.width);
        if (m_.head.int8_inputs) ctx_.write_int8(at, i, 0, m_.hidden);
    }

    // Compute the logits of the head's tiles `tile` to end - 1, and check that they are finite.
    void logits(const Arrays& at, int tile, int end) const {
        const Step& step = *ctx_.step;
        Prefetcher prefetcher;  // with nothing to prefetch, since this is the last phase
        multiply_tiles(m_.head, tile, end, ctx_.inputs(at, m_.head.int8_inputs),
                       int(step.logit_count), step.logits, size_t(m_.vocab), prefetcher);
        const int first = tile * kTile, count = std::min(end * kTile, m_.vocab) - first;
        for (int64_t i = 0; i < step.logit_count; ++i)
            if (!finite(step.logits + i * m_.vocab + first, count))
                store_number(step.finite + i, uint8_t(0));
    }

  private:
    // Compute the RMS norm of a row, the next GEMM's input.
    void normalize(const float* from, const float* weight, bf16* to) const {
        Floats squares = zeros();
        for (int i = 0; i < m_.hidden; i += kLanes) {
            const Floats number = load_shared(from + i);
            squares = fma(number, number, squares);
        }
        const Floats scale =
            broadcast(1.0f / std::sqrt(sum(squares) / float(m_.hidden) + m_.epsilon));
        for (int i = 0; i < m_.hidden; i += kLanes) {
            store_shared(to + i, mul(mul(load_shared(from + i), scale), load(weight + i)));
        }
    }

    static bool finite(const float* numbers, int count) {
        Floats none = zeros();  // 0 x a finite number is 0; 0 x inf and 0 x NaN are NaN
        int i = 0;
        for (; i + kLanes <= count; i += kLanes)
            none = fma(load_shared(numbers + i), zeros(), none);
        if (i < count) none = fma(load_shared(numbers + i, count - i), zeros(), none);
        return sum(none) == 0;
    }

    const StepContext& ctx_;
    const Model& m_;
};

}  // namespace veneer
