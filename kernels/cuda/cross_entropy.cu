// Softmax and cross-entropy of each row, and the gradient in place of the logits.
//
//   loss = log s + m - x[target],   m = max_v x[v],  s = sum_v exp(x[v] - m)       v over the V true columns
//   x[v] becomes exp(x[v] - m) grad_scale / s - (v == target) grad_scale, and 0 in the padded columns V..Vp
//
//   shapes     logits (BT, Vp) real    targets (BT) i32    loss (BT) f32    correct (BT) i32
//   traffic    training: one read and one write of the logits where a row fits in a block's shared memory (50304
//              columns of bf16 take 98.25 KiB: on 8.0, 9.0 and 10.0, not on 8.6 and 8.9), else a second read, from L2.
//              Evaluation: one read.  Two exponentials per column.   bound: memory
//   limits     any V <= Vp; |logits| below 2^127.  Targets are checked on the host before they are uploaded: a target
//              outside [0, V) reads and writes nothing out of bounds, the row's loss and gradient become NaN
//   order      one block per row.  A thread takes every blockDim-th vector of 16 bytes and keeps a running maximum and
//              the fp32 sum relative to it.  Then the thread sums are scaled to the block's maximum and added in a
//              fixed tree.  The number of threads follows from Vp alone: a row in shared memory and a row read
//              twice give the same bits
#include "kernels/cuda/launch.h"
#include "kernels/elementwise.cuh"
#include "kernels/ptx.cuh"

#include <algorithm>
#include <cfloat>

