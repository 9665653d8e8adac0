// Functions that all x86-64 instruction sets share.
#pragma once

#include <immintrin.h>
#include <x86intrin.h>

#include <cstdint>

namespace veneer {

// Prefetch into the L2 cache.
inline void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1); }
// Prefetch into the L1 cache.
inline void prefetch_near(const void* at) {
    _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0);
}

// A clock at the CPU's nominal frequency, the same on every core.
inline uint64_t cycles() { return __rdtsc(); }

// While an object lives, denormal operands count as zero, and denormal results become zero.
class FlushDenormals {
  public:
    FlushDenormals() : before_(_mm_getcsr()) {
        _mm_setcsr(before_ | 0x8040);
        asm volatile("" : : : "memory");  // no arithmetic moves before this
    }
    ~FlushDenormals() {
        asm volatile("" : : : "memory");
        _mm_setcsr(before_);
    }

  private:
    unsigned before_;
};

// For spin loops: lets the core's other hardware thread run.
inline void spin_pause() { _mm_pause(); }

}  // namespace veneer
