// Sixteen numbers at a time: the only file that knows the instruction set.
//
// The step's products multiply pairs of bfloat16 and add both to a float:
//     sum[lane] += w[lane].first * x.first + w[lane].second * x.second
// AVX512-BF16 has an instruction for that; AVX2 takes two fused multiply-adds of the pair's
// halves, each widened to a float by a shift or a mask.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define VENEER_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define VENEER_AVX512 0
#else
#error "the native backend needs AVX512-BF16, or AVX2 with FMA"
#endif

namespace veneer {

using bf16 = uint16_t;  // the upper half of a float
constexpr int kLanes = 16;

inline float to_float(bf16 value) {
    const uint32_t bits = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// Round to nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40);
    return bf16((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1); }

#if VENEER_AVX512

struct Floats {
    __m512 v;
};

// Sixteen pairs of bfloat16.
struct Pairs {
    __m512i v;
};

// Sixty-four bytes of codes.
struct Codes {
    __m512i v;
};

// Sixteen bfloat16 by 4-bit code.
struct Table {
    __m512i v;
    explicit Table(const bf16* entries) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries));
        v = _mm512_broadcast_i64x4(half);  // twice: bit 4 of an index then says nothing
    }
};

inline Floats zeros() { return {_mm512_setzero_ps()}; }
inline Floats all(float value) { return {_mm512_set1_ps(value)}; }
inline Floats load(const float* at) { return {_mm512_loadu_ps(at)}; }
inline Floats load(const bf16* at) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline __mmask16 first(int count) { return __mmask16((1u << count) - 1); }
inline Floats load(const float* at, int count) {
    return {_mm512_maskz_loadu_ps(first(count), at)};
}
inline Floats load(const bf16* at, int count) {
    const __m256i half = _mm256_maskz_loadu_epi16(first(count), at);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline void store(float* at, Floats a) { _mm512_storeu_ps(at, a.v); }
inline void store(float* at, Floats a, int count) {
    _mm512_mask_storeu_ps(at, first(count), a.v);
}
inline void store_bf16(bf16* at, Floats a) {
    const __m256bh half = _mm512_cvtneps_pbh(a.v);
    std::memcpy(at, &half, sizeof half);
}
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats round(Floats a) { return {_mm512_roundscale_ps(a.v, 0)}; }
// a * 2^n
inline Floats scale_by_power(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// Bit i: is a[i] > b[i]?
inline uint32_t above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
// a where not x < limit, else 0.
inline Floats keep_above(Floats a, Floats x, Floats limit) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), a.v)};
}
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }

inline Pairs load_pairs(const bf16* at) { return {_mm512_loadu_si512(at)}; }
// Numbers of two lines side by side: (first[0], second[0]), (first[1], second[1]), ...
inline Pairs pair_up(__m256i first, __m256i second) {
    alignas(64) static constexpr uint16_t order[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    return {_mm512_permutex2var_epi16(_mm512_castsi256_si512(first), _mm512_load_si512(order),
                                      _mm512_castsi256_si512(second))};
}
inline Pairs pair_up(const bf16* first_line, const bf16* second_line) {
    return pair_up(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first_line)),
                   _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second_line)));
}
inline Pairs pair_up(const bf16* first_line, const bf16* second_line, int count) {
    return pair_up(_mm256_maskz_loadu_epi16(first(count), first_line),
                   _mm256_maskz_loadu_epi16(first(count), second_line));
}
inline Pairs same_pair(const bf16* at) {
    int32_t both;
    std::memcpy(&both, at, sizeof both);
    return {_mm512_set1_epi32(both)};
}
inline Floats dot(Floats sums, Pairs w, Pairs x) {
    return {_mm512_dpbf16_ps(sums.v, (__m512bh)w.v, (__m512bh)x.v)};
}

inline Codes load_codes(const uint8_t* at) { return {_mm512_loadu_si512(at)}; }
// The pairs whose codes are the Q-th four bits of each 16.
template <int Q>
inline Pairs look_up(const Table& table, Codes codes) {
    return {_mm512_permutexvar_epi16(_mm512_srli_epi16(codes.v, 4 * Q), table.v)};
}

