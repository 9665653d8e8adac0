// What the machine can do at most: reading memory, multiplying. For tests/bench/kernels.py.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

double now() {
    const auto since = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(since).count();
}

// Seconds until `work(thread)` is done by all; the least of `times`.
template <class Work>
double least(int threads, int times, const Work& work) {
    double best = 1e9;
    for (int i = 0; i < times; ++i) {
        const double began = now();
        std::vector<std::thread> others;
        for (int thread = 1; thread < threads; ++thread)
            others.emplace_back([&, thread] { work(thread); });
        work(0);
        for (auto& other : others) other.join();
        best = std::min(best, now() - began);
    }
    return best;
}

// A sum of all, asking `Ahead` bytes ahead (0: the CPU asks alone).
template <size_t Ahead>
void read(const char* at, size_t size) {
    __m256i sums[4] = {};
    for (size_t i = 0; i + 128 <= size; i += 128) {
        if (Ahead > 0) {
            _mm_prefetch(at + i + Ahead, _MM_HINT_T1);
            _mm_prefetch(at + i + Ahead + 64, _MM_HINT_T1);
        }
        for (int k = 0; k < 4; ++k)
            sums[k] = _mm256_add_epi32(
                sums[k], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + i) + k));
    }
    for (auto& sum : sums) asm volatile("" ::"x"(sum));  // or nothing would be read
}

template <size_t Ahead>
double read_seconds(const char* memory, size_t share, int threads) {
    return least(threads, 9,
                 [&](int thread) { read<Ahead>(memory + share * size_t(thread), share); });
}

constexpr int64_t kTurns = 4000000;

// Floating-point operations of one thread in registers: products of bfloat16 pairs where the CPU
// has them, else fused multiply-adds.
double multiply() {
    constexpr int chains = 12;
#if defined(__AVX512BF16__)
    __m512 sums[chains];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    const __m512i zero = _mm512_setzero_si512();
    for (int64_t i = 0; i < kTurns; ++i)
        for (auto& sum : sums) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(zero));
    return double(kTurns) * chains * 64;
#else
    __m256 sums[chains];
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    const __m256 zero = _mm256_setzero_ps();
    for (int64_t i = 0; i < kTurns; ++i)
        for (auto& sum : sums) asm volatile("vfmadd231ps %1, %1, %0" : "+x"(sum) : "x"(zero));
    return double(kTurns) * chains * 16;
#endif
}

}  // namespace

extern "C" {

// Bytes a second that so many threads read of memory, in the fastest of some forms.
double limit_read(const char* memory, int64_t size, int32_t threads) {
    const size_t share = size_t(size / threads);
    return double(size) / std::min({read_seconds<0>(memory, share, threads),
                                    read_seconds<2048>(memory, share, threads),
                                    read_seconds<6912>(memory, share, threads),
                                    read_seconds<16384>(memory, share, threads)});
}

// Floating-point operations a second.
double limit_multiply(int32_t threads) {
    std::vector<double> done(static_cast<size_t>(threads));
    const double took = least(threads, 5, [&](int thread) { done[size_t(thread)] = multiply(); });
    double all = 0;
    for (const double each : done) all += each;
    return all / took;
}

// Median seconds of one product, by veneer_multiply, over linears that lie one after another.
double limit_time(void (*multiply)(const void*, const uint16_t*, int64_t, float*),
                  const void* const* linears, int32_t count, const uint16_t* x, int64_t rows,
                  float* y, int32_t times) {
    std::vector<double> took;
    for (int i = 0; i < times; ++i)
        took.push_back(least(1, 1,
                             [&](int) {
                                 for (int l = 0; l < count; ++l) multiply(linears[l], x, rows, y);
                             }) /
                       count);
    std::nth_element(took.begin(), took.begin() + times / 2, took.end());
    return took[size_t(times / 2)];
}

}  // extern "C"
