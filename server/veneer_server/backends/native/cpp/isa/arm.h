// Functions that all ARM instruction sets share.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace veneer {

// Prefetch into the L2 cache.
inline void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }
// Prefetch into the L1 cache.
inline void prefetch_near(const void* at) { __builtin_prefetch(at, 0, 3); }

// A clock of about 2.5 GHz, the same on every core. The CPU's own counter runs at 24 MHz to 1 GHz,
// so it is multiplied by `ticks_per_count`.
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

// For spin loops. Takes about ten nanoseconds on every core; `yield` takes no time on most.
inline void spin_pause() { asm volatile("isb" : : : "memory"); }

}  // namespace veneer
