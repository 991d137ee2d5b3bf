// Broken on purpose and seen to fail: the last coefficient of exp left out; one row of a tile's tail skipped.
#include <climits>

#include "kernels/cpu/math.h"
#include "kernels/cpu/tile.h"
#include "test/cpu_check.h"

namespace {
double ulps(float got, double want) {
    int exponent;
    std::frexp(want, &exponent);
    return std::abs(double(got) - want) / std::ldexp(1.0, std::max(exponent, -125) - 24);
}
}  // namespace

TEST_CASE("fast_exp and fast_tanh: within the stated units in the last place") {
    double worst_exp = 0, worst_tanh = 0;
    for (uint64_t bits = 0; bits <= UINT_MAX; bits += 4099) {  // about a million floats of every size, both signs
        const float x = std::bit_cast<float>(uint32_t(bits));
        if (std::isnan(x)) {
            CHECK(std::isnan(cpu::fast_exp(x)));
            CHECK(std::isnan(cpu::fast_tanh(x)));
            continue;
        }
        if (x > -87.33f && x < 88.37f) worst_exp = std::max(worst_exp, ulps(cpu::fast_exp(x), std::exp(double(x))));
        if (x != 0) worst_tanh = std::max(worst_tanh, ulps(cpu::fast_tanh(x), std::tanh(double(x))));
    }
    CHECK(worst_exp <= 1.2);   // 0.86 seen with FMA, 1.14 without
    CHECK(worst_tanh <= 1.4);  // 1.33 seen
}

TEST_CASE("fast_exp and fast_tanh: ends of the range") {
    const float inf = std::numeric_limits<float>::infinity();
    CHECK(cpu::fast_exp(0.0f) == 1.0f);
    CHECK(cpu::fast_exp(-inf) == 0.0f);  // a masked score has no weight at all
    CHECK(cpu::fast_exp(-88.1f) == 0.0f);
    CHECK(cpu::fast_exp(-1e30f) == 0.0f);
    CHECK(cpu::fast_exp(89.0f) == inf);
    CHECK(cpu::fast_exp(inf) == inf);
    CHECK(cpu::fast_tanh(inf) == 1.0f);
    CHECK(cpu::fast_tanh(-inf) == -1.0f);
    CHECK(cpu::fast_tanh(0.0f) == 0.0f);
}

TEST_CASE("largest: any length, the maximum anywhere") {
    for (size_t n : {1, 31, 32, 33, 65, 100}) {
        for (size_t at = 0; at < n; at++) {
            std::vector<float> x(n, -3.0f);
            x[at] = 7;
            CHECK(cpu::largest(x.data(), n, -1.0f) == 7);
            CHECK(cpu::largest(x.data(), n, 9.0f) == 9);
        }
    }
}

TEST_CASE_TEMPLATE("tile product: every tail of rows, either layout of a", T, float, double) {
    constexpr int kLanes = cpu::kLanes<T>;
    for (int M = 1; M <= 19; M++)
        for (int N : {kLanes, 2 * kLanes, 3 * kLanes})
            for (int K : {1, 5, 64}) {
                CAPTURE(M);
                CAPTURE(N);
                CAPTURE(K);
                const Doubles a = integers(size_t(M) * K, 1, 9), b = integers(size_t(K) * N, 2, 9);  // exact in T
                std::vector<T> A(a.begin(), a.end()), At(a.size()), Bm(b.begin(), b.end()), C(size_t(M) * N, T(3));
                for (int m = 0; m < M; m++)
                    for (int k = 0; k < K; k++) At[k * M + m] = A[m * K + k];
                std::vector<T> want(C.size());
                for (int m = 0; m < M; m++)
                    for (int k = 0; k < K; k++)
                        for (int n = 0; n < N; n++) want[m * N + n] += A[m * K + k] * Bm[k * N + n];
                cpu::tile_matmul(C.data(), N, {A.data(), size_t(K), 1}, Bm.data(), N, {M, N, K}, false);
                CHECK(C == want);
                cpu::tile_matmul(C.data(), N, {At.data(), 1, size_t(M)}, Bm.data(), N, {M, N, K}, true);
                for (T& w : want) w *= 2;
                CHECK(C == want);
            }
}
