// AVX2 with FMA: sixteen floats in two registers. A pair takes two fused multiply-adds, after each
// half is widened to a float by a shift or a mask.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../kernels/bf16.h"
#include "x86.h"

namespace veneer {

#ifdef __AVXVNNI__
constexpr char kInstructions[] = "avx2-vnni";
#else
constexpr char kInstructions[] = "avx2";
#endif
constexpr int kLanes = 16;

// Tile sizes, so that a tile's sums and operands fit 16 registers. `Rows`: rows that a GEMM
// multiplies at once, by a tile of 32 outputs. `Chains`: partial sums per row and output.
namespace tiles {
constexpr int kFourBitRows = 3, kFourBitChains = 1;  // 12 registers
constexpr int kBf16Rows = 3;
constexpr int kEightBitRows = 3;
constexpr int kInt8Rows = 2;
// Vectors of outputs at once in LoRA's second GEMM, by the number of rows.
constexpr int expand_vectors(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
}  // namespace tiles

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
inline Floats broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
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
// Bit i is set if a[i] > b[i].
inline uint32_t above(Floats a, Floats b) {
    const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ));
    const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ));
    return uint32_t(lo | hi << 8);
}
// a, or 0 where x < limit.
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
inline void store_pairs(bf16* at, Pairs a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), a.lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at) + 1, a.hi);
}
inline Pairs load_pairs(const bf16* at, int count) {
    alignas(32) bf16 padded[2 * kLanes] = {};
    std::memcpy(padded, at, count * 2 * sizeof(bf16));
    return load_pairs(padded);
}
inline Pairs broadcast_pair(const bf16* at) {
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
    // Index bytes: the code in the lower byte of each 16 bits, 0 in the upper one.
    const __m256i code = _mm256_and_si256(_mm256_srli_epi16(codes, 4 * Q), _mm256_set1_epi16(15));
    const __m256i low = _mm256_shuffle_epi8(table.low, code);
    const __m256i high = _mm256_shuffle_epi8(table.high, code);
    // The upper index bytes look up entry 0; these results are masked or shifted out.
    return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi16(255)),
                           _mm256_slli_epi16(high, 8));
}
template <int Q>
inline Pairs look_up(const Table& table, Codes codes) {
    return {look_up_half<Q>(table, codes.lo), look_up_half<Q>(table, codes.hi)};
}

