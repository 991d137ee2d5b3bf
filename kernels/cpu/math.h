// exp and tanh that gcc vectorises inside `#pragma omp simd`: no branch, no table, no call.
//
//   exp(x)    n = round(x / ln 2), r = x - n ln 2 in two pieces, |r| <= 0.347;
//             1 + r + r^2 P5(r) by Horner, times 2^n by exponent bits
//   tanh(x)   |x| < 0.625: x + x^3 P4(x^2);  else sign(x) (1 - 2 / (exp(2|x|) + 1))
//
//   error     float against the exact value: exp <= 1.2 ulp, tanh <= 1.4 ulp, with or without FMA (test_math.cpp)
//   limits    exp is inf above 88.376 (the true limit is 88.72) and 0 below -87.68 (where floats are subnormal);
//             NaN stays NaN; double goes to std::
#pragma once
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace cpu {
inline double fast_exp(double x) { return std::exp(x); }
inline double fast_tanh(double x) { return std::tanh(x); }

inline float fast_exp(float x) {
    constexpr float kMax = 88.9f, kMin = -88.1f;    // n = 128, n = -127: exponent bits of inf and of 0
    constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23 and the exponent bias: the low bits become n + 127
    float c = x < kMin ? kMin : x;                  // NaN compares false and stays
    c = c > kMax ? kMax : c;
    const float biased = c * 1.44269504f + kRound;
    const float n = biased - kRound;
    const float r = (c - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 = 0.693359375 - 0.000212...
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * std::bit_cast<float>(std::bit_cast<uint32_t>(biased) << 23);  // p * 2^n
}

inline float fast_tanh(float x) {
    const float a = std::fabs(x), z = x * x;
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z + -5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z + -3.33332819422e-1f;
    const float near = x + x * z * p;
    const float far = std::copysign(1.0f - 2.0f / (fast_exp(a + a) + 1.0f), x);
    return a < 0.625f ? near : far;
}

// The largest of m and x[0..n); exact, so its order does not matter.  A NaN may be passed over.
template <class T>
T largest(const T* x, size_t n, T m) {
    constexpr size_t kLanes = 128 / sizeof(T);  // gcc vectorises a maximum over lanes, not one over a range
    T lane[kLanes];
    for (T& l : lane) l = m;
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (size_t l = 0; l < kLanes; l++) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
    for (; i < n; i++) lane[0] = x[i] > lane[0] ? x[i] : lane[0];
    for (T l : lane) m = l > m ? l : m;
    return m;
}
}  // namespace cpu