// Sixteen pairs of signed bytes; every one is a bfloat16.
inline Pairs load_bytes(const int8_t* at) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(at);
    const __m512 lo = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(halves)));
    const __m512 hi = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(halves + 1)));
    return {(__m512i)_mm512_cvtne2ps_pbh(hi, lo)};
}

#else  // AVX2

struct Floats {
    __m256 lo, hi;
};
struct Pairs {
    __m256i lo, hi;
};
struct Codes {
    __m256i lo, hi;
};

struct Table {
    __m256i low, high;  // the lower and the upper byte of each entry
    explicit Table(const bf16* entries) {
        alignas(16) uint8_t low_bytes[16], high_bytes[16];
        for (int i = 0; i < 16; ++i) {
            low_bytes[i] = uint8_t(entries[i]);
            high_bytes[i] = uint8_t(entries[i] >> 8);
        }
        low = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)low_bytes));
        high = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)high_bytes));
    }
};

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Floats load(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
inline __m256 widened(__m128i half) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Floats load(const bf16* at) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(at);
    return {widened(_mm_loadu_si128(halves)), widened(_mm_loadu_si128(halves + 1))};
}
inline Floats load(const float* at, int count) {
    alignas(32) float padded[kLanes] = {};
    std::memcpy(padded, at, count * sizeof(float));
    return load(padded);
}
inline Floats load(const bf16* at, int count) {
    alignas(32) bf16 padded[kLanes] = {};
    std::memcpy(padded, at, count * sizeof(bf16));
    return load(padded);
}
inline void store(float* at, Floats a) {
    _mm256_storeu_ps(at, a.lo);
    _mm256_storeu_ps(at + 8, a.hi);
}
inline void store(float* at, Floats a, int count) {
    alignas(32) float padded[kLanes];
    store(padded, a);
    std::memcpy(at, padded, count * sizeof(float));
}
inline void store_bf16(bf16* at, Floats a) {
    alignas(32) float numbers[kLanes];
    store(numbers, a);
    for (int i = 0; i < kLanes; ++i) at[i] = to_bf16(numbers[i]);
}
inline Floats add(Floats a, Floats b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline Floats sub(Floats a, Floats b) {
    return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline Floats mul(Floats a, Floats b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline Floats div(Floats a, Floats b) {
    return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Floats max(Floats a, Floats b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline Floats min(Floats a, Floats b) {
    return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
inline Floats round(Floats a) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, nearest), _mm256_round_ps(a.hi, nearest)};
}
inline __m256 power_of_two(__m256 n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
// a * 2^n; n in [-126, 127]
inline Floats scale_by_power(Floats a, Floats n) {
    return {_mm256_mul_ps(a.lo, power_of_two(n.lo)), _mm256_mul_ps(a.hi, power_of_two(n.hi))};
}
// Bit i: is a[i] > b[i]?
inline uint32_t above(Floats a, Floats b) {
    const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ));
    const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ));
    return uint32_t(lo | hi << 8);
}
// a where not x < limit, else 0.
inline Floats keep_above(Floats a, Floats x, Floats limit) {
    return {_mm256_and_ps(a.lo, _mm256_cmp_ps(x.lo, limit.lo, _CMP_NLT_UQ)),
            _mm256_and_ps(a.hi, _mm256_cmp_ps(x.hi, limit.hi, _CMP_NLT_UQ))};
}
inline float sum(Floats a) {
    alignas(32) float numbers[8];
    _mm256_store_ps(numbers, _mm256_add_ps(a.lo, a.hi));
    float total = 0;
    for (float number : numbers) total += number;
    return total;
}
inline float largest(Floats a) {
    alignas(32) float numbers[8];
    _mm256_store_ps(numbers, _mm256_max_ps(a.lo, a.hi));
    float most = numbers[0];
    for (float number : numbers) most = number > most ? number : most;
    return most;
}

