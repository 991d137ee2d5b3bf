// Shared by the emulator's own tests: launches without the CUDA runtime in between, and the kernels' errors against
// double references.
#pragma once
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/tensor_map.h"
#include "emulator/test/kernels.cuh"

namespace emulated {
// Sets the configuration for a test; the destructor restores the former one.
class WithConfig {
  public:
    explicit WithConfig(emulator::Order order = emulator::Order::Sequential, uint64_t seed = 1)
        : before_(emulator::config()) {
        emulator::config().order = order;
        emulator::config().seed = seed;
        emulator::config().fatal = false;
        emulator::take_reports();
    }
    ~WithConfig() {
        emulator::take_reports();
        emulator::config() = before_;
    }

  private:
    emulator::Config before_;
};

template <class... P, class... A>
void run(void (*kernel)(P...), dim3 grid, dim3 block, size_t n_shared_bytes, const A&... arguments) {
    emulator::launch_impl(
        grid, block, n_shared_bytes, [&] { kernel(arguments...); }, reinterpret_cast<const void*>(kernel));
}

// Device memory that the host reads directly between launches.
template <class T>
class Array {
  public:
    explicit Array(size_t n) : n_(n), p_(static_cast<T*>(emulator::dev_alloc(n * sizeof(T)))) {}
    explicit Array(const std::vector<T>& v) : Array(v.size()) { std::copy(v.begin(), v.end(), p_); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() { emulator::dev_free(p_); }
    T* data() { return p_; }
    std::vector<T> host() const { return {p_, p_ + n_}; }

  private:
    size_t n_;
    T* p_;
};

template <class T>
std::vector<T> normal(size_t n, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> distribution;
    std::vector<T> v(n);
    for (T& x : v) x = T(distribution(generator));
    return v;
}

// The numbers that a kernel gave, and those that it should give.
struct Result {
    std::vector<float> got;
    std::vector<double> want;
    double error() const {  // NaN counts as infinity
        double worst = 0;
        for (size_t i = 0; i < got.size(); i++) {
            const double e = std::abs(double(got[i]) - want[i]);
            if (!(e <= worst)) worst = std::isnan(e) ? INFINITY : e;
        }
        return worst;
    }
};
template <class T>
std::vector<float> floats(const Array<T>& a) {
    std::vector<float> v;
    for (T x : a.host()) v.push_back(float(x));
    return v;
}

inline Result vector_add(int n) {
    const auto a = normal<float>(size_t(n), 1), b = normal<float>(size_t(n), 2);
    Array<float> da(a), db(b), dc((size_t(n)));
    run(vector_add_kernel, unsigned(n + 127) / 128, 128, 0, da.data(), db.data(), dc.data(), n);
    Result r{floats(dc), {}};
    for (size_t i = 0; i < a.size(); i++) r.want.push_back(a[i] + b[i]);
    return r;
}

template <Defect DEFECT>
Result block_sum() {
    constexpr int kRows = 5, kN = 777;
    const auto in = normal<float>(kRows * kN, 3);
    Array<float> device(in), out(kRows);
    run(block_sum_kernel<DEFECT>, kRows, 256, 0, device.data(), out.data(), kN);
    Result r{floats(out), {}};
    for (int row = 0; row < kRows; row++) {
        double sum = 0;
        for (int i = 0; i < kN; i++) sum += in[size_t(row * kN + i)];
        r.want.push_back(sum);
    }
    return r;
}

inline Result layernorm() {
    constexpr size_t kRows = 5, kC = 768;
    const auto x = normal<bf16>(kRows * kC, 4);
    const auto w = normal<float>(kC, 5), b = normal<float>(kC, 6);
    Array<bf16> dx(x), dy(kRows * kC);
    Array<float> dw(w), db(b);
    run(layernorm_kernel, kRows, 96, 0, dx.data(), dw.data(), db.data(), dy.data(), int(kC));
    Result r{floats(dy), {}};
    for (size_t row = 0; row < kRows; row++) {
        double sum = 0, squares = 0;
        for (size_t i = 0; i < kC; i++) {
            const double v = float(x[row * kC + i]);
            sum += v, squares += v * v;
        }
        const double mean = sum / kC, rstd = 1 / std::sqrt(squares / kC - mean * mean + 1e-5);
        for (size_t i = 0; i < kC; i++) r.want.push_back((float(x[row * kC + i]) - mean) * rstd * w[i] + b[i]);
    }
    return r;
}

// (M, K) times (N, K)^T, or (K, N)
inline std::vector<double> product(const std::vector<bf16>& a, const std::vector<bf16>& b, size_t M, size_t N, size_t K,
                                   bool b_transposed) {
    std::vector<double> c(M * N);
    for (size_t m = 0; m < M; m++)
        for (size_t n = 0; n < N; n++)
            for (size_t k = 0; k < K; k++)
                c[m * N + n] += double(float(a[m * K + k])) * float(b_transposed ? b[n * K + k] : b[k * N + n]);
    return c;
}
template <Defect DEFECT>
Result gemm(int M, int N, int K) {
    const auto a = normal<bf16>(size_t(M * K), 7), b = normal<bf16>(size_t(N * K), 8);
    Array<bf16> da(a), db(b);
    Array<float> dc(size_t(M * N));
    run(gemm_kernel<DEFECT>, dim3(unsigned(N + 63) / 64, unsigned(M + 63) / 64), 128, 0, da.data(), db.data(),
        dc.data(), M, N, K);
    return {floats(dc), product(a, b, size_t(M), size_t(N), size_t(K), true)};
}

template <Defect DEFECT>
Result flash(int heads, int T) {
    constexpr size_t kHead = 64;
    const size_t n = size_t(heads * T) * kHead;
    const auto q = normal<bf16>(n, 9), k = normal<bf16>(n, 10), v = normal<bf16>(n, 11);
    Array<bf16> dq(q), dk(k), dv(v), out(n);
    run(flash_kernel<DEFECT>, dim3(unsigned(T + 63) / 64, unsigned(heads)), 128, 3 * 64 * kHead * sizeof(bf16),
        dq.data(), dk.data(), dv.data(), out.data(), T, 0.125f);
    Result r{floats(out), {}};
    for (size_t row = 0; row < size_t(heads * T); row++) {
        const size_t first = row / size_t(T) * size_t(T);  // of the head
        std::vector<double> p;
        for (size_t j = first; j <= row; j++) {
            double s = 0;
            for (size_t c = 0; c < kHead; c++) s += double(float(q[row * kHead + c])) * float(k[j * kHead + c]);
            p.push_back(s * 0.125);
        }
        const double peak = *std::max_element(p.begin(), p.end());
        double sum = 0;
        for (double& x : p) sum += x = std::exp(x - peak);
        for (size_t c = 0; c < kHead; c++) {
            double o = 0;
            for (size_t j = 0; j < p.size(); j++) o += p[j] * float(v[(first + j) * kHead + c]);
            r.want.push_back(o / sum);
        }
    }
    return r;
}

template <int TB, bool RS, bool ADD, Defect DEFECT>
Result hopper_gemm(uint64_t M, uint64_t N, uint64_t K) {
    const auto a = normal<bf16>(M * K, 12), b = normal<bf16>(N * K, 13);
    const auto before = normal<float>(M * N, 14);
    Array<bf16> da(a), db(b);
    Array<float> dc(before);
    const auto map_a = simt::make_tmap_2d(da.data(), 2, K, M, 64, 64, true);
    const auto map_b = TB ? simt::make_tmap_2d(db.data(), 2, N, K, 64, 64, true)
                          : simt::make_tmap_2d(db.data(), 2, K, N, 64, 128, true);
    const auto map_c = simt::make_tmap_2d(dc.data(), 4, N, M, 128, 64, false);
    run(hopper_gemm_kernel<TB, RS, ADD, DEFECT>, dim3(unsigned(N + 127) / 128, unsigned(M + 63) / 64), 160,
        2 * 24576 + 64 * 128 * sizeof(float), map_a, map_b, map_c, int(K));
    Result r{floats(dc), product(a, b, M, N, K, !TB)};
    if (ADD)
        for (size_t i = 0; i < before.size(); i++) r.want[i] += before[i];
    return r;
}
}  // namespace emulated
