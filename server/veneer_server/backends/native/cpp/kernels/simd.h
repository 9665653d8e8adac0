// Functions of vectors that every instruction set has alike; see isa/isa.h for the rest.
#pragma once

#include "../isa/isa.h"
#include "bf16.h"

namespace veneer {

// e^x within 2 units in the last place, for x in [-87, 88]; beyond them as at them, where floats
// run out. Of a NaN and a number, max and min give the second operand: a NaN stays one.
inline Floats exp(Floats x) {
    const Floats clamped = min(broadcast(88.0f), max(broadcast(-87.0f), x));
    const Floats n = round(mul(clamped, broadcast(1.44269504088896341f)));
    // x - n ln 2 in two parts, so that little is lost
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

// e^x, and 0 where it would be below e^-87.
inline Floats exp_or_zero(Floats x) { return keep_above(exp(x), x, broadcast(-87.0f)); }

}  // namespace veneer
