// Asks whether this binary holds code for the open device, and how fast that device's clock runs.
#include "kernels/cuda/launch.h"
#include "kernels/ptx.cuh"

namespace {
__global__ void probe_kernel() {}

__global__ void clock_kernel(uint64_t* passed) {  // (2) cycles, nanoseconds
    const uint64_t begin = ptx::global_ns(), first = ptx::sm_cycles();
    uint64_t ns = 0;
    while (ns < 500'000) ns = ptx::global_ns() - begin;  // its resolution is up to 1 us
    passed[0] = ptx::sm_cycles() - first;
    passed[1] = ns;
}
}  // namespace

namespace cuda {
cudaError_t find_code() {
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel));
}

double clock_hz(Stream s) {
    uint64_t passed[2] = {};  // cycles, nanoseconds
    uint64_t* const on_device = workspace<uint64_t>(s, 2, "clock_hz");
    launch(clock_kernel, dim3(1), dim3(1), 0, s, on_device);
    CUDA_CHECK(cudaMemcpyAsync(passed, on_device, sizeof passed, cudaMemcpyDeviceToHost, s));
    CUDA_CHECK(cudaStreamSynchronize(s));
    return 1e9 * double(passed[0]) / double(passed[1]);
}
}  // namespace cuda
