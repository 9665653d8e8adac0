// For CPUs without matrix registers: the kernels multiply with vectors.
#pragma once

namespace veneer::matrix {

constexpr char kName[] = "";
constexpr bool kPresent = false;
inline bool permit() { return true; }
inline void set_up(const Shape (&)[kRegisters]) {}
inline void give_up() {}

}  // namespace veneer::matrix
