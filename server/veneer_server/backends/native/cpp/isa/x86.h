// What all x86-64 instruction sets share.
#pragma once

#include <immintrin.h>
#include <x86intrin.h>

#include <cstdint>

namespace veneer {

inline void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1); }

// A clock at the CPU's nominal frequency, the same on every core.
inline uint64_t cycles() { return __rdtsc(); }

// For spin loops: lets the core's other hardware thread run.
inline void spin_pause() { _mm_pause(); }

}  // namespace veneer