// For kernels/gemm/by_int8.h: 64 bytes, and sixteen sums. VNNI multiplies unsigned bytes by signed
// ones, so weights have an offset that makes them unsigned. Without VNNI such products do not fit
// the 16 bits in which two are added.
#ifdef __AVXVNNI__
constexpr int kInt8Offset = 128;
#else
constexpr int kInt8Offset = 0;
#endif
struct Int8s {
    __m256i lo, hi;
};
struct Int32s {
    __m256i lo, hi;
};
// The byte that each of the sixteen codes stands for, plus an offset.
struct Int8Table {
    __m256i v;
    Int8Table(const int8_t* numbers, int offset) {
        const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers));
        v = _mm256_broadcastsi128_si256(_mm_add_epi8(all, _mm_set1_epi8(char(offset))));
    }
};
// Look up the bytes for the codes in the lower (0) or upper (1) halves of bytes.
template <int Half>
inline Int8s look_up_bytes(const Int8Table& table, Codes codes) {
    const auto each = [&](__m256i part) {
        const __m256i half = Half == 0 ? part : _mm256_srli_epi16(part, 4);
        return _mm256_shuffle_epi8(table.v, _mm256_and_si256(half, _mm256_set1_epi8(15)));
    };
    return {each(codes.lo), each(codes.hi)};
}
template <int Offset>
inline Int8s load_int8s(const uint8_t* at) {
    const __m256i* halves = reinterpret_cast<const __m256i*>(at);
    const __m256i lo = _mm256_loadu_si256(halves), hi = _mm256_loadu_si256(halves + 1);
    if constexpr (Offset == 0) return {lo, hi};
    const __m256i offset = _mm256_set1_epi8(char(Offset));
    return {_mm256_xor_si256(lo, offset), _mm256_xor_si256(hi, offset)};
}
inline void store_int8s(int8_t* at, Int8s a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), a.lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at) + 1, a.hi);
}
// Interleave two vectors within each 16 bytes: `low` from their first eight, `high` from the
// others.
inline void interleave(Int8s a, Int8s b, Int8s& low, Int8s& high) {
    low = {_mm256_unpacklo_epi8(a.lo, b.lo), _mm256_unpacklo_epi8(a.hi, b.hi)};
    high = {_mm256_unpackhi_epi8(a.lo, b.lo), _mm256_unpackhi_epi8(a.hi, b.hi)};
}
// Sums. `dot` adds the products of four bytes of `w` with those of `four` to each.
inline Int32s int32s(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
inline Int32s load_int32s(const int32_t* at) {
    const __m256i* halves = reinterpret_cast<const __m256i*>(at);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline Int32s add(Int32s a, Int32s b) {
    return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline __m256i dot(__m256i sums, __m256i w, __m256i x) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(sums, w, x);
#else
    // Unsigned bytes by signed ones: the weight's magnitude, and the input with its sign. Two
    // products are at most 2 x 127 x 127, which 16 bits hold.
    const __m256i twos = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(twos, _mm256_set1_epi16(1)));
#endif
}
inline Int32s dot(Int32s sums, Int8s w, int32_t four) {
    const __m256i x = _mm256_set1_epi32(four);
    return {dot(sums.lo, w.lo, x), dot(sums.hi, w.hi, x)};
}
inline Floats to_floats(Int32s a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
// Undo the effect of `interleave` on two vectors of sums, whose fours take turns.
inline void quads_in_turn(Floats& low, Floats& high) {
    const Floats first{_mm256_permute2f128_ps(low.lo, high.lo, 0x20),
                       _mm256_permute2f128_ps(low.lo, high.lo, 0x31)};
    high = {_mm256_permute2f128_ps(low.hi, high.hi, 0x20),
            _mm256_permute2f128_ps(low.hi, high.hi, 0x31)};
    low = first;
}
// Store integers from -127 to 127 as bytes, in the order of int8_rows.h.
inline void store_int8(int8_t* at, Floats a) {
    // Packing works within 128 bits, so `halves` has the numbers 0-3, 8-11, 4-7, 12-15.
    const __m256i halves = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    const __m128i order = _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm_shuffle_epi8(bytes, order));
}

// Load sixteen pairs of signed bytes, widened to bfloat16, which represents them exactly.
inline __m256i widened_bytes(const int8_t* at) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    const __m256 lo = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    const __m256 hi = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
    // The floats' lower halves are zero. Packing works within 128 bits, so the result is permuted.
    const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(_mm256_castps_si256(lo), 16),
                                               _mm256_srli_epi32(_mm256_castps_si256(hi), 16));
    return _mm256_permute4x64_epi64(packed, 0b11011000);
}
inline Pairs load_bytes(const int8_t* at) { return {widened_bytes(at), widened_bytes(at + 16)}; }

// For kernels/gemm/by_numbers.h: the float that each of the sixteen codes stands for.
struct NumberTable {
    Floats v;
    explicit NumberTable(const bf16* entries) : v(load(entries)) {}
};
// Look up the floats for the codes in the N-th four bits of each 32.
inline __m256 look_up_numbers(const NumberTable& table, __m256i codes) {
    const __m256 lower = _mm256_permutevar8x32_ps(table.v.lo, codes);
    const __m256 upper = _mm256_permutevar8x32_ps(table.v.hi, codes);
    // Choose by the code's highest bit.
    return _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}
template <int N>
inline Floats look_up_number(const NumberTable& table, const uint8_t* at) {
    const Codes codes = load_codes(at);
    return {look_up_numbers(table, _mm256_srli_epi32(codes.lo, 4 * N)),
            look_up_numbers(table, _mm256_srli_epi32(codes.hi, 4 * N))};
}
// The first numbers of pairs, and the second ones.
inline Floats firsts(Pairs a) { return {even(a.lo), even(a.hi)}; }
inline Floats seconds(Pairs a) { return {odd(a.lo), odd(a.hi)}; }
// Load sixteen signed bytes.
inline Floats load_numbers_of(const int8_t* at) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
// Repeat two numbers in turn; and add neighbours: a[0] + a[1] to b[14] + b[15].
inline Floats broadcast_two(const float* at) {
    const __m256 both = _mm256_setr_ps(at[0], at[1], at[0], at[1], at[0], at[1], at[0], at[1]);
    return {both, both};
}
inline __m256 add_neighbours(__m256 a, __m256 b) {
    // Adding neighbours works within 128 bits.
    const __m256d sums = _mm256_castps_pd(_mm256_hadd_ps(a, b));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(sums, 0b11011000));
}
inline Floats add_neighbours(Floats a, Floats b) {
    return {add_neighbours(a.lo, a.hi), add_neighbours(b.lo, b.hi)};
}

}  // namespace veneer
