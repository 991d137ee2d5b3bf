// Shared by every op test: targets, exact-size device tensors, the comparison, finite differences.
//
// A test writes its inputs once as doubles rounded to the target's dtype, runs the op on the target and on the double
// instance of the CPU backend, and compares: worst = max |got - want| / (atol + rtol |want|), a NaN counts as infinity.
#pragma once
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/owners.h"

using Doubles = std::vector<double>;

struct Target {  // a backend and the dtype of its `real` tensors
    const Backend* k;
    DType real;
    std::string name;
    DType stat() const { return real == DType::f64 ? DType::f64 : DType::f32; }
};
inline Target reference() { return {&cpu_backend(), DType::f64, "cpu f64"}; }
// This program checks kernels for races (test/main.cpp), and watches kernels only.
bool checks_races();
inline std::vector<Target> targets() {
    std::vector<Target> all = {{&cuda_backend(), DType::f32, "cuda f32"}, {&cuda_backend(), DType::bf16, "cuda bf16"}};
    if (!checks_races()) all.insert(all.begin(), {&cpu_backend(), DType::f32, "cpu f32"});
    return all;
}

// Memory that a stream takes for its ops.
inline size_t workspace_bytes(const Backend& k) {
    const size_t n_free = k.memory_state().n_free;
    const StreamOwner stream(k);
    k.take_workspace(stream.get());
    return n_free - k.memory_state().n_free;
}

inline double rounded(double v, DType t) {
    switch (t) {
        case DType::f32:
            return float(v);
        case DType::bf16:
            return float(bf16(float(v)));
        default:
            return v;
    }
}
inline Doubles rounded(Doubles v, DType t) {
    for (double& x : v) x = rounded(x, t);
    return v;
}

// Reproducible normal numbers.
inline Doubles normal(size_t n, unsigned seed, double scale = 1) {
    std::mt19937_64 gen(seed);
    std::normal_distribution<double> dist(0, scale);
    Doubles v(n);
    for (double& x : v) x = dist(gen);
    return v;
}
inline Doubles integers(size_t n, unsigned seed, int below) {
    std::mt19937_64 gen(seed);
    Doubles v(n);
    for (double& x : v) x = double(gen() % unsigned(below));
    return v;
}
// Fills every output before an op runs, so that an element that the op does not write shows.
inline Doubles poison(size_t n) { return Doubles(n, std::numeric_limits<double>::quiet_NaN()); }

// A tensor in a backend's memory, of exactly its own size, so that one element out of bounds is seen by ASan.
class Dev {
  public:
    Dev(const Target& t, DType dtype, const Doubles& values) : k_(t.k), buf_(nullptr, values.size(), dtype) {
        buf_.data = k_->memory.alloc(buf_.n_bytes());
        std::vector<char> raw(buf_.n_bytes());
        for (size_t i = 0; i < values.size(); i++) store(raw.data(), i, values[i]);
        k_->upload(buf_.data, raw.data(), raw.size(), nullptr);
        k_->synchronize(nullptr);
    }
    Dev(const Dev&) = delete;
    Dev& operator=(const Dev&) = delete;
    ~Dev() { k_->memory.free(buf_.data); }
    operator Buf() const { return buf_; }
    Doubles host() const {
        std::vector<char> raw(buf_.n_bytes());
        k_->download(raw.data(), buf_.data, raw.size(), nullptr);
        k_->synchronize(nullptr);
        Doubles v(buf_.count);
        for (size_t i = 0; i < v.size(); i++) v[i] = load(raw.data(), i);
        return v;
    }

  private:
    void store(void* raw, size_t i, double v) const {
        switch (buf_.dtype) {
            case DType::f32:
                static_cast<float*>(raw)[i] = float(v);
                break;
            case DType::f64:
                static_cast<double*>(raw)[i] = v;
                break;
            case DType::bf16:
                static_cast<bf16*>(raw)[i] = bf16(float(v));
                break;
            case DType::i32:
                static_cast<int32_t*>(raw)[i] = int32_t(v);
                break;
            case DType::u32:
                static_cast<uint32_t*>(raw)[i] = uint32_t(v);
                break;
            case DType::u8:
                static_cast<uint8_t*>(raw)[i] = uint8_t(v);
                break;
        }
    }
    double load(const void* raw, size_t i) const {
        switch (buf_.dtype) {
            case DType::f32:
                return static_cast<const float*>(raw)[i];
            case DType::f64:
                return static_cast<const double*>(raw)[i];
            case DType::bf16:
                return float(static_cast<const bf16*>(raw)[i]);
            case DType::i32:
                return static_cast<const int32_t*>(raw)[i];
            case DType::u32:
                return static_cast<const uint32_t*>(raw)[i];
            case DType::u8:
                return static_cast<const uint8_t*>(raw)[i];
        }
        return 0;
    }
    const Backend* k_;
    Buf buf_;
};

// max |got - want| / (atol + rtol |want|): at most 1 passes.  NaN in got, or a size mismatch, is infinity.
inline double worst(const Doubles& got, const Doubles& want, double atol, double rtol) {
    if (got.size() != want.size()) return std::numeric_limits<double>::infinity();
    double w = 0;
    for (size_t i = 0; i < got.size(); i++) {
        const double e = std::abs(got[i] - want[i]) / (atol + rtol * std::abs(want[i]));
        if (!(e <= w)) w = std::isnan(e) ? std::numeric_limits<double>::infinity() : e;
    }
    return w;
}

inline double dot(const Doubles& a, const Doubles& b) {
    double s = 0;
    for (size_t i = 0; i < a.size(); i++) s += a[i] * b[i];
    return s;
}

// Derivative of J along u at x by central difference in double: error about 1e-10 for h = 1e-5.
template <class J>
double directional(const J& j, const Doubles& x, const Doubles& u, double h = 1e-5) {
    Doubles plus = x, minus = x;
    for (size_t i = 0; i < x.size(); i++) plus[i] += h * u[i], minus[i] -= h * u[i];
    return (j(plus) - j(minus)) / (2 * h);
}
