// The norm of the gradient and the factor that clips it; both stay on the device.
//
//   norm = sqrt(sum grad^2)
//   clip = max_norm > 0 and norm > max_norm ? max_norm / norm : 1;  NaN where norm is not finite
//
//   shapes     grad (n)    scratch (ceil(n/65536)): one sum per chunk    norm, clip (1)
//   traffic    1 read per element.   bound: memory
//   limits     any n >= 1; a norm from 2^64 on counts as infinite, because a chunk's sum of squares is kept in fp32
//   order      a chunk is one block: thread t takes elements 4t .. 4t+3, then those 1024 further on, ...; four squares
//              are added in fp32 by pairs, these sums in double, then a fixed tree over the block; the chunks likewise
//              by one block.  One number in four is double: with 1/64 of fp32's rate a GPU stays bound by memory
//   error      four squares and two sums of non-negative numbers: 3 * 2^-24 of the sum, so 1.5 * 2^-24 of the norm, and
//              as much again for the roundings of a chunk's sum and of the root: 3 * 2^-24 in all
#include "kernels/cuda/launch.h"
#include "kernels/elementwise.cuh"

#include <cmath>

namespace {
using device::kElementThreads;

__device__ __forceinline__ double block_sum_to_one(double sum) {  // thread 0 gets the sum
    SIMT_SHARED(double, part, [kElementThreads / 32]);
    return device::block_sum(sum, part);
}

__device__ __forceinline__ double four_squares(const float (&g)[4]) {
    return double((g[0] * g[0] + g[1] * g[1]) + (g[2] * g[2] + g[3] * g[3]));
}

__global__ void grad_norm_chunk_kernel(float* partial,     // (ceil(n/65536))
                                       const float* grad,  // (n)
                                       size_t n, bool vectors) {
    constexpr size_t kStep = 4 * kElementThreads, kAhead = 8;  // loads in flight per thread
    static_assert(kGradNormChunk % (kAhead * kStep) == 0);
    const size_t begin = blockIdx.x * kGradNormChunk, end = n - begin < kGradNormChunk ? n : begin + kGradNormChunk;
    double sum = 0;
    size_t i = begin + 4 * threadIdx.x;
    if (vectors && end - begin == kGradNormChunk) {  // the same sums in the same order, only earlier loads
        SIMT_NO_UNROLL
        for (; i < end; i += kAhead * kStep) {
            float g[kAhead][4];
            SIMT_UNROLL
            for (size_t k = 0; k < kAhead; k++) device::load(g[k], grad + i + k * kStep);
            SIMT_UNROLL
            for (size_t k = 0; k < kAhead; k++) sum += four_squares(g[k]);
        }
    } else {
        SIMT_NO_UNROLL
        for (; i < end; i += kStep) {
            float g[4];
            device::load_some(g, grad + i, end - i < 4 ? int(end - i) : 4, vectors);
            sum += four_squares(g);
        }
    }
    sum = block_sum_to_one(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = float(sum);
}

__global__ void grad_norm_kernel(float* norm,           // (1)
                                 float* clip,           // (1)
                                 const float* partial,  // (chunks)
                                 size_t chunks, float max_norm) {
    double sum = 0;
    for (size_t i = threadIdx.x; i < chunks; i += kElementThreads) sum += double(partial[i]);
    sum = block_sum_to_one(sum);
    if (threadIdx.x != 0) return;
    const float value = float(sqrt(sum));
    norm[0] = value;
    clip[0] = !std::isfinite(value) ? NAN : max_norm > 0 && value > max_norm ? max_norm / value : 1.0f;
}
}  // namespace

namespace cuda {
void grad_norm(const GradNorm& a, Stream s) {
    const size_t n = a.grad.count, chunks = a.scratch.count;
    float* partial = a.scratch.as<float>();  // (chunks)
    const dim3 threads(device::kElementThreads);
    if (a.grad && chunks > 0) {
        const float* grad = a.grad.as<float>();  // (n)
        cuda::launch(grad_norm_chunk_kernel, dim3(unsigned(chunks)), threads, 0, s, partial, grad, n,
                     device::aligned16(grad));
    }
    if (a.norm)
        cuda::launch(grad_norm_kernel, dim3(1), threads, 0, s, a.norm.as<float>(), a.clip.as<float>(), partial, chunks,
                     a.max_norm);
}
}  // namespace cuda
