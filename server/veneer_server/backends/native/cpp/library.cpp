// The C interface. Functions that can fail return a `Status`.
#include <algorithm>
#include <atomic>
#include <exception>
#include <new>
#include <system_error>
#include <vector>

#include "decoder/decoder.h"
#include "kernels/gemm/pack.h"
#include "kernels/gemm/quantize.h"
#include "kernels/sample.h"
#include "layout.h"

using namespace veneer;

namespace {

// The caller has the same numbers (`Status` of library.py).
enum Status : int32_t { kOk = 0, kNoMemory = 1, kNoThreads = 2, kInternal = 3 };

// Concatenate the tables, and add a row without a struct.
template <size_t... Sizes>
std::vector<Field> joined(const Field (&... tables)[Sizes]) {
    std::vector<Field> all;
    (all.insert(all.end(), tables, tables + Sizes), ...);
    all.push_back({});
    return all;
}

// Call `function`, and turn an exception into a status.
template <class Function>
Status caught(const Function& function) noexcept {
    try {
        function();
        return kOk;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    } catch (const std::system_error&) {
        return kNoThreads;  // only starting threads throws it
    } catch (...) {
        return kInternal;
    }
}

struct Engine {
    Engine(const Model& given, int threads)
        : model(given), pool(threads), decoder(model, pool), samplers(size_t(threads)) {}

    Model model;
    ThreadPool pool;
    Decoder decoder;
    std::vector<Sampler> samplers;  // by thread
};

// Call `function(row, sampler)` for each row, on an engine's threads if there is an engine and more
// than one row. Returns the status of a row that failed, or kOk.
template <class Function>
Status each_row(void* handle, int64_t rows, const Function& function) noexcept {
    if (handle == nullptr) {
        return caught([&] {
            Sampler sampler;
            for (int64_t row = 0; row < rows; ++row) function(row, sampler);
        });
    }
    std::atomic<Status> status{kOk};
    Engine& engine = *static_cast<Engine*>(handle);
    if (rows > 1) engine.pool.wake();
    engine.pool.each(rows, [&](int64_t row, int thread) {
        // Caught here: an exception must not leave a thread of the pool.
        const Status each = caught([&] { function(row, engine.samplers[size_t(thread)]); });
        if (each != kOk) status.store(each, std::memory_order_relaxed);
    });
    if (rows > 1) engine.pool.let_sleep();
    return status;
}

// Call `function(part)` for each part, on new threads: packing is done before there is an engine,
// and takes far longer than starting threads.
template <class Function>
Status each_part(int64_t parts, int threads, const Function& function) noexcept {
    return caught([&] {
        ThreadPool pool(int(std::clamp<int64_t>(parts, 1, threads)));
        pool.wake();
        pool.each(parts, [&](int64_t part, int) { function(part); });
        pool.let_sleep();
    });
}

// Call `function(tile, at)` for each tile of a weight; `at` is where the tile is packed to.
template <class Function>
Status each_tile(Kind kind, int outputs, int inputs, uint8_t* to, int threads,
                 const Function& function) noexcept {
    const size_t bytes = size_t(inputs / kBlock) * block_bytes(kind);
    return each_part((outputs + kTile - 1) / kTile, threads,
                     [&](int64_t tile) { function(int(tile), to + size_t(tile) * bytes); });
}

}  // namespace

