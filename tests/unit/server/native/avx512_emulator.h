// AVX512 for CPUs without it: what cpp/isa/avx512.h uses of the intrinsics, as plain C++ over
// arrays. Include it before the kernels (`-include`); with EMULATE_VNNI defined it has that too.
//
// After Intel's Intrinsics Guide. BF16's instructions are not here.
#pragma once

#include <x86intrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

// A register of 64 bytes, as N lanes of type T.
template <class T>
struct alignas(64) Lanes {
    static constexpr int count = 64 / sizeof(T);
    T at[count];
};

struct alignas(64) Floats {
    float at[16];
};
struct alignas(64) Doubles {
    double at[8];
};
struct alignas(64) Bits {
    uint8_t at[64];
};
using Mask = uint16_t;

template <class To, class From>
inline To cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
template <class T>
inline Lanes<T> lanes(const Bits& bits) {
    return cast<Lanes<T>>(bits);
}
// Bits of which each lane is `f` of its number.
template <class T, class F>
inline Bits make(F f) {
    Lanes<T> to;
    for (int i = 0; i < Lanes<T>::count; ++i) to.at[i] = T(f(i));
    return cast<Bits>(to);
}
template <class F>
inline Floats floats(F f) {
    Floats to;
    for (int i = 0; i < 16; ++i) to.at[i] = f(i);
    return to;
}
template <class F>
inline uint64_t mask(int count, F f) {
    uint64_t to = 0;
    for (int i = 0; i < count; ++i) to |= uint64_t(bool(f(i))) << i;
    return to;
}
template <class To, class Half>
inline To low_half(const Half& half) {
    To to{};
    std::memcpy(&to, &half, sizeof half);
    return to;
}
inline bool set(uint64_t mask, int i) { return mask >> i & 1; }

// ------------------------------------------------------------------------- floats

inline Floats setzero_ps() { return {}; }
inline Floats set1_ps(float v) {
    return floats([&](int) { return v; });
}
inline Doubles set1_pd(double v) { return {{v, v, v, v, v, v, v, v}}; }
inline Floats loadu_ps(const void* at) {
    Floats to;
    std::memcpy(&to, at, sizeof to);
    return to;
}
inline Floats maskz_loadu_ps(Mask m, const void* at) {  // reads nothing that is masked
    const float* from = static_cast<const float*>(at);
    return floats([&](int i) { return set(m, i) ? from[i] : 0; });
}
inline void storeu_ps(void* at, Floats a) { std::memcpy(at, &a, sizeof a); }
inline void mask_storeu_ps(void* at, Mask m, Floats a) {
    for (int i = 0; i < 16; ++i)
        if (set(m, i)) static_cast<float*>(at)[i] = a.at[i];
}
#define EMULATE(name, expression)              \
    inline Floats name(Floats a, Floats b) {   \
        return floats([&](int i) {             \
            const float x = a.at[i], y = b.at[i]; \
            return expression;                 \
        });                                    \
    }
EMULATE(add_ps, x + y)
EMULATE(sub_ps, x - y)
EMULATE(mul_ps, x* y)
EMULATE(div_ps, x / y)
EMULATE(max_ps, x > y ? x : y)
EMULATE(min_ps, x < y ? x : y)
EMULATE(scalef_ps, std::ldexp(x, int(std::floor(y))))
#undef EMULATE
inline Floats fmadd_ps(Floats a, Floats b, Floats c) {
    return floats([&](int i) { return __builtin_fmaf(a.at[i], b.at[i], c.at[i]); });
}
inline Floats roundscale_ps(Floats a, int) {  // 0: to the nearest integer, ties to even
    return floats([&](int i) { return std::nearbyint(a.at[i]); });
}
inline Mask cmp_ps_mask(Floats a, Floats b, int how) {
    return Mask(mask(16, [&](int i) {
        const float x = a.at[i], y = b.at[i];
        switch (how) {
            case _CMP_GT_OQ: return x > y;
            case _CMP_NLT_UQ: return !(x < y);
            case _CMP_UNORD_Q: return x != x || y != y;
            default: __builtin_trap();
        }
    }));
}
inline Floats maskz_mov_ps(Mask m, Floats a) {
    return floats([&](int i) { return set(m, i) ? a.at[i] : 0; });
}
// Halves are added, then quarters, and so on.
template <class F>
inline float reduce(Floats a, F f) {
    for (int n = 8; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) a.at[i] = f(a.at[i], a.at[i + n]);
    return a.at[0];
}
inline float reduce_add_ps(Floats a) {
    return reduce(a, [](float x, float y) { return x + y; });
}
inline float reduce_max_ps(Floats a) {
    return reduce(a, [](float x, float y) { return x > y ? x : y; });
}
inline Floats permutexvar_ps(Bits index, Floats a) {
    const auto from = lanes<uint32_t>(index);
    return floats([&](int i) { return a.at[from.at[i] & 15]; });
}
inline Floats permutex2var_ps(Floats a, Bits index, Floats b) {
    const auto from = lanes<uint32_t>(index);
    return floats([&](int i) { return (from.at[i] & 16 ? b : a).at[from.at[i] & 15]; });
}
inline Floats castsi512_ps(Bits a) { return cast<Floats>(a); }
inline Floats castpd_ps(Doubles a) { return cast<Floats>(a); }
inline Bits castps_si512(Floats a) { return cast<Bits>(a); }

