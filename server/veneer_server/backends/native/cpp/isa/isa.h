// The instruction set that this library is compiled for. This folder is the only place that names
// one. Each header of a set has the same names, which is all that the kernels use:
//
//     kInstructions           what the library calls itself (`Form.name` of forms.py)
//     kLanes                  numbers that a vector holds
//     Floats, Pairs           vectors of floats, and of pairs of bfloat16
//     Codes, Table            4-bit codes, and the bfloat16 that they stand for
//     tiles                   how many sums the registers hold (below)
//     prefetch, cycles, spin_pause
//                             memory ahead of its use, a clock, a moment in a loop that waits
//
// The GEMM's inner product multiplies pairs of bfloat16 and adds both to a float:
//     sum[lane] += w[lane].first * x.first + w[lane].second * x.second
#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "avx2.h"
#else
#error "the native backend needs AVX512-BF16, or AVX2 with FMA"
#endif
