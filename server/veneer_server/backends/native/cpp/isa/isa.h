// Includes the header of the instruction set that this library is compiled for. Code outside this
// folder names no instruction set. Each set's header defines the same names, and the kernels use
// nothing else of it:
//
//     kInstructions           the set's name (`InstructionSet.name` of forms.py)
//     kLanes                  lanes of a vector
//     Floats, Pairs           vectors of floats, and of pairs of bfloat16
//     Codes, Table            4-bit codes, and the bfloat16 that each stands for
//     Int8s, Int32s, Int8Table
//                             bytes and their sums, for kernels/gemm/by_int8.h
//     tiles                   tile sizes that the registers allow
//     prefetch, prefetch_near, cycles, spin_pause
//                             prefetches into L2 and L1, a clock, the pause of a spin loop
//
// A set whose vectors take several registers may define VENEER_BY_REGISTERS, along with the
// functions that kernels/gemm/by_registers.h uses.
//
// matrix.h adds the matrix registers, which only some CPUs have. The vector set of such CPUs also
// defines the functions that kernels/gemm/by_numbers.h and kernels/attention/few_queries.h use.
//
// The GEMM's inner product multiplies pairs of bfloat16 and adds both to a float:
//     sum[lane] += w[lane].first * x.first + w[lane].second * x.second
// A set that has no instruction for it, and enough registers, may define VENEER_BY_NUMBERS, along
// with the functions that kernels/gemm/by_numbers.h uses.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "avx2.h"
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include "neon.h"
#else
#error "the native backend needs AVX512, AVX2 with FMA, or NEON of 64-bit ARM"
#endif

#include "matrix.h"
#include "symbols.h"