extern "C" {

// The structs' fields; the last row has no struct.
const Field* veneer_fields() {
    static const std::vector<Field> fields =
        joined(kLinearFields, kLayerFields, kModelFields, kLoraMemberFields, kLoraGroupFields,
               kLoraAdapterFields, kSegmentFields, kStepFields, kSampleRowFields);
    return fields.data();
}

const char* veneer_instructions() { return matrix::kPresent ? matrix::kName : kInstructions; }

// Ask the operating system for the matrix registers, if the kernels need them; 0 if it refuses.
// Call once per process, before any function that computes.
int32_t veneer_permit() { return matrix::permit() ? 1 : 0; }

int64_t veneer_packed_bytes(int32_t kind, int32_t outputs, int32_t inputs) {
    const int64_t tiles = (outputs + kTile - 1) / kTile;
    return tiles * (inputs / kBlock) * int64_t(block_bytes(Kind(kind)));
}

// The version of the packed weights' layout.
int32_t veneer_layout() { return kLayout; }

// Quantize blocks of 64 weights. `stored` is a `Stored`; `bounds` and `book` make up a `CodeBook`.
Status veneer_quantize(const void* weights, int32_t stored, int64_t blocks, const float* bounds,
                       const uint8_t* book, uint8_t* codes, float* largest, int32_t threads) {
    constexpr int64_t together = 512;
    return each_part((blocks + together - 1) / together, threads, [&](int64_t part) {
        quantize_blocks(Stored(stored), weights, part * together,
                        std::min(blocks, (part + 1) * together), {bounds, book}, codes, largest);
    });
}

Status veneer_pack_four_bit(const uint8_t* codes, const float* scales, int32_t outputs,
                            int32_t inputs, uint8_t* to, int32_t threads) {
    return each_tile(Kind::four_bit, outputs, inputs, to, threads, [&](int tile, uint8_t* at) {
        pack_four_bit(codes, scales, outputs, inputs, tile, at);
    });
}

Status veneer_pack_eight_bit(const bf16* weights, int32_t outputs, int32_t inputs, uint8_t* to,
                             int32_t threads) {
    return each_tile(Kind::eight_bit, outputs, inputs, to, threads, [&](int tile, uint8_t* at) {
        pack_eight_bit(weights, outputs, inputs, tile, at);
    });
}

Status veneer_pack_bf16(const bf16* weights, int32_t outputs, int32_t inputs, uint8_t* to,
                        int32_t threads) {
    return each_tile(Kind::bfloat16, outputs, inputs, to, threads,
                     [&](int tile, uint8_t* at) { pack_bf16(weights, outputs, inputs, tile, at); });
}

// y [rows, outputs] = x [rows, inputs] W^T, on the calling thread.
void veneer_multiply(const Linear* linear, const bf16* x, int64_t rows, float* y) {
    Prefetcher nothing;
    const size_t width = size_t(linear->inputs), stride = Int8Rows::bytes(width);
    std::vector<uint8_t> int8(linear->int8_inputs ? size_t(rows) * stride : 0);
    for (int64_t row = 0; row < rows && linear->int8_inputs; ++row)
        Int8Output{int8.data(), stride, width}.write(row, x + size_t(row) * width, 0,
                                                     linear->blocks());
    multiply_tiles(*linear, 0, linear->tiles(),
                   {x, width, {linear->int8_inputs ? int8.data() : nullptr, stride, width}},
                   int(rows), y, size_t(linear->outputs), nothing);
    matrix::give_up();
}

// Create an engine and store it in *to, or null on failure. Free it with `veneer_destroy`.
Status veneer_create(const Model* model, int32_t threads, void** to) {
    *to = nullptr;
    return caught([&] { *to = new Engine(*model, threads); });
}

// Bind an engine's thread to these CPUs; 0 if the system refuses. See `ThreadPool::bind`.
int32_t veneer_bind(void* handle, int32_t thread, const int32_t* cpus, int32_t count) {
    bool bound = false;
    const Status status = caught(
        [&] { bound = static_cast<Engine*>(handle)->pool.bind(thread, CpuSet(cpus, count)); });
    return status == kOk && bound ? 1 : 0;
}

void veneer_destroy(void* engine) { delete static_cast<Engine*>(engine); }

Status veneer_step(void* handle, const Step* step) {
    Engine& engine = *static_cast<Engine*>(handle);
    engine.pool.wake();
    const Status status = caught([&] { engine.decoder.run(*step); });
    engine.pool.let_sleep();
    return status;
}

// Sample a token for each row, on the calling thread if there is no engine.
Status veneer_sample(void* engine, SampleRow* rows, int64_t count, int64_t vocab) {
    return each_row(engine, count, [&](int64_t row, Sampler& sampler) {
        store_number(&rows[row].token, sampler.token(rows[row], vocab));
    });
}

// Compute log(sum of e^logit) of each row.
Status veneer_log_sums(void* engine, const float* logits, int64_t rows, int64_t vocab, float* to) {
    return each_row(engine, rows, [&](int64_t row, Sampler&) {
        store_number(to + row, log_sum(logits + row * vocab, vocab));
    });
}

// Get the seconds spent in each kind of phase (`Time`) in all steps so far. Zeros unless compiled
// with VENEER_TIMES.
void veneer_times(void* handle, double* to) {
    const Decoder& decoder = static_cast<Engine*>(handle)->decoder;
    std::memcpy(to, decoder.seconds, sizeof decoder.seconds);
}

}  // extern "C"
