// No matrix registers: the kernels multiply with vectors.
#pragma once

namespace veneer::matrix {

constexpr char kName[] = "";
constexpr bool kPresent = false;
inline bool permit() { return true; }

}  // namespace veneer::matrix
