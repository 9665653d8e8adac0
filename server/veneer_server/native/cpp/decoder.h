// A whole step: nine parallel parts a layer, with nothing but these headers' kernels in them.
#pragma once

#include <memory>
#include <vector>

#include "step.h"
#include "team.h"

#ifdef VENEER_TIMES
#include <chrono>
#endif

namespace veneer {

// Where a step's time goes. Kept only where it is compiled with VENEER_TIMES (by the benchmark).
enum Part { kNorm, kQkvPart, kRotate, kAttend, kOutputPart, kGatePart, kSilu, kDownPart, kHead };
constexpr int kPartCount = 9;
struct Times {
    double seconds[kPartCount] = {};

    template <class Function>
    void measure(Part part, const Function& function) {
#ifdef VENEER_TIMES
        const auto began = std::chrono::steady_clock::now();
        function();
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
        seconds[part] += took.count();
#else
        (void)part;
        function();
#endif
    }
};

// Numbers that grow with the largest step and are never given back.
template <class Number>
class Buffer {
  public:
    Number* take(size_t count) {
        if (count > size_) {
            at_.reset();  // not both at once
            at_.reset(static_cast<Number*>(::operator new(count * sizeof(Number), kAlign)));
            size_ = count;
        }
        return at_.get();
    }

  private:
    static constexpr std::align_val_t kAlign{64};
    struct Free {
        void operator()(Number* at) const { ::operator delete(at, kAlign); }
    };
    std::unique_ptr<Number, Free> at_;
    size_t size_ = 0;
};

class Decoder {
  public:
    Decoder(const Model& model, Team& team)
        : m_(model),
          team_(team),
          kv_{model.kv_heads, model.dim, model.block_size},
          query_width_(model.heads * model.dim),
          kv_width_(model.kv_heads * model.dim),
          attention_(team.size()) {}

    void run(const Step& step) {
        prepare(step);
        each(kNorm, step.rows, [&](int64_t row) {
            embed(row);
            normalize(row, m_.layers[0].input_norm);
        });
        for (int index = 0; index < m_.layer_count; ++index) {
            const Layer& layer = m_.layers[index];
            product(kQkvPart, index, kQkv);
            each(kRotate, step.rows * m_.kv_heads,
                 [&](int64_t item) { rotate(index, item / m_.kv_heads, int(item % m_.kv_heads)); });
            times.measure(kAttend, [&] { attend(layer); });
            product(kOutputPart, index, kOutput);
            each(kNorm, step.rows, [&](int64_t row) { add(index, kOutput, row, layer.post_norm); });
            product(kGatePart, index, kGateUp);
            each(kSilu, step.rows * gate_parts(),
                 [&](int64_t item) { gate(index, item / gate_parts(), int(item % gate_parts())); });
            product(kDownPart, index, kDown);
            const bool last = index + 1 == m_.layer_count;
            const float* next = last ? nullptr : m_.layers[index + 1].input_norm;
            each(kNorm, step.rows, [&](int64_t row) { add(index, kDown, row, next); });
        }
        times.measure(kHead, [&] { logits(); });
    }

    Times times;

  private:
    // ------------------------------------------------------------------------- a step

    struct AttentionItem {
        int64_t sequence, row;
        int rows, kv_head, first_head, head_count;
    };

    void prepare(const Step& step) {
        step_ = &step;
        const size_t rows = size_t(step.rows), half = size_t(m_.dim / 2);
        width_ = std::max({m_.hidden, query_width_, m_.intermediate});
        wide_ = std::max({m_.hidden, query_width_ + 2 * kv_width_, 2 * m_.intermediate});
        ranks_ = 0;
        adapter_.assign(rows, nullptr);
        for (int64_t s = 0; s < step.segment_count; ++s) {
            const Segment& segment = step.segments[s];
            for (int g = 0; g < m_.layer_count * kGroups; ++g)
                ranks_ = std::max(ranks_, segment.adapter->groups[g].ranks);
            for (int64_t row = segment.begin; row < segment.end; ++row)
                adapter_[size_t(row)] = segment.adapter;
        }
        const size_t normed = std::max(rows, size_t(step.logit_count));
        hidden_ = hidden_buffer_.take(rows * m_.hidden);
        x_ = x_buffer_.take(normed * width_);
        rounded_ = rounded_buffer_.take(normed * width_);
        y_ = y_buffer_.take(rows * wide_);
        shrunk_ = shrunk_buffer_.take(rows * size_t(ranks_) + kLanes);
        queries_ = queries_buffer_.take(rows * query_width_);
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
    }