// ------------------------------------------------------------------------- integers

inline Bits setzero_si512() { return {}; }
inline Bits set1_epi8(char v) {
    return make<int8_t>([&](int) { return v; });
}
inline Bits set1_epi16(short v) {
    return make<int16_t>([&](int) { return v; });
}
inline Bits set1_epi32(int v) {
    return make<int32_t>([&](int) { return v; });
}
template <class... Numbers>
inline Bits setr_epi32(Numbers... numbers) {
    const int32_t all[] = {numbers...};
    return make<int32_t>([&](int i) { return all[i]; });
}
inline Bits loadu_si512(const void* at) {
    Bits to;
    std::memcpy(&to, at, sizeof to);
    return to;
}
inline Bits maskz_loadu_epi32(Mask m, const void* at) {  // reads nothing that is masked
    return make<int32_t>([&](int i) {
        int32_t value = 0;
        if (set(m, i)) std::memcpy(&value, static_cast<const char*>(at) + 4 * i, 4);
        return value;
    });
}
inline __m256i maskz_loadu_epi16_half(Mask m, const void* at) {
    int16_t to[16] = {};
    for (int i = 0; i < 16; ++i)
        if (set(m, i)) std::memcpy(to + i, static_cast<const char*>(at) + 2 * i, 2);
    return cast<__m256i>(to);
}
inline void storeu_si512(void* at, Bits a) { std::memcpy(at, &a, sizeof a); }
#define EMULATE(name, T, expression)                  \
    inline Bits name(Bits a, Bits b) {                \
        const auto left = lanes<T>(a), right = lanes<T>(b); \
        return make<T>([&](int i) {                   \
            const T x = left.at[i], y = right.at[i];  \
            return expression;                        \
        });                                           \
    }
EMULATE(add_epi32, uint32_t, x + y)
EMULATE(and_si512, uint32_t, x& y)
EMULATE(or_si512, uint32_t, x | y)
EMULATE(xor_si512, uint32_t, x ^ y)
#undef EMULATE
#define EMULATE(name, T, expression)                               \
    inline Bits name(Bits a, unsigned by) {                        \
        const auto from = lanes<T>(a);                             \
        return make<T>([&](int i) { return T(from.at[i]) expression; }); \
    }
EMULATE(srli_epi16, uint16_t, >> by)
EMULATE(srli_epi32, uint32_t, >> by)
EMULATE(slli_epi32, uint32_t, << by)
#undef EMULATE
inline Bits abs_epi8(Bits a) {
    const auto from = lanes<int8_t>(a);
    return make<int8_t>([&](int i) { return from.at[i] < 0 ? -from.at[i] : from.at[i]; });
}
inline uint64_t movepi8_mask(Bits a) {
    return mask(64, [&](int i) { return a.at[i] & 128; });
}
inline Bits mask_sub_epi8(Bits other, uint64_t m, Bits a, Bits b) {
    return make<uint8_t>([&](int i) { return set(m, i) ? a.at[i] - b.at[i] : other.at[i]; });
}
inline Bits mask_mov_epi32(Bits other, Mask m, Bits a) {
    const auto no = lanes<int32_t>(other), yes = lanes<int32_t>(a);
    return make<int32_t>([&](int i) { return (set(m, i) ? yes : no).at[i]; });
}
inline Bits madd_epi16(Bits a, Bits b) {
    const auto x = lanes<int16_t>(a), y = lanes<int16_t>(b);
    return make<int32_t>([&](int i) {
        return x.at[2 * i] * y.at[2 * i] + x.at[2 * i + 1] * y.at[2 * i + 1];
    });
}
inline Bits maddubs_epi16(Bits a, Bits b) {  // saturates
    const auto y = lanes<int8_t>(b);
    return make<int16_t>([&](int i) {
        const int sum = a.at[2 * i] * y.at[2 * i] + a.at[2 * i + 1] * y.at[2 * i + 1];
        return std::clamp(sum, -32768, 32767);
    });
}
inline Bits dpbusd_epi32(Bits sums, Bits a, Bits b) {
    const auto from = lanes<int32_t>(sums);
    const auto y = lanes<int8_t>(b);
    return make<int32_t>([&](int i) {
        int32_t sum = from.at[i];
        for (int k = 4 * i; k < 4 * i + 4; ++k) sum += a.at[k] * y.at[k];
        return sum;
    });
}
inline Bits permutexvar_epi16(Bits index, Bits a) {
    const auto from = lanes<uint16_t>(index), numbers = lanes<uint16_t>(a);
    return make<uint16_t>([&](int i) { return numbers.at[from.at[i] & 31]; });
}
// The next three work within 16 bytes.
inline Bits shuffle_epi8(Bits a, Bits index) {
    return make<uint8_t>([&](int i) {
        const uint8_t from = index.at[i];
        return from & 128 ? 0 : a.at[i / 16 * 16 + (from & 15)];
    });
}
inline Bits unpack(Bits a, Bits b, int from) {
    return make<uint8_t>(
        [&](int i) { return (i % 2 ? b : a).at[i / 16 * 16 + from + i % 16 / 2]; });
}
inline Bits unpacklo_epi8(Bits a, Bits b) { return unpack(a, b, 0); }
inline Bits unpackhi_epi8(Bits a, Bits b) { return unpack(a, b, 8); }
inline Bits broadcast_i32x4(__m128i a) {
    const Bits from = low_half<Bits>(a);
    return make<uint8_t>([&](int i) { return from.at[i % 16]; });
}
inline Bits broadcast_i64x4(__m256i a) {
    const Bits from = low_half<Bits>(a);
    return make<uint8_t>([&](int i) { return from.at[i % 32]; });
}
inline Bits castsi256_si512(__m256i a) { return low_half<Bits>(a); }
inline Bits inserti64x4(Bits a, __m256i b, int which) {
    std::memcpy(a.at + 32 * which, &b, sizeof b);
    return a;
}

