// The GEMM's inner loop for vectors of several registers. It takes one register of weights at a
// time: four outputs with four pairs of inputs. With whole vectors, a group's weights would need as
// many registers as the sums, and would be spilled to memory.
#pragma once

#include "linear.h"

#ifdef VENEER_BY_REGISTERS

namespace veneer {

inline FourWeights weights_of(const FromCodes& source, int group, int half, int part) {
    return look_up_four(source.table, source.at + half * 512 + group * 64 + part * 16);
}
inline FourWeights weights_of(const FromPairs& source, int group, int half, int part) {
    return load_four(source.at + (group * 4 * kTile + half * 16 + part * 4) * 2, 2 * kTile);
}
inline FourWeights weights_of(const FromBytes& source, int group, int half, int part) {
    return load_four(source.at + (group * 4 * kTile + half * 16 + part * 4) * 2, 2 * kTile);
}

inline FourInputs load_inputs_shared(const bf16* at) {
    if constexpr (!kAtomicNumbers) return FourInputs(at);
    bf16 numbers[8];
    load_numbers(numbers, at, 8);
    return FourInputs(numbers);
}

// sums [row][half] += products of a group's four pairs of inputs. The bits are the same as with
// `dot` of whole vectors.
template <int Rows, class Source>
inline void add_group(const Source& source, int group, const bf16* x, size_t stride,
                      Floats (&sums)[Rows][2]) {
    FourInputs inputs[Rows];
    for (int r = 0; r < Rows; ++r) inputs[r] = load_inputs_shared(x + r * stride);
    for (int half = 0; half < 2; ++half) {
        for (int part = 0; part < kParts; ++part) {
            const FourWeights weights = weights_of(source, group, half, part);
            for (int r = 0; r < Rows; ++r)
                sums[r][half].v[part] = dot(sums[r][half].v[part], weights, inputs[r]);
        }
    }
}

}  // namespace veneer

#endif