    void prepare_attention(const Step& step) {
        const int group = m_.heads / m_.kv_heads;
        const int heads_at_once = std::min(group, kMostQueries);
        const int rows_at_once = std::max(1, kMostQueries / group);
        int64_t longest = 0;
        items_.clear();
        for (int64_t s = 0; s < step.sequences; ++s) {
            longest = std::max(longest, step.contexts[s]);
            const int64_t end = step.row_starts[s + 1];
            for (int64_t row = step.row_starts[s]; row < end; row += rows_at_once) {
                const int rows = int(std::min<int64_t>(rows_at_once, end - row));
                for (int head = 0; head < m_.kv_heads; ++head)
                    for (int first = 0; first < group; first += heads_at_once)
                        items_.push_back({s, row, rows, head, head * group + first,
                                          std::min(heads_at_once, group - first)});
            }
        }
        for (auto& scratch : attention_) scratch.take(attention_scratch(longest));
    }

    // Call `function` for 0 to count - 1, a few at a time.
    template <class Function>
    void each(Part part, int64_t count, const Function& function) {
        const int64_t chunks = std::min<int64_t>(count, team_.size() * kChunks);
        times.measure(part, [&] {
            team_.run(int(chunks), [&](int chunk, int) {
                for (int64_t i = count * chunk / chunks; i < count * (chunk + 1) / chunks; ++i)
                    function(i);
            });
        });
    }

    float* x(int64_t row) { return x_ + row * width_; }
    bf16* rounded(int64_t row) { return rounded_ + row * width_; }
    float* y(int64_t row) { return y_ + row * wide_; }
    float* hidden(int64_t row) { return hidden_ + row * m_.hidden; }

    void embed(int64_t row) {
        const bf16* from = m_.embedding + step_->tokens[row] * m_.hidden;
        for (int i = 0; i < m_.hidden; i += kLanes) store(hidden(row) + i, load(from + i));
    }

    void normalize(int64_t row, const float* weight) { normalize(hidden(row), weight, row); }

    // RMS norm into a row of x, and rounded.
    void normalize(const float* from, const float* weight, int64_t row) {
        Floats squares = zeros();
        for (int i = 0; i < m_.hidden; i += kLanes) {
            const Floats number = load(from + i);
            squares = fma(number, number, squares);
        }
        const Floats scale = all(1.0f / std::sqrt(sum(squares) / float(m_.hidden) + m_.epsilon));
        for (int i = 0; i < m_.hidden; i += kLanes) {
            const Floats normed = mul(mul(load(from + i), scale), load(weight + i));
            store(x(row) + i, normed);
            store_bf16(rounded(row) + i, normed);
        }
    }

    // ---------------------------------------------------------------------- products

    struct ShrinkItem {
        const Segment* segment;
        const LoraGroup* group;
        int64_t row, rows;
        int chunk;
    };

