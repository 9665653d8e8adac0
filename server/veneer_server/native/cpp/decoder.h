// A whole step: nine parallel parts a layer, with nothing but these headers' kernels in them.
#pragma once

#include <memory>
#include <utility>
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
            each(kRotate, bunches() * m_.kv_heads, [&](int64_t item) {
                rotate(index, bunches_[size_t(item / m_.kv_heads)], int(item % m_.kv_heads));
            });
            times.measure(kAttend, [&] { attend(layer); });
            product(kOutputPart, index, kOutput);
            each(kNorm, bunches(), [&](int64_t item) {
                add(index, kOutput, bunches_[size_t(item)], layer.post_norm);
            });
            product(kGatePart, index, kGateUp);
            gate(index);
            product(kDownPart, index, kDown);
            const bool last = index + 1 == m_.layer_count;
            const float* next = last ? nullptr : m_.layers[index + 1].input_norm;
            each(kNorm, bunches(),
                 [&](int64_t item) { add(index, kDown, bunches_[size_t(item)], next); });
        }
        times.measure(kHead, [&] { logits(); });
    }

    Times times;

  private:
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
        hidden_ = hidden_buffer_.take(rows * m_.hidden);
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
        for (auto& scratch : attention_) scratch.take(kAttentionScratch + results);
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
        results_ = results_buffer_.take(taken);
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

    bf16* rounded(int64_t row) { return rounded_ + row * width_; }
    float* y(int64_t row) { return y_ + row * wide_; }
    float* hidden(int64_t row) { return hidden_ + row * m_.hidden; }

    void embed(int64_t row) {
        const bf16* from = m_.embedding + step_->tokens[row] * m_.hidden;
        for (int i = 0; i < m_.hidden; i += kLanes) store(hidden(row) + i, load(from + i));
    }

    void normalize(int64_t row, const float* weight) { normalize(hidden(row), weight, row); }

    // RMS norm into a row of the next product's inputs.
    void normalize(const float* from, const float* weight, int64_t row) {
        Floats squares = zeros();
        for (int i = 0; i < m_.hidden; i += kLanes) {
            const Floats number = load(from + i);
            squares = fma(number, number, squares);
        }
        const Floats scale = all(1.0f / std::sqrt(sum(squares) / float(m_.hidden) + m_.epsilon));
        for (int i = 0; i < m_.hidden; i += kLanes) {
            store_bf16(rounded(row) + i, mul(mul(load(from + i), scale), load(weight + i)));
        }
    }

    // ---------------------------------------------------------------------- products

    struct ShrinkItem {
        const Segment* segment;
        const LoraGroup* group;
        int64_t row, rows;
        int chunk;
    };

    // y = W x of a group's fused linear, and h = A x of all adapters. Meanwhile, what the parts
    // after it read is brought.
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
        want(layer, group);
        const Columns columns(linear, team_.size() * kChunks);
        const int shrinks = int(shrinks_.size()), chunks = columns.chunks;
        // Each thread's share: shrinks first, since a tile is shorter, then neighbouring tiles.
        auto begin = [&](int thread) {
            return team_.begin(shrinks, thread) + team_.begin(chunks, thread);
        };
        times.measure(part, [&] {
            team_.run(shrinks + chunks, begin, [&](int number, int) {
                int thread = team_.size() - 1;
                while (number < begin(thread)) --thread;
                const int shrink_number = number - team_.begin(chunks, thread);
                if (shrink_number < team_.begin(shrinks, thread + 1))
                    return shrink(shrinks_[size_t(shrink_number)], linear.inputs);
                const int chunk = number - team_.begin(shrinks, thread + 1);
                const int first = columns.begin(chunk), last = columns.begin(chunk + 1);
                Asking asking(wanted_, chunk, chunks);
                asking.spread(row_groups(linear, int(step_->rows)) * linear.blocks() *
                              (last - first) * linear.parts);
                // In the order in which they lie.
                const int run = linear.parts == 1 ? last - first : 2;
                for (int tile = first; tile < last; tile += run)
                    for (int p = 0; p < linear.parts; ++p)
                        multiply_tiles(linear, p * columns.tiles + tile,
                                       p * columns.tiles + tile + run, rounded_, size_t(width_),
                                       int(step_->rows), y_, size_t(wide_), asking);
            });
        });
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

    // What is read after a product: the adapters' B of its own group, the cache after the keys'
    // and values' own, and the adapters' A of the next group.
    void want(int layer, Group group) {
        Wanted& expanding = wanted_[0];
        Wanted& cache = wanted_[1];
        Wanted& shrinking = wanted_[2];
        for (Wanted& list : wanted_) list.clear();
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
    void want_columns(int layer, Wanted& expanding) {
        const Linear& linear = m_.layers[layer].linears[kGateUp];
        const Columns columns(linear, team_.size() * kChunks);
        for (int thread = 0; thread < team_.size(); ++thread) {
            const int first = kTile * columns.begin(team_.begin(columns.chunks, thread));
            const int last = kTile * columns.begin(team_.begin(columns.chunks, thread + 1));
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

    void shrink(const ShrinkItem& item, int inputs) {
        float* h = shrunk_ + item.row * ranks_;
        if (item.segment->adapter->is_float)
            veneer::shrink<float>(*item.group, item.chunk, rounded(item.row), size_t(width_), inputs,
                                  int(item.rows), h, size_t(ranks_));
        else
            veneer::shrink<bf16>(*item.group, item.chunk, rounded(item.row), size_t(width_), inputs,
                                 int(item.rows), h, size_t(ranks_));
    }

    // y[row][0 to count - 1] += the updates of one of a bunch's projections, from its output
    // `first` on.
    void update(int layer, Group group, int member, const Bunch& bunch, int first, int count,
                float* to) {
        if (bunch.adapter == nullptr) return;
        expand(*bunch.adapter, group_of(*bunch.adapter, layer, group).members[member],
               member_outputs(group, member), first, count, bunch.rows,
               {shrunk_ + bunch.row * ranks_, size_t(ranks_), to, size_t(wide_)});
    }

    // Ask for a bunch's y[first to first + count - 1]: half of it another thread has just
    // written, and its core may be far away.
    void ask_for_y(const Bunch& bunch, int first, int count) {
        for (int64_t row = bunch.row; row < bunch.row + bunch.rows; ++row)
            for (int i = 0; i < count; i += kLanes) __builtin_prefetch(y(row) + first + i);
    }

    // hidden += y, then the next norm.
    void add(int layer, Group group, const Bunch& bunch, const float* norm) {
        ask_for_y(bunch, 0, m_.hidden);
        update(layer, group, 0, bunch, 0, m_.hidden, y(bunch.row));
        for (int64_t row = bunch.row; row < bunch.row + bunch.rows; ++row) {
            for (int i = 0; i < m_.hidden; i += kLanes)
                store(hidden(row) + i, veneer::add(load(hidden(row) + i), load(y(row) + i)));
            if (norm != nullptr) normalize(row, norm);
        }
    }

    // --------------------------------------------------------------------- attention

    // Of a bunch and a key head: finish its queries, keys and values.
    void rotate(int index, const Bunch& bunch, int head) {
        const Layer& layer = m_.layers[index];
        const int group = m_.heads / m_.kv_heads, dim = m_.dim;
        const int query_at = head * group * dim, key_at = query_width_ + head * dim;
        const int value_at = key_at + kv_width_;
        const int64_t end = bunch.row + bunch.rows;
        ask_for_y(bunch, query_at, group * dim);
        ask_for_y(bunch, key_at, dim);
        ask_for_y(bunch, value_at, dim);
        for (int64_t row = bunch.row; row < end; ++row)
            ask_for_slot(layer.keys, layer.values, kv_, step_->slots[row], head);
        float* first = y(bunch.row);
        update(index, kQkv, 0, bunch, query_at, group * dim, first + query_at);
        update(index, kQkv, 1, bunch, head * dim, dim, first + key_at);
        update(index, kQkv, 2, bunch, head * dim, dim, first + value_at);
        for (int64_t row = bunch.row; row < end; ++row) {
            bf16* to = queries_ + row * query_width_ + query_at;
            float* query = y(row) + query_at;
            for (int g = 0; g < group; ++g, query += dim, to += dim) {
                turn(query, layer.query_norm, row);
                for (int d = 0; d < dim; d += kLanes) store_bf16(to + d, load(query + d));
            }
            turn(y(row) + key_at, layer.key_norm, row);
            write_key(layer.keys, kv_, step_->slots[row], head, y(row) + key_at);
            write_value(layer.values, kv_, step_->slots[row], head, y(row) + value_at);
        }
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
        if (!parts_.empty()) return attend_in_parts(layer);
        const int64_t count = int64_t(items_.size());
        const int64_t chunks = std::min<int64_t>(count, team_.size() * kAttentionChunks);
        team_.run(int(chunks), [&](int chunk, int thread) {
            float* scratch = attention_[size_t(thread)].take(0);
            float* results = scratch + kAttentionScratch;
            for (int64_t i = count * chunk / chunks; i < count * (chunk + 1) / chunks; ++i) {
                const AttentionItem& item = items_[size_t(i)];
                for (int piece = 0; piece < item.pieces; ++piece)
                    attend(layer, item, piece, scratch, results);
                gather(item, results);
            }
        });
    }

    void attend_in_parts(const Layer& layer) {
        team_.run(int(parts_.size()), [&](int part, int thread) {
            const auto& [item, piece] = parts_[size_t(part)];
            attend(layer, items_[item], piece, attention_[size_t(thread)].take(0),
                   results_ + items_[item].in_parts);
        });
        team_.run(int(items_.size()), [&](int i, int) {
            gather(items_[size_t(i)], results_ + items_[size_t(i)].in_parts);
        });
    }

    // An item's queries, row by row; how many there are.
    int queries(const Layer& layer, const AttentionItem& item, Query* to) {
        int count = 0;
        for (int64_t row = item.row; row < item.row + item.rows; ++row) {
            const int64_t end = step_->positions[row] + 1;
            const int64_t first = layer.window > 0 ? std::max<int64_t>(0, end - layer.window) : 0;
            for (int h = 0; h < item.head_count; ++h) {
                const int at = (item.first_head + h) * m_.dim;
                to[count++] = {queries_ + row * query_width_ + at, int(first), int(end)};
            }
        }
        return count;
    }

    // One piece of an item: its queries' results into results[piece][query].
    void attend(const Layer& layer, const AttentionItem& item, int piece, float* scratch,
                float* results) {
        Query found[kMostQueries];
        Piece to[kMostQueries];
        const int count = queries(layer, item, found);
        for (int q = 0; q < count; ++q)
            to[q].at = results + size_t(piece * kMostQueries + q) * Piece::numbers(m_.dim);
        const Sequence sequence{layer.keys, layer.values,
                                step_->block_tables + item.sequence * step_->table_width,
                                item.kv_head};
        veneer::attend(sequence, kv_, found, count, piece, 1.0f / std::sqrt(float(m_.dim)),
                       scratch, to);
    }

    void gather(const AttentionItem& item, float* results) {
        const size_t numbers = Piece::numbers(m_.dim);
        for (int64_t row = item.row; row < item.row + item.rows; ++row)
            for (int h = 0; h < item.head_count; ++h, results += numbers)
                veneer::gather(kv_, results, item.pieces, kMostQueries * numbers,
                               rounded(row) + (item.first_head + h) * m_.dim);
    }

    // -------------------------------------------------------------------- gate, head

    // silu(gate) * up, of the columns that a thread has computed.
    void gate(int layer) {
        const Linear& linear = m_.layers[layer].linears[kGateUp];
        const Columns columns(linear, team_.size() * kChunks);
        times.measure(kSilu, [&] {
            team_.run(columns.chunks, [&](int chunk, int) {
                const int first = kTile * columns.begin(chunk);
                const int last = kTile * columns.begin(chunk + 1);
                for (const Bunch& bunch : bunches_) gate(layer, bunch, first, last - first);
            });
        });
    }

    void gate(int layer, const Bunch& bunch, int first, int count) {
        float* start = y(bunch.row) + first;
        update(layer, kGateUp, 0, bunch, first, count, start);
        update(layer, kGateUp, 1, bunch, first, count, start + m_.intermediate);
        for (int64_t row = bunch.row; row < bunch.row + bunch.rows; ++row) {
            const float* gates = y(row) + first;
            const float* ups = gates + m_.intermediate;
            for (int i = 0; i < count; i += kLanes) {
                const Floats gate = load(gates + i);
                const Floats divisor = veneer::add(all(1.0f), exp(sub(zeros(), gate)));
                store_bf16(rounded(row) + first + i, mul(div(gate, divisor), load(ups + i)));
            }
        }
    }

    void logits() {
        each(kNorm, step_->logit_count, [&](int64_t i) {
            normalize(hidden(step_->logit_rows[i]), m_.final_norm, i);
        });
        const int tiles = m_.head.tiles();
        const int chunks = std::min(tiles, team_.size() * kHeadChunks);
        team_.run(chunks, [&](int chunk, int) {
            Asking asking;  // for nothing: it is the last
            multiply_tiles(m_.head, tiles * chunk / chunks, tiles * (chunk + 1) / chunks, rounded_,
                           size_t(width_), int(step_->logit_count), step_->logits,
                           size_t(m_.vocab), asking);
        });
    }

    static constexpr int kChunks = 8;  // a thread and part: what the slowest still has to do
    static constexpr int kAttentionChunks = 16;
    static constexpr int kItemsToShare = 8;  // a thread's; more are shared well enough whole
    static constexpr int kHeadChunks = 64;
    static constexpr int64_t kShrinkRows = 32;

    const Model& m_;
    Team& team_;
    const KvShape kv_;
    const int query_width_, kv_width_;
    const Step* step_ = nullptr;
    int width_ = 0, wide_ = 0, ranks_ = 0;
    float *hidden_ = nullptr, *y_ = nullptr, *shrunk_ = nullptr;
    float *cos_ = nullptr, *sin_ = nullptr;
    bf16 *rounded_ = nullptr, *queries_ = nullptr;
    Buffer<float> hidden_buffer_, y_buffer_, shrunk_buffer_, angles_buffer_;
    Buffer<bf16> rounded_buffer_, queries_buffer_;
    std::vector<Buffer<float>> attention_;
    std::vector<Bunch> bunches_;
    std::vector<int64_t> blocks_;  // of the cache, in the order in which attention reads them
    Wanted wanted_[3];
    std::vector<AttentionItem> items_;
    std::vector<std::pair<size_t, int>> parts_;  // item and piece
    Buffer<float> results_buffer_;
    float* results_ = nullptr;  // of all items' pieces
    std::vector<ShrinkItem> shrinks_;
};

}  // namespace veneer
