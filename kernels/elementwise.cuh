// For kernels that treat every element by itself.  A thread owns N consecutive elements and moves them by accesses of
// 16 bytes (8 for four bf16), but one by one at a tail or where a tensor is a slice that starts off the boundary.
// Alignment does not change which elements a thread owns, and so it does not change the bits of a result.
#pragma once
#include "kernels/device.cuh"

namespace device {
constexpr unsigned kElementThreads = 256;  // of a block

// True when vectors may be used: every tensor except the absent ones (null) starts on a 16-byte boundary.
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

// Stores the first `count` of N numbers at p, and leaves all N as a T holds them: rounded once, read back from the same
// registers.
template <int N, class T>
__device__ __forceinline__ void store_rounded(T* p, float (&x)[N], int count, bool vectors) {
    if constexpr (N == kVec<T>) {
        const Vec<T, N> v = pack<T>(x);
        unpack(x, v);
        if (vectors && count == N) return simt::st_global(p, v);
    } else {
        SIMT_UNROLL
        for (int i = 0; i < N; i++) x[i] = float(T(x[i]));
    }
    store_some(p, x, count, vectors);
}

// For tensors of different element sizes.  A lane owns two quads of its warp's 256 elements, at 4 lane and 128 + 4
// lane.  Each fp32 access of a warp is then 512 bytes in a row; with eight neighbouring elements per lane the accesses
// would touch every sector twice, half of it each time.
struct Quads {
    size_t warp_first, n;  // the warp's first element; elements of the tensor
    int lane;
    __device__ __forceinline__ size_t at(int q) const { return warp_first + size_t(128 * q + 4 * lane); }
    __device__ __forceinline__ int count(int q) const { return at(q) >= n ? 0 : n - at(q) < 4 ? int(n - at(q)) : 4; }
    __device__ __forceinline__ bool whole() const { return n >= 256 && warp_first <= n - 256; }  // all 256 exist
};
__device__ __forceinline__ Quads quads_of(size_t n) {
    const int lane = int(threadIdx.x) % 32;
    return {(size_t(blockIdx.x) * blockDim.x + threadIdx.x - lane) * 8, n, lane};
}
__device__ __forceinline__ void load_quads(float (&out)[2][4], const float* p, const Quads& at, bool vectors) {
    SIMT_UNROLL
    for (int q = 0; q < 2; q++) load_some(out[q], p + at.at(q), at.count(q), vectors);
}
// All lanes of the warp must call it.
template <class T>
__device__ __forceinline__ void store_quads(T* p, const float (&in)[2][4], const Quads& at, bool vectors) {
    if constexpr (sizeof(T) == 2) {
        if (vectors && at.whole()) {
            // Lanes 2i and 2i+1 swap a quad.  The even lane then has eight elements in a row of the warp's first half,
            // the odd lane of its second half: one access of 16 bytes each.
            uint2 packed[2];
            SIMT_UNROLL
            for (int q = 0; q < 2; q++) {
                const Vec<T, 4> v = pack<T>(in[q]);
                memcpy(&packed[q], &v, sizeof v);
            }
            const bool odd = at.lane % 2;
            const uint2 mine = odd ? packed[1] : packed[0], give = odd ? packed[0] : packed[1];
            const uint2 got = {__shfl_xor_sync(kAllLanes, give.x, 1), __shfl_xor_sync(kAllLanes, give.y, 1)};
            const uint4 eight = odd ? uint4{got.x, got.y, mine.x, mine.y} : uint4{mine.x, mine.y, got.x, got.y};
            return simt::st_global(p + at.warp_first + (odd ? 128 : 0) + 8 * (at.lane / 2), eight);
        }
    }
    SIMT_UNROLL
    for (int q = 0; q < 2; q++) store_some(p + at.at(q), in[q], at.count(q), vectors);
}
}  // namespace device
