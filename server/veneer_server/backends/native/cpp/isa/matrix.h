// Matrix registers: 16 rows of 64 bytes. One instruction multiplies a register of inputs by one of
// weights.
//
// If the CPU has none, `kPresent` is false, and `permit`, `set_up` and `give_up` do nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../kernels/bf16.h"

namespace veneer::matrix {

constexpr int kRegisters = 8;
constexpr int kRows = 16;

// The part of a register that is used; nothing if it has no rows.
struct Shape {
    int rows = 0, row_bytes = 64;
};

// Ask the operating system for the registers, for the whole process. False if it refuses.
bool permit();

// Set up the calling thread's registers, which takes as long as ten multiplies; and release them.
void configure(const Shape (&shapes)[kRegisters]);
void release();

// Zero, load and store register R. `stride`: bytes from one row to the next.
template <int R>
void zero();
template <int R>
void load(const void* from, size_t stride);
template <int R>
void store(void* to, size_t stride);

// Sums [rows][16] floats += A [rows][32] bf16 x B [16][16][2] bf16: B's rows are pairs of inputs,
// each for 16 outputs. A row of sums depends on its own row of A and on B alone, not on the number
// of rows.
template <int Sums, int A, int B>
void dot();

// Sums [rows][16] int32 += A [rows][64] int8 x B [16][16][4] int8: B's rows are fours of inputs,
// each for 16 outputs.
template <int Sums, int A, int B>
void dot_int8();

}  // namespace veneer::matrix

// VENEER_MATRIX is defined if there are matrix registers.
#if defined(VENEER_SOFTWARE_MATRIX)
#define VENEER_MATRIX
#include "software_matrix.h"
#elif defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AMX_TILE__) && \
    !defined(VENEER_NO_MATRIX)
#define VENEER_MATRIX
#include "amx.h"
#else
#include "no_matrix.h"
#endif

#ifdef VENEER_MATRIX
namespace veneer::matrix {

// How the calling thread's registers are set up; without rows if they are not set up.
inline thread_local Shape present[kRegisters];

// Set up the registers unless they already have these shapes. They keep them until `give_up`.
inline void set_up(const Shape (&shapes)[kRegisters]) {
    if (std::memcmp(present, shapes, sizeof present) == 0) return;
    configure(shapes);
    std::memcpy(present, shapes, sizeof present);
}

// Give up the registers, if they are set up: other code may use them too, and the operating system
// would save them whenever another thread gets the CPU.
inline void give_up() {
    if (present[0].rows == 0) return;
    release();
    for (Shape& shape : present) shape = {};
}

}  // namespace veneer::matrix
#endif
