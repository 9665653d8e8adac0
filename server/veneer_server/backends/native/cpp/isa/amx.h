// Intel's matrix registers: AMX with bfloat16 and bytes.
//
// The registers are named in assembly, not by intrinsics: those take literal numbers only, and
// some compilers do not know that they read memory.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

namespace veneer::matrix {

constexpr char kName[] = "amx-bf16";
constexpr bool kPresent = true;

// Ask Linux to let this process use the registers. False if it refuses.
inline bool permit() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The layout that LDTILECFG expects.
struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(Configuration) == 64);

inline void configure(const Shape (&shapes)[kRegisters]) {
    Configuration all;
    for (int i = 0; i < kRegisters; ++i) {
        // A register without rows cannot be configured; it is not used.
        all.rows[i] = uint8_t(shapes[i].rows);
        all.row_bytes[i] = uint16_t(shapes[i].rows > 0 ? shapes[i].row_bytes : 0);
    }
    asm volatile("ldtilecfg %0" : : "m"(all) : "memory");
}
inline void release() { asm volatile("tilerelease" : : : "memory"); }

template <int R>
inline void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(R) : "memory");
}
template <int R>
inline void load(const void* at, size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(at), "r"(stride), "i"(R) : "memory");
}
template <int R>
inline void store(void* at, size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(at), "r"(stride), "i"(R) : "memory");
}
template <int Sums, int A, int B>
inline void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(A), "i"(B) : "memory");
}
template <int Sums, int A, int B>
inline void dot_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(A), "i"(B) : "memory");
}

}  // namespace veneer::matrix