    // y = W x of a group's fused linear, and h = A x of all adapters.
    void product(Part part, int layer, Group group) {
        const Linear& linear = m_.layers[layer].linears[group];
        shrinks_.clear();
        for (int64_t s = 0; s < step_->segment_count; ++s) {
            const Segment& segment = step_->segments[s];
            const LoraGroup& lora = segment.adapter->groups[layer * kGroups + group];
            if (lora.a == nullptr) continue;
            const int chunks = (lora.ranks + kRankChunk - 1) / kRankChunk;
            for (int64_t row = segment.begin; row < segment.end; row += kShrinkRows)
                for (int chunk = 0; chunk < chunks; ++chunk)
                    shrinks_.push_back({&segment, &lora, row,
                                        std::min(kShrinkRows, segment.end - row), chunk});
        }
        const int first = int(shrinks_.size());  // they begin first: a tile is shorter
        const int tiles = linear.tiles();
        const int chunks = std::min(tiles, team_.size() * kChunks);
        times.measure(part, [&] {
            team_.run(first + chunks, [&](int number, int) {
                if (number < first) return shrink(shrinks_[size_t(number)], linear.inputs);
                const int chunk = number - first;
                multiply_tiles(linear, tiles * chunk / chunks, tiles * (chunk + 1) / chunks,
                               rounded_, size_t(width_), int(step_->rows), y_, size_t(wide_));
            });
        });
    }

    void shrink(const ShrinkItem& item, int inputs) {
        float* h = shrunk_ + item.row * ranks_;
        if (item.segment->adapter->is_float)
            veneer::shrink<float>(*item.group, item.chunk, x(item.row), size_t(width_), inputs,
                                  int(item.rows), h, size_t(ranks_));
        else
            veneer::shrink<bf16>(*item.group, item.chunk, x(item.row), size_t(width_), inputs,
                                 int(item.rows), h, size_t(ranks_));
    }

    // y[at + first ...] += the update of one of a row's projections, from its output `first` on.
    void update(int layer, Group group, int member, int64_t row, int outputs, int first, int count,
                float* to) {
        const LoraAdapter* adapter = adapter_[size_t(row)];
        if (adapter == nullptr) return;
        const LoraMember& lora = adapter->groups[layer * kGroups + group].members[member];
        expand_row(*adapter, lora, outputs, shrunk_ + row * ranks_, first, count, to);
    }

    // hidden += y, then the next norm.
    void add(int layer, Group group, int64_t row, const float* norm) {
        update(layer, group, 0, row, m_.hidden, 0, m_.hidden, y(row));
        for (int i = 0; i < m_.hidden; i += kLanes)
            store(hidden(row) + i, veneer::add(load(hidden(row) + i), load(y(row) + i)));
        if (norm != nullptr) normalize(row, norm);
    }

    // --------------------------------------------------------------------- attention

    // Of a row and a key head: finish its queries, key and value.
    void rotate(int index, int64_t row, int head) {
        const Layer& layer = m_.layers[index];
        const int group = m_.heads / m_.kv_heads, dim = m_.dim;
        ask_for_slot(layer.keys, layer.values, kv_, step_->slots[row], head);
        float* query = y(row) + head * group * dim;
        float* key = y(row) + query_width_ + head * dim;
        float* value = key + kv_width_;
        update(index, kQkv, 0, row, query_width_, head * group * dim, group * dim, query);
        update(index, kQkv, 1, row, kv_width_, head * dim, dim, key);
        update(index, kQkv, 2, row, kv_width_, head * dim, dim, value);
        bf16* to = queries_ + row * query_width_ + head * group * dim;
        for (int g = 0; g < group; ++g, query += dim) {
            turn(query, layer.query_norm, row);
            for (int d = 0; d < dim; d += kLanes) store_bf16(to + g * dim + d, load(query + d));
        }
        turn(key, layer.key_norm, row);
        write_key(layer.keys, kv_, step_->slots[row], head, key);
        write_value(layer.values, kv_, step_->slots[row], head, value);
    }

