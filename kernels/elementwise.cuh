// For kernels that treat every element by itself: a thread owns N consecutive ones and moves them by accesses of 16
// bytes (8 for four bf16) where the tensors allow it, one by one at a tail or where a tensor is a slice that starts off
// the boundary.  Which elements a thread owns does not depend on the alignment, so neither do the bits of a result.
#pragma once
#include "kernels/device.cuh"

namespace device {
constexpr unsigned kElementThreads = 256;  // of a block

// Whether vectors may be used: every tensor that is there (null: absent) starts on a 16-byte boundary.
template <class... T>
bool aligned16(const T*... tensors) {
    return ((reinterpret_cast<uintptr_t>(tensors) % 16 == 0) && ...);
}

// Blocks for n elements, N to a thread.
template <int N>
constexpr unsigned element_blocks(size_t n) {
    return unsigned((n + size_t(N) * kElementThreads - 1) / (size_t(N) * kElementThreads));
}

// The calling thread's share of n elements: `count` (0 to N) of them from `first` on.
struct Share {
    size_t first;
    int count;
};
template <int N>
__device__ __forceinline__ Share share_of(size_t n) {
    const size_t first = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    return {first, first >= n ? 0 : n - first < size_t(N) ? int(n - first) : N};
}

// The first `count` of N numbers at p, as floats; the others are 0.
template <int N, class T>
__device__ __forceinline__ void load_some(float (&out)[N], const T* p, int count, bool vectors) {
    constexpr int W = N < kVec<T> ? N : kVec<T>;  // elements of one access
    if (vectors && count == N) {
        SIMT_UNROLL
        for (int i = 0; i < N; i += W) {
            float part[W];
            load<W>(part, p + i);
            SIMT_UNROLL
            for (int k = 0; k < W; k++) out[i + k] = part[k];
        }
    } else {
        SIMT_UNROLL
        for (int i = 0; i < N; i++) out[i] = i < count ? float(p[i]) : 0.0f;
    }
}
template <int N, class T>
__device__ __forceinline__ void store_some(T* p, const float (&in)[N], int count, bool vectors) {
    constexpr int W = N < kVec<T> ? N : kVec<T>;
    if (vectors && count == N) {
        SIMT_UNROLL
        for (int i = 0; i < N; i += W) {
            float part[W];
            SIMT_UNROLL
            for (int k = 0; k < W; k++) part[k] = in[i + k];
            store<W>(p + i, part);
        }
    } else {
        SIMT_UNROLL
        for (int i = 0; i < N; i++)
            if (i < count) p[i] = T(in[i]);
    }
}
}  // namespace device
