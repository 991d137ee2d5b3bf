// GELU and its derivative for one number; both vectorise inside `#pragma omp simd`.
//
//   gelu(x)    0.5 x (1 + tanh u) = x s        u = sqrt(2/pi) (x + 0.044715 x^3),  s = 1 / (1 + exp(-2u))
//   gelu'(x)   s + x 2 s (1-s) u'              u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2),  1-s = exp(-2u) s
//
// The logistic form has no cancellation on the negative side, where 1 + tanh u loses all digits.
// Beyond |x| = 30 the result is 0 or x to the last bit of a double, so u is computed from x clamped to that range, and
// exp from an argument of at most 80: no infinity arises that could make a NaN.  NaN stays NaN.
#pragma once
#include "kernels/cpu/math.h"

namespace cpu {
template <class T>
struct GeluParts {
    T x;     // within +-30
    T s, r;  // s, and 1 - s without cancellation
};
template <class T>
inline GeluParts<T> gelu_parts(T x) {
    constexpr T k2 = T(2 * 0.79788456080286535588), kCube = T(0.044715), kMax = 30, kMaxExp = 80;
    T z = x > kMax ? kMax : x;
    z = z < -kMax ? -kMax : z;
    const T u = -k2 * (z + kCube * z * z * z);  // -2u
    const T e = fast_exp(u > kMaxExp ? kMaxExp : u);
    const T s = T(1) / (T(1) + e);
    return {z, s, e * s};
}

template <class T>
inline T gelu(T x) {
    return x * gelu_parts(x).s;
}

template <class T>
inline T gelu_grad(T x) {
    constexpr T k2 = T(2 * 0.79788456080286535588), kCube = T(0.044715);
    const GeluParts<T> g = gelu_parts(x);
    return g.s + g.x * g.s * g.r * k2 * (T(1) + T(3) * kCube * g.x * g.x);
}
}  // namespace cpu
