// Shared by the tests of the ops: error bounds from first principles, and equality of bits across thread counts.
//
// A sum of n terms in float is off by at most n * kUnit * sum |terms|, in whatever order it is taken; so a loop in
// a test returns, beside each value, the sum of the absolute values of its terms.
#pragma once
#include <omp.h>

#include <cstring>

#include "test/op_test.h"

constexpr double kUnit = 0x1p-24;  // half the spacing of floats at 1: relative error of one rounding

inline double biggest(const Doubles& v) {
    double m = 0;
    for (double x : v) m = std::max(m, std::abs(x));
    return m;
}
// max |got - want| / tolerance, element by element: at most 1 passes.  NaN or another size is infinity.
inline double worst_each(const Doubles& got, const Doubles& want, const Doubles& tolerance) {
    if (got.size() != want.size() || got.size() != tolerance.size()) return std::numeric_limits<double>::infinity();
    double w = 0;
    for (size_t i = 0; i < got.size(); i++) {
        const double e = std::abs(got[i] - want[i]);
        if (!(e <= w * tolerance[i])) w = std::isfinite(e) && tolerance[i] > 0 ? e / tolerance[i] : HUGE_VAL;
    }
    return w;
}
inline Doubles operator*(double a, Doubles v) {
    for (double& x : v) x *= a;
    return v;
}
inline Doubles join(std::initializer_list<Doubles> parts) {
    Doubles all;
    for (const Doubles& p : parts) all.insert(all.end(), p.begin(), p.end());
    return all;
}
inline bool same_bits(const Doubles& a, const Doubles& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}
// f() gives an op's outputs; they must not depend on the number of threads.
template <class F>
void check_thread_counts(F&& f) {
    const int before = omp_get_max_threads();
    omp_set_num_threads(1);
    const Doubles one = f();
    for (int n = 2; n <= 4; n++) {
        CAPTURE(n);
        omp_set_num_threads(n);
        CHECK(same_bits(one, f()));
    }
    omp_set_num_threads(before);
}