    void turn(float* head, const float* norm, int64_t row) {
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

    void attend(const Layer& layer) {
        const int64_t count = int64_t(items_.size());
        const int64_t chunks = std::min<int64_t>(count, team_.size() * kAttentionChunks);
        team_.run(int(chunks), [&](int chunk, int thread) {
            float* scratch = attention_[size_t(thread)].take(0);
            for (int64_t i = count * chunk / chunks; i < count * (chunk + 1) / chunks; ++i)
                attend(layer, items_[size_t(i)], scratch);
        });
    }

    void attend(const Layer& layer, const AttentionItem& item, float* scratch) {
        Query queries[kMostQueries];
        int count = 0;
        for (int64_t row = item.row; row < item.row + item.rows; ++row) {
            const int64_t end = step_->positions[row] + 1;
            const int64_t first = layer.window > 0 ? std::max<int64_t>(0, end - layer.window) : 0;
            for (int h = 0; h < item.head_count; ++h) {
                const int at = (item.first_head + h) * m_.dim;
                queries[count++] = {queries_ + row * query_width_ + at, x(row) + at, int(first),
                                    int(end)};
            }
        }
        const Sequence sequence{layer.keys, layer.values,
                                step_->block_tables + item.sequence * step_->table_width,
                                item.kv_head};
        veneer::attend(sequence, kv_, queries, count, 1.0f / std::sqrt(float(m_.dim)), scratch);
        for (int q = 0; q < count; ++q) {
            bf16* to = rounded_ + (queries[q].out - x_);
            for (int d = 0; d < m_.dim; d += kLanes) store_bf16(to + d, load(queries[q].out + d));
        }
    }

    // -------------------------------------------------------------------- gate, head

    int gate_parts() const { return (m_.intermediate + kGateWidth - 1) / kGateWidth; }

    void gate(int layer, int64_t row, int part) {
        const int first = part * kGateWidth;
        const int count = std::min(kGateWidth, m_.intermediate - first);
        float* gates = y(row) + first;
        float* ups = y(row) + m_.intermediate + first;
        update(layer, kGateUp, 0, row, m_.intermediate, first, count, gates);
        update(layer, kGateUp, 1, row, m_.intermediate, first, count, ups);
        for (int i = 0; i < count; i += kLanes) {
            const Floats gate = load(gates + i);
            const Floats divisor = veneer::add(all(1.0f), exp(sub(zeros(), gate)));
            const Floats result = mul(div(gate, divisor), load(ups + i));
            store(x(row) + first + i, result);
            store_bf16(rounded(row) + first + i, result);
        }
    }

    void logits() {
        each(kNorm, step_->logit_count, [&](int64_t i) {
            normalize(hidden(step_->logit_rows[i]), m_.final_norm, i);
        });
        const int tiles = m_.head.tiles();
        const int chunks = std::min(tiles, team_.size() * kHeadChunks);
        team_.run(chunks, [&](int chunk, int) {
            multiply_tiles(m_.head, tiles * chunk / chunks, tiles * (chunk + 1) / chunks, rounded_,
                           size_t(width_), int(step_->logit_count), step_->logits,
                           size_t(m_.vocab));
        });
    }

    static constexpr int kChunks = 8;  // a thread and part: what the slowest still has to do
    static constexpr int kAttentionChunks = 16;
    static constexpr int kHeadChunks = 64;
    static constexpr int64_t kShrinkRows = 32;
    static constexpr int kGateWidth = 512;

    const Model& m_;
    Team& team_;
    const KvShape kv_;
    const int query_width_, kv_width_;
    const Step* step_ = nullptr;
    int width_ = 0, wide_ = 0, ranks_ = 0;
    float *hidden_ = nullptr, *x_ = nullptr, *y_ = nullptr, *shrunk_ = nullptr;
    float *cos_ = nullptr, *sin_ = nullptr;
    bf16 *rounded_ = nullptr, *queries_ = nullptr;
    Buffer<float> hidden_buffer_, x_buffer_, y_buffer_, shrunk_buffer_, angles_buffer_;
    Buffer<bf16> rounded_buffer_, queries_buffer_;
    std::vector<Buffer<float>> attention_;
    std::vector<const LoraAdapter*> adapter_;  // by row
    std::vector<AttentionItem> items_;
    std::vector<ShrinkItem> shrinks_;
};

}  // namespace veneer
