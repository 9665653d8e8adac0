// AVX512: one register holds sixteen floats. With BF16 one instruction multiplies sixteen pairs,
// without it two instructions multiply the first numbers and the second ones. With VNNI one
// instruction multiplies sixty-four bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../kernels/bf16.h"
#include "x86.h"

namespace veneer {

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
constexpr char kInstructions[] = "avx512-bf16";
#elif defined(__AVX512VNNI__)
#define VENEER_BY_NUMBERS
constexpr char kInstructions[] = "avx512-vnni";
#else
#define VENEER_BY_NUMBERS
constexpr char kInstructions[] = "avx512";
#endif
constexpr int kLanes = 16;

// Tile sizes, so that a tile's sums and operands fit 32 registers. `Rows`: rows that a GEMM
// multiplies at once, by a tile of 32 outputs. `Chains`: partial sums per row and output.
namespace tiles {
constexpr int kFourBitRows = 6, kFourBitChains = 2;  // 24 registers
constexpr int kNumberRows = 6;                       // two sums per row and output: 24 registers
constexpr int kBf16Rows = 12;
constexpr int kEightBitRows = 12;
constexpr int kInt8Rows = 8;
// Vectors of outputs at once in LoRA's second GEMM, by the number of rows.
constexpr int expand_vectors(int rows) {
    return rows == 1 ? 12 : rows == 2 ? 8 : rows == 3 ? 6 : 4;
}
}  // namespace tiles

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

// The bfloat16 that each of the sixteen codes stands for.
struct Table {
    __m512i v;
    explicit Table(const bf16* entries) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries));
        v = _mm512_broadcast_i64x4(half);  // twice, so that bit 4 of an index is ignored
    }
};

inline Floats zeros() { return {_mm512_setzero_ps()}; }
inline Floats broadcast(float value) { return {_mm512_set1_ps(value)}; }
inline Floats load(const float* at) { return {_mm512_loadu_ps(at)}; }
inline Floats load(const bf16* at) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline __mmask16 first(int count) { return __mmask16((1u << count) - 1); }
inline Floats load(const float* at, int count) { return {_mm512_maskz_loadu_ps(first(count), at)}; }
inline Floats load(const bf16* at, int count) {
    const __m256i half = _mm256_maskz_loadu_epi16(first(count), at);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline void store(float* at, Floats a) { _mm512_storeu_ps(at, a.v); }
inline void store(float* at, Floats a, int count) { _mm512_mask_storeu_ps(at, first(count), a.v); }
inline void store_bf16(bf16* at, Floats a) {
#ifdef VENEER_BY_NUMBERS
    const __m512i bits = _mm512_castps_si512(a.v), upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i half_up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half_up), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
    const __m256i half = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet));
#else
    const __m256bh half = _mm512_cvtneps_pbh(a.v);
#endif
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
// Bit i is set if a[i] > b[i].
inline uint32_t above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
// a, or 0 where x < limit.
inline Floats keep_above(Floats a, Floats x, Floats limit) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), a.v)};
}
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }

inline Pairs load_pairs(const bf16* at) { return {_mm512_loadu_si512(at)}; }
inline void store_pairs(bf16* at, Pairs a) { _mm512_storeu_si512(at, a.v); }
inline Pairs load_pairs(const bf16* at, int count) {
    return {_mm512_maskz_loadu_epi32(first(count), at)};
}
inline Pairs broadcast_pair(const bf16* at) {
    int32_t both;
    std::memcpy(&both, at, sizeof both);
    return {_mm512_set1_epi32(both)};
}
// The first numbers of pairs, and the second ones.
inline Floats firsts(Pairs a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
inline Floats seconds(Pairs a) {
    return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(int(0xffff0000u))))};
}
inline Floats dot(Floats sums, Pairs w, Pairs x) {
#ifdef VENEER_BY_NUMBERS
    return fma(seconds(w), seconds(x), fma(firsts(w), firsts(x), sums));
#else
    return {_mm512_dpbf16_ps(sums.v, (__m512bh)w.v, (__m512bh)x.v)};
#endif
}

inline Codes load_codes(const uint8_t* at) { return {_mm512_loadu_si512(at)}; }
// Look up the pairs for the codes in the Q-th four bits of each 16.
template <int Q>
inline Pairs look_up(const Table& table, Codes codes) {
    return {_mm512_permutexvar_epi16(_mm512_srli_epi16(codes.v, 4 * Q), table.v)};
}

