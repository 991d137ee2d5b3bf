// Shared by the tests of the emulated CUDA runtime and of the CUDA backend on it: a machine that a test sets up, its
// memory and streams, and kernels that work or fail.
#pragma once
#include <doctest/doctest.h>

#include "cuda_emulator_host.h"
#include "kernels/simt.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#endif

__global__ inline void add_kernel(int* p, int value) { p[threadIdx.x] += value; }
__global__ inline void twice_kernel(int* p) { p[threadIdx.x] *= 2; }
template <class T>
__global__ void broken_kernel(T* p) {  // not all of the warp's lanes come to the shuffle
    if (threadIdx.x < 16) p[threadIdx.x] = __shfl_sync(0xffffffffu, p[threadIdx.x], 0);
}

namespace emulated {
// A failed kernel's threads are abandoned where they stand, with the memory that they own: no leak to report.
#ifdef __SANITIZE_ADDRESS__
using MayLeak = __lsan::ScopedDisabler;
#else
struct MayLeak {
    MayLeak() {}
};
#endif

// Sets the stream mode for a test; the destructor clears all errors and restores the former machine.
class OnMachine {
  public:
    explicit OnMachine(emulator::StreamMode mode) : before_(emulator::machine()) { emulator::machine().mode = mode; }
    ~OnMachine() {
        emulator::reset_device();
        emulator::take_reports();
        emulator::machine() = before_;
    }

  private:
    emulator::Machine before_;
};
class DeviceInts {  // (n) i32, unknown at first
  public:
    explicit DeviceInts(size_t n) { REQUIRE(cudaMalloc(&p_, n * sizeof(int)) == cudaSuccess); }
    DeviceInts(const DeviceInts&) = delete;
    ~DeviceInts() { cudaFree(p_); }
    operator int*() const { return p_; }

  private:
    int* p_ = nullptr;
};
struct TestStream {
    cudaStream_t s = nullptr;
    explicit TestStream(unsigned flags = cudaStreamNonBlocking) {
        REQUIRE(cudaStreamCreateWithFlags(&s, flags) == cudaSuccess);
    }
    TestStream(const TestStream&) = delete;
    ~TestStream() { cudaStreamDestroy(s); }
    operator cudaStream_t() const { return s; }
};

inline int value_of(const int* p) {  // at once, without waiting for other streams
    int v = -1;
    TestStream s;
    REQUIRE(cudaMemcpyAsync(&v, p, sizeof v, cudaMemcpyDeviceToHost, s) == cudaSuccess);
    return v;
}
}  // namespace emulated
