// What all sets of instructions for x86-64 share.
#pragma once

#include <immintrin.h>
#include <x86intrin.h>

#include <cstdint>

namespace veneer {

inline void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1); }

// A clock that counts up at the CPU's nominal frequency, whatever core reads it.
inline uint64_t cycles() { return __rdtsc(); }

// In a loop that waits for another thread: lets the core's other thread run.
inline void spin_pause() { _mm_pause(); }

}  // namespace veneer