// For kernels/gemm/by_numbers.h: the float that each of the sixteen codes stands for.
struct NumberTable {
    __m512 v;
    explicit NumberTable(const bf16* entries) : v(load(entries).v) {}
};
// Look up the floats for the codes in the N-th four bits of each 32.
template <int N>
inline Floats look_up_number(const NumberTable& table, const uint8_t* at) {
    const __m512i codes = _mm512_loadu_si512(at + N / 2);
    return {_mm512_permutexvar_ps(N % 2 == 0 ? codes : _mm512_srli_epi32(codes, 4), table.v)};
}
// Load sixteen signed bytes.
inline Floats load_numbers_of(const int8_t* at) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
// Repeat two numbers in turn; and add neighbours: a[0] + a[1] to b[14] + b[15].
inline Floats broadcast_two(const float* at) {
    double both;
    std::memcpy(&both, at, sizeof both);
    return {_mm512_castpd_ps(_mm512_set1_pd(both))};
}
inline Floats add_neighbours(Floats a, Floats b) {
    const __m512i order =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 even = _mm512_permutex2var_ps(a.v, order, b.v);
    const __m512i next = _mm512_add_epi32(order, _mm512_set1_epi32(1));
    return {_mm512_add_ps(even, _mm512_permutex2var_ps(a.v, next, b.v))};
}

// For kernels/gemm/by_int8.h: 64 bytes, and sixteen sums. VNNI multiplies unsigned bytes by signed
// ones, so weights have an offset that makes them unsigned. Without VNNI such products do not fit
// the 16 bits in which two are added.
#ifdef __AVX512VNNI__
constexpr int kInt8Offset = 128;
#else
constexpr int kInt8Offset = 0;
#endif
struct Int8s {
    __m512i v;
};
struct Int32s {
    __m512i v;
};
// The byte that each of the sixteen codes stands for, plus an offset.
struct Int8Table {
    __m512i v;
    Int8Table(const int8_t* numbers, int offset) {
        const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers));
        v = _mm512_broadcast_i32x4(_mm_add_epi8(all, _mm_set1_epi8(char(offset))));
    }
};
// Look up the bytes for the codes in the lower (0) or upper (1) halves of bytes.
template <int Half>
inline Int8s look_up_bytes(const Int8Table& table, Codes codes) {
    const __m512i half = Half == 0 ? codes.v : _mm512_srli_epi16(codes.v, 4);
    return {_mm512_shuffle_epi8(table.v, _mm512_and_si512(half, _mm512_set1_epi8(15)))};
}
// Load bytes and add an offset of 0 or 128.
template <int Offset>
inline Int8s load_int8s(const uint8_t* at) {
    const __m512i bytes = _mm512_loadu_si512(at);
    return {Offset == 0 ? bytes : _mm512_xor_si512(bytes, _mm512_set1_epi8(char(Offset)))};
}
inline void store_int8s(int8_t* at, Int8s a) { _mm512_storeu_si512(at, a.v); }
// Interleave two vectors within each 16 bytes: `low` from their first eight, `high` from the
// others.
inline void interleave(Int8s a, Int8s b, Int8s& low, Int8s& high) {
    low.v = _mm512_unpacklo_epi8(a.v, b.v);
    high.v = _mm512_unpackhi_epi8(a.v, b.v);
}
// Sums. `dot` adds the products of four bytes of `w` with those of `four` to each.
inline Int32s int32s(int32_t value) { return {_mm512_set1_epi32(value)}; }
inline Int32s load_int32s(const int32_t* at) { return {_mm512_loadu_si512(at)}; }
inline Int32s add(Int32s a, Int32s b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Int32s dot(Int32s sums, Int8s w, int32_t four) {
    const __m512i x = _mm512_set1_epi32(four);
#ifdef __AVX512VNNI__
    return {_mm512_dpbusd_epi32(sums.v, w.v, x)};
#else
    // The weight's magnitude, and the input with its sign: at most 2 x 127 x 127.
    const __m512i zero = _mm512_setzero_si512();
    const __m512i with_sign = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w.v), zero, x);
    const __m512i twos = _mm512_maddubs_epi16(_mm512_abs_epi8(w.v), with_sign);
    return {_mm512_add_epi32(sums.v, _mm512_madd_epi16(twos, _mm512_set1_epi16(1)))};
#endif
}
inline Floats to_floats(Int32s a) { return {_mm512_cvtepi32_ps(a.v)}; }
// Undo the effect of `interleave` on two vectors of sums, whose fours take turns.
inline void quads_in_turn(Floats& low, Floats& high) {
    const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i next = _mm512_add_epi32(order, _mm512_set1_epi32(8));
    const __m512 first = _mm512_permutex2var_ps(low.v, order, high.v);
    high.v = _mm512_permutex2var_ps(low.v, next, high.v);
    low.v = first;
}
// Store integers from -127 to 127 as bytes, in the order of int8_rows.h.
inline void store_int8(int8_t* at, Floats a) {
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm_shuffle_epi8(bytes, order));
}

// Load sixteen pairs of signed bytes, widened to bfloat16, which represents them exactly.
inline Pairs load_bytes(const int8_t* at) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(at);
    const __m512 lo = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(halves)));
    const __m512 hi = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(halves + 1)));
#ifdef VENEER_BY_NUMBERS
    // The floats' lower halves are zero.
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(lo), 16));
    const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(hi), 16));
    return {_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)};
#else
    return {(__m512i)_mm512_cvtne2ps_pbh(hi, lo)};
#endif
}

}  // namespace veneer
