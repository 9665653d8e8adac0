// Vector functions that are the same for every instruction set; see isa/isa.h for the others.
#pragma once

#include "../isa/isa.h"
#include "bf16.h"

namespace veneer {

// e^x to within 2 units in the last place. x is clamped to [-87, 88], beyond which floats overflow
// or underflow. NaN stays NaN: max and min return the second operand if one is NaN.
inline Floats exp(Floats x) {
    const Floats clamped = min(broadcast(88.0f), max(broadcast(-87.0f), x));
    const Floats n = round(mul(clamped, broadcast(1.44269504088896341f)));
    // x - n ln 2, with ln 2 in two parts, which loses little precision
    Floats r = fma(n, broadcast(-0.693359375f), clamped);
    r = fma(n, broadcast(2.12194440e-4f), r);
    Floats p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, broadcast(1.0f)));
    return scale_by_power(p, n);
}

// e^x, or 0 for x below -87.
inline Floats exp_or_zero(Floats x) { return keep_above(exp(x), x, broadcast(-87.0f)); }

}  // namespace veneer
