// NEON (ARMv8-A): sixteen floats in four registers. With ARMv8.6's BF16 one instruction multiplies
// four pairs. Without it, a pair takes two fused multiply-adds, after each half is widened to a
// float by a shift or a mask.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../kernels/bf16.h"
#include "arm.h"

namespace veneer {

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
constexpr char kInstructions[] = "neon-bf16";
#else
constexpr char kInstructions[] = "neon";
#endif
constexpr int kLanes = 16;

// Tile sizes, so that a tile's sums and operands fit 32 registers. `Rows`: rows that a GEMM
// multiplies at once, by a tile of 32 outputs. `Chains`: partial sums per row and output.
namespace tiles {
constexpr int kFourBitRows = 3, kFourBitChains = 1;  // 24 registers
constexpr int kBf16Rows = 3;
constexpr int kEightBitRows = 3;
constexpr int kInt8Rows = 2;
// Vectors of outputs at once in LoRA's second GEMM, by the number of rows.
constexpr int expand_vectors(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
}  // namespace tiles

constexpr int kParts = 4;  // registers of a vector
// The GEMM takes one register of weights at a time.
#define VENEER_BY_REGISTERS

struct Floats {
    float32x4_t v[kParts];
};
struct Pairs {
    uint16x8_t v[kParts];
};
struct Codes {
    uint8x16_t v[kParts];
};

struct Table {
    uint8x16x2_t bytes;  // the lower byte of each entry, and the upper ones
    explicit Table(const bf16* entries)
        : bytes(vld2q_u8(reinterpret_cast<const uint8_t*>(entries))) {}
};

// Compute each register of the result from the operands' registers.
template <class Vector, class Function, class... Operands>
inline Vector each_part(const Function& function, const Operands&... operands) {
    return {{function(operands.v[0]...), function(operands.v[1]...), function(operands.v[2]...),
             function(operands.v[3]...)}};
}

inline Floats broadcast(float value) {
    const float32x4_t all = vdupq_n_f32(value);
    return {{all, all, all, all}};
}
inline Floats zeros() { return broadcast(0); }
inline Floats load(const float* at) {
    return {{vld1q_f32(at), vld1q_f32(at + 4), vld1q_f32(at + 8), vld1q_f32(at + 12)}};
}
inline Floats load(const bf16* at) {
    const uint16x8_t lo = vld1q_u16(at), hi = vld1q_u16(at + 8);
    return {{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(lo), 16)),
             vreinterpretq_f32_u32(vshll_high_n_u16(lo, 16)),
             vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(hi), 16)),
             vreinterpretq_f32_u32(vshll_high_n_u16(hi, 16))}};
}
inline Floats load(const float* at, int count) {
    float padded[kLanes] = {};
    std::memcpy(padded, at, size_t(count) * sizeof(float));
    return load(padded);
}
inline Floats load(const bf16* at, int count) {
    bf16 padded[kLanes] = {};
    std::memcpy(padded, at, size_t(count) * sizeof(bf16));
    return load(padded);
}
inline void store(float* at, Floats a) {
    for (int i = 0; i < kParts; ++i) vst1q_f32(at + 4 * i, a.v[i]);
}
inline void store(float* at, Floats a, int count) {
    float padded[kLanes];
    store(padded, a);
    std::memcpy(at, padded, size_t(count) * sizeof(float));
}

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
inline uint16x8_t rounded(float32x4_t lo, float32x4_t hi) {
    return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(lo), hi));
}
#else
// Round as `to_bf16` does.
inline uint16x4_t rounded(float32x4_t a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t number = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t nan = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), number, nan), 16);
}
inline uint16x8_t rounded(float32x4_t lo, float32x4_t hi) {
    return vcombine_u16(rounded(lo), rounded(hi));
}
#endif
inline void store_bf16(bf16* at, Floats a) {
    vst1q_u16(at, rounded(a.v[0], a.v[1]));
    vst1q_u16(at + 8, rounded(a.v[2], a.v[3]));
}

