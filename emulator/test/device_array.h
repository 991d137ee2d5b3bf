// Device memory for tests of kernels, by the CUDA runtime alone: the same code natively and emulated.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "common/error.h"
#include "kernels/simt.h"

inline void expect_success(cudaError_t e) { CHECK_THAT(e == cudaSuccess, "CUDA: {}", cudaGetErrorString(e)); }

// n elements, all bits set at first: NaN in a floating-point array.
template <class T>
class DeviceArray {
  public:
    explicit DeviceArray(size_t n) : n_(n) {
        void* p = nullptr;
        expect_success(cudaMalloc(&p, n * sizeof(T)));
        expect_success(cudaMemsetAsync(p, 0xFF, n * sizeof(T), nullptr));
        p_ = static_cast<T*>(p);
    }
    explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
        expect_success(cudaMemcpyAsync(p_, values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice, nullptr));
        expect_success(cudaDeviceSynchronize());
    }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;
    ~DeviceArray() { cudaFree(p_); }
    T* data() { return p_; }
    size_t size() const { return n_; }
    // Waits for the kernels launched before.
    std::vector<T> host() const {
        std::vector<T> values(n_);
        expect_success(cudaMemcpyAsync(values.data(), p_, n_ * sizeof(T), cudaMemcpyDeviceToHost, nullptr));
        expect_success(cudaDeviceSynchronize());
        return values;
    }

  private:
    T* p_ = nullptr;
    size_t n_;
};

// Reproducible numbers that bf16 holds exactly: multiples of 1/64 in [-2, 2).
template <class T>
std::vector<T> small_numbers(size_t n, uint32_t seed) {
    std::vector<T> values(n);
    for (T& v : values) {
        seed = seed * 1664525u + 1013904223u;
        v = T(float(int(seed >> 24) - 128) / 64.0f);
    }
    return values;
}