namespace {
using device::kVec;

// Two blocks of this many threads, each with a row of 100 KB, share a multiprocessor: one reads, the other computes.
constexpr int kMaxThreads = 512;
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;

// Exponentials of logits relative to the largest logit m: exp(x - m) = 2^(x log2(e) - c) with c = m log2(e), one
// instruction before ex2.  The rounding of c multiplies all exponentials of a row by one factor near 1: quotients, and
// so gradients, do not change, and correction() takes the factor's logarithm out of the loss.  From |m| = 2^20 on the
// factor could exceed 1.04; there m is subtracted first.
struct Relative {
    float m, c;  // c: 0 where m is huge
    bool huge;
    __device__ __forceinline__ explicit Relative(float largest) : m(largest), huge(fabsf(largest) >= 0x1p20f) {
        c = huge ? 0.0f : m * kLog2E;
    }
    template <int N>
    __device__ __forceinline__ void exponentials(float (&x)[N]) const {
        if (huge) {
            SIMT_UNROLL
            for (int i = 0; i < N; i++) x[i] -= m;
        }
        SIMT_UNROLL
        for (int i = 0; i < N; i++) x[i] = ptx::ex2(fmaf(x[i], kLog2E, -c));
    }
    // Sums relative to this times to(other) are relative to `other`, which is not smaller.
    __device__ __forceinline__ float to(const Relative& other) const {
        if (!huge && !other.huge) return ptx::ex2(c - other.c);
        if (huge && other.huge) return ptx::ex2((m - other.m) * kLog2E);
        return ptx::ex2(huge ? fmaf(m, kLog2E, -other.c) : fmaf(-other.m, kLog2E, c));
    }
    // To be added to the logarithm of a sum; exact but for kLn2.
    __device__ __forceinline__ float correction() const { return huge ? 0.0f : fmaf(-m, kLog2E, c) * kLn2; }
};

__device__ __forceinline__ float block_max(float v, float* part) {
    const int lane = int(threadIdx.x) % 32, n_warps = int(blockDim.x) / 32;
    v = device::warp_max(v);
    if (lane == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    return device::warp_max(lane < n_warps ? part[lane] : -FLT_MAX);
}

// N logits at column c; -inf behind the V-th.
template <class T>
__device__ __forceinline__ void load_logits(float (&x)[kVec<T>], const T* row, int c, int V, bool vectors) {
    const int count = V - c < kVec<T> ? V - c : kVec<T>;
    device::load_some(x, row + c, count, vectors);
    if (count < kVec<T>) {
        SIMT_UNROLL
        for (int i = 0; i < kVec<T>; i++)
            if (i >= count) x[i] = -INFINITY;
    }
}

// Kept: the row stays in dynamic shared memory between the two passes; every thread reads only what it copied itself.
template <class T, bool Kept>
__global__ void __launch_bounds__(kMaxThreads) cross_entropy_kernel(float* loss,             // (BT)
                                                                    int32_t* correct,        // (BT) or null
                                                                    T* logits,               // (BT, Vp)
                                                                    const int32_t* targets,  // (BT)
                                                                    int V, int Vp, float grad_scale, bool vectors) {
    constexpr int N = kVec<T>;
    SIMT_DYN_SHARED(dynamic);
    SIMT_SHARED(float, maxima, [kMaxThreads / 32]);
    SIMT_SHARED(float, sums, [kMaxThreads / 32]);
    T* row = logits + size_t(blockIdx.x) * Vp;  // (Vp)
    const int c0 = int(threadIdx.x) * N, step = int(blockDim.x) * N;
    const T* from = row;  // (Vp)
    if constexpr (Kept) {
        T* kept = reinterpret_cast<T*>(dynamic);  // (Vp)
        for (int c = c0; c < V; c += step) ptx::cp_async16(kept + c, row + c);
        ptx::cp_async_commit();
        from = kept;
    }
    const int target = targets[blockIdx.x];
    const bool known = target >= 0 && target < V;
    const float at_target = known ? float(row[target]) : NAN;  // before any thread passes a barrier and writes
    if constexpr (Kept) ptx::cp_async_wait<0>();

    // From -FLT_MAX, not -inf: a row may begin with -inf, and -inf - -inf is NaN.  fmaxf ignores NaN, the sum does not.
    Relative own(-FLT_MAX);   // to the thread's largest logit
    float before = -FLT_MAX;  // the thread's largest before the target
    float sum = 0;            // of exp(x - m)
    for (int c = c0; c < V; c += step) {
        float x[N];
        load_logits(x, from, c, V, vectors);
        float top = x[0];
        SIMT_UNROLL
        for (int i = 1; i < N; i++) top = fmaxf(top, x[i]);
        if (c + N <= target) {
            before = fmaxf(before, top);
        } else if (c < target) {
            SIMT_UNROLL
            for (int i = 0; i < N; i++)
                if (c + i < target) before = fmaxf(before, x[i]);
        }
        if (top > own.m) {  // seldom, after the first vectors
            const Relative larger(top);
            sum *= own.to(larger);
            own = larger;
        }
        own.exponentials(x);
        SIMT_UNROLL
        for (int i = 0; i < N; i++) sum += x[i];
    }
    const float largest = block_max(own.m, maxima);
    const Relative all(largest);
    sum = device::block_sum(sum * own.to(all), sums);
    const bool earlier = __syncthreads_or(before == largest);
    if (threadIdx.x == 0) {
        loss[blockIdx.x] = logf(sum) + all.correction() + (largest - at_target);
        if (correct) correct[blockIdx.x] = at_target == largest && !earlier;
    }
    if (grad_scale == 0) return;

    const float scale = known ? grad_scale / sum : NAN;
    for (int c = c0; c < Vp; c += step) {
        float x[N];
        load_logits(x, from, c, V, vectors);
        all.exponentials(x);
        SIMT_UNROLL
        for (int i = 0; i < N; i++) x[i] *= scale;
        if (target >= c && target < c + N) {
            SIMT_UNROLL
            for (int i = 0; i < N; i++)
                if (c + i == target) x[i] -= grad_scale;
        }
        if (c + N > V) {  // zero also where the scale is NaN
            SIMT_UNROLL
            for (int i = 0; i < N; i++)
                if (c + i >= V) x[i] = 0;
        }
        device::store_some(row + c, x, Vp - c < N ? Vp - c : N, vectors);
    }
}

// Shared memory that a block of the current device may ask for.
size_t most_shared_memory() {
    int device = 0, n_bytes = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&n_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return size_t(n_bytes);
}
}  // namespace

namespace cuda {
void cross_entropy(const CrossEntropy& a, Stream s) {
    const size_t BT = size_t(a.BT), Vp = size_t(a.Vp);
    with_real(a.logits.dtype, [&]<class T>() {
        T* logits = a.logits.as<T>();  // (BT, Vp)
        const size_t n_warps = (Vp + 32 * kVec<T> - 1) / (32 * kVec<T>);
        const bool vectors = Vp % kVec<T> == 0 && device::aligned16(logits);
        // 1024: room for the static arrays in front of the row
        const bool kept = a.grad_scale != 0 && vectors && Vp * sizeof(T) + 1024 <= most_shared_memory();
        cuda::launch(kept ? cross_entropy_kernel<T, true> : cross_entropy_kernel<T, false>, dim3(unsigned(BT)),
                     dim3(unsigned(std::min<size_t>(32 * n_warps, kMaxThreads))), kept ? Vp * sizeof(T) : 0, s,
                     a.loss.as<float>(), a.correct.as<int32_t>(), logits, a.targets.as<int32_t>(), a.V, a.Vp,
                     a.grad_scale, vectors);
    });
}
}  // namespace cuda