inline Floats add(Floats a, Floats b) {
    return each_part<Floats>([](auto... each) { return vaddq_f32(each...); }, a, b);
}
inline Floats sub(Floats a, Floats b) {
    return each_part<Floats>([](auto... each) { return vsubq_f32(each...); }, a, b);
}
inline Floats mul(Floats a, Floats b) {
    return each_part<Floats>([](auto... each) { return vmulq_f32(each...); }, a, b);
}
inline Floats div(Floats a, Floats b) {
    return each_part<Floats>([](auto... each) { return vdivq_f32(each...); }, a, b);
}
inline Floats fma(Floats a, Floats b, Floats c) {
    return each_part<Floats>([](auto... each) { return vfmaq_f32(each...); }, c, a, b);
}
inline Floats max(Floats a, Floats b) {
    return each_part<Floats>([](auto... each) { return vmaxq_f32(each...); }, a, b);
}
inline Floats min(Floats a, Floats b) {
    return each_part<Floats>([](auto... each) { return vminq_f32(each...); }, a, b);
}
inline Floats round(Floats a) {
    return each_part<Floats>([](auto each) { return vrndnq_f32(each); }, a);
}
inline float32x4_t power_of_two(float32x4_t n) {
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
}
// a * 2^n; n in [-126, 127]
inline Floats scale_by_power(Floats a, Floats n) {
    return each_part<Floats>(
        [](float32x4_t a, float32x4_t n) { return vmulq_f32(a, power_of_two(n)); }, a, n);
}
// Bit i is set if a[i] > b[i].
inline uint32_t above(Floats a, Floats b) {
    constexpr uint32_t first_bits[4] = {1, 2, 4, 8};
    const uint32x4_t bits = vld1q_u32(first_bits);
    uint32_t found = 0;
    for (int i = 0; i < kParts; ++i)
        found |= vaddvq_u32(vandq_u32(vcgtq_f32(a.v[i], b.v[i]), bits)) << (4 * i);
    return found;
}
// a, or 0 where x < limit.
inline Floats keep_above(Floats a, Floats x, Floats limit) {
    return each_part<Floats>(
        [](float32x4_t a, float32x4_t x, float32x4_t limit) {
            return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a), vcltq_f32(x, limit)));
        },
        a, x, limit);
}
inline float sum(Floats a) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3])));
}
inline float largest(Floats a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}

inline Pairs load_pairs(const bf16* at) {
    return {{vld1q_u16(at), vld1q_u16(at + 8), vld1q_u16(at + 16), vld1q_u16(at + 24)}};
}
inline void store_pairs(bf16* at, Pairs a) {
    for (int i = 0; i < kParts; ++i) vst1q_u16(at + 8 * i, a.v[i]);
}
inline Pairs load_pairs(const bf16* at, int count) {
    bf16 padded[2 * kLanes] = {};
    std::memcpy(padded, at, size_t(count) * 2 * sizeof(bf16));
    return load_pairs(padded);
}
inline Pairs broadcast_pair(const bf16* at) {
    uint32_t both;
    std::memcpy(&both, at, sizeof both);
    const uint16x8_t all = vreinterpretq_u16_u32(vdupq_n_u32(both));
    return {{all, all, all, all}};
}
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
inline float32x4_t dot(float32x4_t sums, uint16x8_t w, uint16x8_t x) {
    return vbfdotq_f32(sums, vreinterpretq_bf16_u16(w), vreinterpretq_bf16_u16(x));
}
#else
inline float32x4_t even(uint16x8_t pairs) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(pairs), 16));
}
inline float32x4_t odd(uint16x8_t pairs) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(pairs), vdupq_n_u32(0xffff0000u)));
}
inline float32x4_t dot(float32x4_t sums, uint16x8_t w, uint16x8_t x) {
    return vfmaq_f32(vfmaq_f32(sums, even(w), even(x)), odd(w), odd(x));
}
#endif
inline Floats dot(Floats sums, Pairs w, Pairs x) {
    return each_part<Floats>(
        [](float32x4_t sums, uint16x8_t w, uint16x8_t x) { return dot(sums, w, x); }, sums, w, x);
}