inline Pairs load_pairs(const bf16* at) {
    const __m256i* halves = reinterpret_cast<const __m256i*>(at);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
// Numbers of two lines side by side: (first[0], second[0]), (first[1], second[1]), ...
inline Pairs pair_up(const bf16* first, const bf16* second) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
    // Unpacking works on 128 bits apart.
    const __m256i lo = _mm256_unpacklo_epi16(a, b), hi = _mm256_unpackhi_epi16(a, b);
    return {_mm256_permute2x128_si256(lo, hi, 0x20), _mm256_permute2x128_si256(lo, hi, 0x31)};
}
inline Pairs pair_up(const bf16* first, const bf16* second, int count) {
    alignas(32) bf16 padded[2][kLanes] = {};
    std::memcpy(padded[0], first, count * sizeof(bf16));
    std::memcpy(padded[1], second, count * sizeof(bf16));
    return pair_up(padded[0], padded[1]);
}
inline Pairs same_pair(const bf16* at) {
    int32_t both;
    std::memcpy(&both, at, sizeof both);
    return {_mm256_set1_epi32(both), _mm256_set1_epi32(both)};
}
inline __m256 even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 odd(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000u))));
}
inline Floats dot(Floats sums, Pairs w, Pairs x) {
    const __m256 lo = _mm256_fmadd_ps(even(w.lo), even(x.lo), sums.lo);
    const __m256 hi = _mm256_fmadd_ps(even(w.hi), even(x.hi), sums.hi);
    return {_mm256_fmadd_ps(odd(w.lo), odd(x.lo), lo), _mm256_fmadd_ps(odd(w.hi), odd(x.hi), hi)};
}

inline Codes load_codes(const uint8_t* at) {
    const __m256i* halves = reinterpret_cast<const __m256i*>(at);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
template <int Q>
inline __m256i look_up_half(const Table& table, __m256i codes) {
    // Index bytes of each 16: the code in the lower one, in the upper one too.
    const __m256i code = _mm256_and_si256(_mm256_srli_epi16(codes, 4 * Q), _mm256_set1_epi16(15));
    const __m256i low = _mm256_shuffle_epi8(table.low, code);
    const __m256i high = _mm256_shuffle_epi8(table.high, code);
    // The upper bytes looked up entry 0: they are not wanted.
    return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi16(255)),
                           _mm256_slli_epi16(high, 8));
}
template <int Q>
inline Pairs look_up(const Table& table, Codes codes) {
    return {look_up_half<Q>(table, codes.lo), look_up_half<Q>(table, codes.hi)};
}

// Sixteen pairs of signed bytes; every one is a bfloat16.
inline __m256i widened_bytes(const int8_t* at) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    const __m256 lo = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    const __m256 hi = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
    // Their lower halves are zero. Packing works on 128 bits apart: put in order after it.
    const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(_mm256_castps_si256(lo), 16),
                                               _mm256_srli_epi32(_mm256_castps_si256(hi), 16));
    return _mm256_permute4x64_epi64(packed, 0b11011000);
}
inline Pairs load_bytes(const int8_t* at) { return {widened_bytes(at), widened_bytes(at + 16)}; }

#endif

// e^x within 2 units in the last place, for x in [-87, 88]; beyond them as at them, where floats
// run out. Of a NaN and a number, max and min give the second operand: a NaN stays one.
inline Floats exp(Floats x) {
    const Floats clamped = min(all(88.0f), max(all(-87.0f), x));
    const Floats n = round(mul(clamped, all(1.44269504088896341f)));
    // x - n ln 2 in two parts, so that little is lost
    Floats r = fma(n, all(-0.693359375f), clamped);
    r = fma(n, all(2.12194440e-4f), r);
    Floats p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, all(1.0f)));
    return scale_by_power(p, n);
}

// e^x, and 0 where it would be below e^-87.
inline Floats exp_or_zero(Floats x) { return keep_above(exp(x), x, all(-87.0f)); }

}  // namespace veneer
