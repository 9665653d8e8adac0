// Matrix registers: 16 rows of 64 bytes. One instruction multiplies a register of inputs by one of
// weights.
//
// A CPU may have none: then `kPresent` is false and only `permit` may be called.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kernels/bf16.h"

namespace veneer::matrix {

constexpr int kRegisters = 8;
constexpr int kRows = 16;

// What of a register is used; no rows: nothing.
struct Shape {
    int rows = 0, row_bytes = 64;
};

// Ask the operating system for the registers, for the whole process. False if it refuses.
bool permit();

// Set up the calling thread's registers, and give them up after their last use.
void configure(const Shape (&shapes)[kRegisters]);
void release();

// Of register R. `stride`: bytes from one row to the next.
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

// Registers for the length of a scope.
class Registers {
  public:
    explicit Registers(const Shape (&shapes)[kRegisters]) { configure(shapes); }
    ~Registers() { release(); }
    Registers(const Registers&) = delete;
    Registers& operator=(const Registers&) = delete;
};

}  // namespace veneer::matrix

// VENEER_MATRIX: there are registers.
#if defined(VENEER_SOFTWARE_MATRIX)
#define VENEER_MATRIX
#include "software_matrix.h"
#elif defined(__AMX_BF16__) && defined(__AMX_TILE__) && !defined(VENEER_NO_MATRIX)
#define VENEER_MATRIX
#include "amx.h"
#else
#include "no_matrix.h"
#endif