inline Codes load_codes(const uint8_t* at) {
    return {{vld1q_u8(at), vld1q_u8(at + 16), vld1q_u8(at + 32), vld1q_u8(at + 48)}};
}
// Look up the pairs for the codes in the Q-th four bits of each 16. Q % 2 is the half of a byte,
// Q / 2 the byte.
template <int Q>
inline uint16x8_t look_up(const Table& table, uint8x16_t codes) {
    const uint8x16_t each = Q % 2 == 0 ? vandq_u8(codes, vdupq_n_u8(15)) : vshrq_n_u8(codes, 4);
    const uint8x16_t lower = vqtbl1q_u8(table.bytes.val[0], each);
    const uint8x16_t upper = vqtbl1q_u8(table.bytes.val[1], each);
    return vreinterpretq_u16_u8(Q < 2 ? vtrn1q_u8(lower, upper) : vtrn2q_u8(lower, upper));
}
template <int Q>
inline Pairs look_up(const Table& table, Codes codes) {
    return each_part<Pairs>([&table](uint8x16_t part) { return look_up<Q>(table, part); }, codes);
}

// For kernels/gemm/by_int8.h: 64 bytes, and sixteen sums.
constexpr int kInt8Offset = 0;
struct Int8s {
    int8x16_t v[kParts];
};
struct Int32s {
    int32x4_t v[kParts];
};
// The byte that each of the sixteen codes stands for.
struct Int8Table {
    int8x16_t v;
    Int8Table(const int8_t* numbers, int) : v(vld1q_s8(numbers)) {}
};
// Look up the bytes for the codes in the lower (0) or upper (1) halves of bytes.
template <int Half>
inline Int8s look_up_bytes(const Int8Table& table, Codes codes) {
    return each_part<Int8s>(
        [&table](uint8x16_t part) {
            return vqtbl1q_s8(table.v,
                              Half == 0 ? vandq_u8(part, vdupq_n_u8(15)) : vshrq_n_u8(part, 4));
        },
        codes);
}
template <int Offset>
inline Int8s load_int8s(const uint8_t* at) {
    static_assert(Offset == 0);
    const int8_t* from = reinterpret_cast<const int8_t*>(at);
    return {{vld1q_s8(from), vld1q_s8(from + 16), vld1q_s8(from + 32), vld1q_s8(from + 48)}};
}
// Interleave two vectors within each 16 bytes: `low` from their first eight, `high` from the
// others.
inline void interleave(Int8s a, Int8s b, Int8s& low, Int8s& high) {
    low = each_part<Int8s>([](auto... each) { return vzip1q_s8(each...); }, a, b);
    high = each_part<Int8s>([](auto... each) { return vzip2q_s8(each...); }, a, b);
}
// Sums. `dot` adds the products of four bytes of `w` with those of `four` to each.
inline Int32s int32s(int32_t value) {
    const int32x4_t all = vdupq_n_s32(value);
    return {{all, all, all, all}};
}
inline Int32s add(Int32s a, Int32s b) {
    return each_part<Int32s>([](auto... each) { return vaddq_s32(each...); }, a, b);
}
inline int32x4_t dot(int32x4_t sums, int8x16_t w, int8x16_t x) {
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(w, x));
    return vaddq_s32(sums, vpaddq_s32(low, high));
}
inline Int32s dot(Int32s sums, Int8s w, int32_t four) {
    const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
    return each_part<Int32s>([x](int32x4_t sums, int8x16_t w) { return dot(sums, w, x); }, sums, w);
}
inline Floats to_floats(Int32s a) {
    return each_part<Floats>([](int32x4_t each) { return vcvtq_f32_s32(each); }, a);
}
// Undo the effect of `interleave` on two vectors of sums, whose fours take turns.
inline void quads_in_turn(Floats& low, Floats& high) {
    const Floats first{{low.v[0], high.v[0], low.v[1], high.v[1]}};
    high = {{low.v[2], high.v[2], low.v[3], high.v[3]}};
    low = first;
}
// Store integers from -127 to 127 as bytes, in the order of int8_rows.h.
inline void store_int8(int8_t* at, Floats a) {
    const auto narrow = [](float32x4_t lo, float32x4_t hi) {
        return vmovn_s16(vcombine_s16(vmovn_s32(vcvtq_s32_f32(lo)), vmovn_s32(vcvtq_s32_f32(hi))));
    };
    constexpr uint8_t order[16] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
    const int8x16_t bytes = vcombine_s8(narrow(a.v[0], a.v[1]), narrow(a.v[2], a.v[3]));
    vst1q_s8(at, vqtbl1q_s8(bytes, vld1q_u8(order)));
}

