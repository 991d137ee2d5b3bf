// Helpers of all kernels: 16-byte vectors, sums over a warp and a block in a fixed order.
#pragma once
#include <type_traits>

#include "common/buf.h"
#include "kernels/ptx.cuh"
#include "kernels/simt.h"

namespace device {
constexpr unsigned kAllLanes = 0xffffffffu;

// N numbers of T, moved by one access of N * sizeof(T) bytes (at most 16; 8 or 16 through ld_vec).
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
    T v[N];
    __device__ __forceinline__ T& operator[](int i) { return v[i]; }
    __device__ __forceinline__ const T& operator[](int i) const { return v[i]; }
};
template <class T>
constexpr int kVec = 16 / int(sizeof(T));  // elements of a 16-byte access

// The numbers of a vector as floats, and back, rounded.  bf16 goes in pairs: one instruction for each number that is
// unpacked, one for each two that are packed.
template <int N, class T>
__device__ __forceinline__ void unpack(float (&out)[N], const Vec<T, N>& v) {
    if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {
        uint32_t pairs[N / 2];
        memcpy(pairs, &v, sizeof pairs);
        SIMT_UNROLL
        for (int i = 0; i < N / 2; i++) {
            const float2 both = ptx::unpack_bf16(pairs[i]);
            out[2 * i] = both.x, out[2 * i + 1] = both.y;
        }
    } else {
        SIMT_UNROLL
        for (int i = 0; i < N; i++) out[i] = float(v[i]);
    }
}
template <class T, int N>
__device__ __forceinline__ Vec<T, N> pack(const float (&in)[N]) {
    Vec<T, N> v;
    if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {
        uint32_t pairs[N / 2];
        SIMT_UNROLL
        for (int i = 0; i < N / 2; i++) pairs[i] = ptx::pack_bf16(in[2 * i], in[2 * i + 1]);
        memcpy(&v, pairs, sizeof v);
    } else {
        SIMT_UNROLL
        for (int i = 0; i < N; i++) v[i] = T(in[i]);
    }
    return v;
}

// Loads and stores N elements at p, which is aligned to N * sizeof(T), as floats.
template <int N, class T>
__device__ __forceinline__ void load(float (&out)[N], const T* p) {
    unpack(out, simt::ld_vec<Vec<T, N>>(p));
}
template <int N, class T>
__device__ __forceinline__ void store(T* p, const float (&in)[N]) {
    simt::st_global(p, pack<T>(in));
}

// The place of 16-byte vector v in an array in shared memory.  It lets lanes that each write two vectors in a row meet
// no bank conflict: the hardware takes eight lanes at a time, and without spread() every second group of four banks
// would serve two.  Reading 32 numbers in a row stays free of conflicts, and so does one vector per lane.
__device__ __forceinline__ int spread(int v) { return v ^ (v >> 3 & 1); }

// Butterfly over the warp: every lane gets the sum (largest), the same bits in all lanes.
template <class T>
__device__ __forceinline__ T warp_sum(T v) {
    SIMT_UNROLL
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
    SIMT_UNROLL
    for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, offset));
    return v;
}

// Sum over a block of up to 1024 threads, whole warps; `part` is the caller's shared memory, one T per warp.  All
// threads get the sum.  At the end every thread has read `part` for the last time: the caller may reuse it at once.
template <class T>
__device__ __forceinline__ T block_sum(std::type_identity_t<T> v, T* part) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, n_warps = int(blockDim.x) / 32;
    v = warp_sum(v);
    if (lane == 0) part[warp] = v;
    __syncthreads();
    v = warp_sum(lane < n_warps ? part[lane] : T(0));
    __syncthreads();
    return v;
}
}  // namespace device
