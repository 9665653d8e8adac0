// What all ARM instruction sets share.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace veneer {

// Into the second cache.
inline void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }
// Into the first cache.
inline void prefetch_near(const void* at) { __builtin_prefetch(at, 0, 3); }

// A clock of about 2.5 GHz, the same on every core. The CPU's own counter ticks at 24 MHz to 1 GHz:
// each tick counts for as many as that takes.
inline uint64_t ticks_per_count() noexcept {
    uint64_t frequency;
    asm("mrs %0, cntfrq_el0" : "=r"(frequency));
    constexpr uint64_t nominal = 2'500'000'000;
    return frequency > 0 && frequency < nominal ? nominal / frequency : 1;
}
inline const uint64_t kTicksPerCount = ticks_per_count();
inline uint64_t cycles() {
    uint64_t count;
    asm volatile("mrs %0, cntvct_el0" : "=r"(count));
    return count * kTicksPerCount;
}

// For spin loops. Takes some ten nanoseconds on every core; `yield` takes none on most.
inline void spin_pause() { asm volatile("isb" : : : "memory"); }

}  // namespace veneer
