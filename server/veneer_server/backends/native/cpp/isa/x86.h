// What all x86-64 instruction sets share.
#pragma once

#include <immintrin.h>
#include <x86intrin.h>

#include <cstdint>

namespace veneer {

// Into the second cache.
inline void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1); }
// Into the first cache.
inline void prefetch_near(const void* at) {
    _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0);
}

// A clock at the CPU's nominal frequency, the same on every core.
inline uint64_t cycles() { return __rdtsc(); }

// For the length of a scope denormals count as zero, and results become zero rather than denormal.
class FlushDenormals {
  public:
    FlushDenormals() : before_(_mm_getcsr()) {
        _mm_setcsr(before_ | 0x8040);
        asm volatile("" : : : "memory");  // no arithmetic moves before
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