// Load sixteen pairs of signed bytes, widened to bfloat16, which represents them exactly.
inline uint16x8_t widened(int8x8_t bytes) {
    const int16x8_t halves = vmovl_s8(bytes);
    const float32x4_t lo = vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves)));
    const float32x4_t hi = vcvtq_f32_s32(vmovl_high_s16(halves));
    // The floats' lower halves are zero.
    return vuzp2q_u16(vreinterpretq_u16_f32(lo), vreinterpretq_u16_f32(hi));
}
inline Pairs load_bytes(const int8_t* at) {
    return {{widened(vld1_s8(at)), widened(vld1_s8(at + 8)), widened(vld1_s8(at + 16)),
             widened(vld1_s8(at + 24))}};
}

// For VENEER_BY_REGISTERS: the weights of four outputs for four pairs of inputs.
struct FourWeights {
    uint16x8_t pairs[4];
};
inline FourWeights look_up_four(const Table& table, const uint8_t* at) {
    const uint8x16_t codes = vld1q_u8(at);
    return {{look_up<0>(table, codes), look_up<1>(table, codes), look_up<2>(table, codes),
             look_up<3>(table, codes)}};
}
// Load them, `stride` numbers from one pair of inputs to the next.
inline FourWeights load_four(const bf16* at, int stride) {
    return {{vld1q_u16(at), vld1q_u16(at + stride), vld1q_u16(at + 2 * stride),
             vld1q_u16(at + 3 * stride)}};
}
inline FourWeights load_four(const int8_t* at, int stride) {
    return {{widened(vld1_s8(at)), widened(vld1_s8(at + stride)), widened(vld1_s8(at + 2 * stride)),
             widened(vld1_s8(at + 3 * stride))}};
}

// A row's four pairs of inputs. `dot` adds their products with the weights to four sums, in the
// same order as `dot` of whole vectors.
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
struct FourInputs {
    bfloat16x8_t pairs;
    FourInputs() = default;
    explicit FourInputs(const bf16* at) : pairs(vreinterpretq_bf16_u16(vld1q_u16(at))) {}
};
template <int Q>
inline float32x4_t dot(float32x4_t sums, const FourWeights& w, const FourInputs& x) {
    return vbfdotq_laneq_f32(sums, vreinterpretq_bf16_u16(w.pairs[Q]), x.pairs, Q);
}
#else
struct FourInputs {
    float32x4_t first, second;  // numbers of the pairs
    FourInputs() = default;
    explicit FourInputs(const bf16* at) : first(even(vld1q_u16(at))), second(odd(vld1q_u16(at))) {}
};
template <int Q>
inline float32x4_t dot(float32x4_t sums, const FourWeights& w, const FourInputs& x) {
    return vfmaq_laneq_f32(vfmaq_laneq_f32(sums, even(w.pairs[Q]), x.first, Q), odd(w.pairs[Q]),
                           x.second, Q);
}
#endif
inline float32x4_t dot(float32x4_t sums, const FourWeights& w, const FourInputs& x) {
    return dot<3>(dot<2>(dot<1>(dot<0>(sums, w, x), w, x), w, x), w, x);
}

}  // namespace veneer