// ------------------------------------------------------------------------- conversions

inline Bits cvtepu16_epi32(__m256i a) {
    const auto from = lanes<uint16_t>(low_half<Bits>(a));
    return make<int32_t>([&](int i) { return from.at[i]; });
}
inline Bits cvtepi8_epi32(__m128i a) {
    const auto from = lanes<int8_t>(low_half<Bits>(a));
    return make<int32_t>([&](int i) { return from.at[i]; });
}
inline Floats cvtepi32_ps(Bits a) {
    const auto from = lanes<int32_t>(a);
    return floats([&](int i) { return float(from.at[i]); });
}
inline Bits cvtps_epi32(Floats a) {
    return make<int32_t>([&](int i) {
        const float x = std::nearbyint(a.at[i]);
        return x >= -2147483648.0f && x < 2147483648.0f ? int32_t(x) : INT32_MIN;
    });
}
inline __m256i cvtepi32_epi16(Bits a) {
    const auto from = lanes<int32_t>(a);
    int16_t to[16];
    for (int i = 0; i < 16; ++i) to[i] = int16_t(from.at[i]);
    return cast<__m256i>(to);
}
inline __m128i cvtepi32_epi8(Bits a) {
    const auto from = lanes<int32_t>(a);
    int8_t to[16];
    for (int i = 0; i < 16; ++i) to[i] = int8_t(from.at[i]);
    return cast<__m128i>(to);
}

}  // namespace emulated

#define __m512 emulated::Floats
#define __m512i emulated::Bits
#define __mmask16 emulated::Mask
#define _mm256_maskz_loadu_epi16 emulated::maskz_loadu_epi16_half
#define _mm512_abs_epi8 emulated::abs_epi8
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_add_ps emulated::add_ps
#define _mm512_and_si512 emulated::and_si512
#define _mm512_broadcast_i32x4 emulated::broadcast_i32x4
#define _mm512_broadcast_i64x4 emulated::broadcast_i64x4
#define _mm512_castpd_ps emulated::castpd_ps
#define _mm512_castps_si512 emulated::castps_si512
#define _mm512_castsi256_si512 emulated::castsi256_si512
#define _mm512_castsi512_ps emulated::castsi512_ps
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_div_ps emulated::div_ps
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_inserti64x4 emulated::inserti64x4
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_maddubs_epi16 emulated::maddubs_epi16
#define _mm512_mask_mov_epi32 emulated::mask_mov_epi32
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm512_mask_sub_epi8 emulated::mask_sub_epi8
#define _mm512_maskz_loadu_epi32 emulated::maskz_loadu_epi32
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_maskz_mov_ps emulated::maskz_mov_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_movepi8_mask emulated::movepi8_mask
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_or_si512 emulated::or_si512
#define _mm512_permutex2var_ps emulated::permutex2var_ps
#define _mm512_permutexvar_epi16 emulated::permutexvar_epi16
#define _mm512_permutexvar_ps emulated::permutexvar_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#define _mm512_roundscale_ps emulated::roundscale_ps
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_set1_epi16 emulated::set1_epi16
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_epi8 emulated::set1_epi8
#define _mm512_set1_pd emulated::set1_pd
#define _mm512_set1_ps emulated::set1_ps
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated::setr_epi32
#define _mm512_setzero_ps emulated::setzero_ps
#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_shuffle_epi8 emulated::shuffle_epi8
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_unpackhi_epi8 emulated::unpackhi_epi8
#define _mm512_unpacklo_epi8 emulated::unpacklo_epi8
#define _mm512_xor_si512 emulated::xor_si512

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#ifdef EMULATE_VNNI
#define __AVX512VNNI__ 1
#endif
