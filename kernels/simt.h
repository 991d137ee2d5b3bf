// The one header through which kernel files see CUDA.  nvcc compiles kernel files for the GPU; a plain C++ compiler
// builds them for the CPU, with the emulator that emulator/include puts on the include path.
//
//   SIMT_SHARED(float, tile, [32][33]);     a static shared array
//   SIMT_DYN_SHARED(smem);                  dynamic shared memory: uint8_t* smem, 1024-byte aligned
//   simt::launch(kernel<T>, grid, block, n_shared_bytes, stream, arguments...)
//   simt::ld_vec<uint4>(p), simt::st_vec(p, v)     8- and 16-byte accesses; misalignment is caught by the emulator
//   simt::st_global(p, v)                   the same to device memory, a store that no compiler splits
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __CUDACC__
#include <cuda.h>
#define SIMT_EMULATED 0
#define SIMT_SHARED(T, name, dims) __shared__ T name dims
#define SIMT_DYN_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]
#define SIMT_PARAM const __grid_constant__  // a struct that is a kernel's parameter
#define SIMT_UNROLL _Pragma("unroll")
#define SIMT_NO_UNROLL _Pragma("unroll 1")
#else
#include "cuda_emulator.h"
#define SIMT_EMULATED 1
#define SIMT_PARAM const
#define SIMT_UNROLL
#define SIMT_NO_UNROLL
#endif

// 1 where the compiler calls the emulator's hooks at each memory access (emulator/hooks.cpp).
#if defined(__SANITIZE_THREAD__)
#define SIMT_HOOKED 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SIMT_HOOKED 1
#endif
#endif
#ifndef SIMT_HOOKED
#define SIMT_HOOKED 0
#endif

namespace simt {
#if SIMT_EMULATED
using TensorMap = emulator::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// Gives a kernel to a stream and returns the launch's own error; an error inside the kernel shows at a later call.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t n_shared_bytes, cudaStream_t stream,
                   A&&... arguments) {
    // A block gets 48 KiB without asking.  The kernel's static arrays are part of that; their size is not known here.
    if (n_shared_bytes > 32 * 1024) {
        const cudaError_t e =
            cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(n_shared_bytes));
        if (e != cudaSuccess) return e;
    }
#if SIMT_EMULATED
    return emulator::enqueue_kernel(reinterpret_cast<const void*>(kernel), grid, block, n_shared_bytes, stream,
                                    [kernel, ... a = P(std::forward<A>(arguments))] { kernel(a...); });
#else
    // clang-format off
    kernel<<<grid, block, n_shared_bytes, stream>>>(std::forward<A>(arguments)...);
    // clang-format on
    return cudaGetLastError();
#endif
}

// Compilers split or merge copies of structs, so the emulator checks ld_vec and st_vec, and no plain assignments.
template <class V>
__device__ __forceinline__ V ld_vec(const void* p) {
#if SIMT_EMULATED
    emulator::check_aligned(p, sizeof(V));
#if SIMT_HOOKED
    if constexpr (sizeof(V) == 16) return __builtin_bit_cast(V, emulator::load_bytes16(p));
    if constexpr (sizeof(V) == 8) return __builtin_bit_cast(V, emulator::load_bytes8(p));
#endif
#endif
    return *static_cast<const V*>(p);
}
template <class V>
__device__ __forceinline__ void st_vec(void* p, V v) {
#if SIMT_EMULATED
    emulator::check_aligned(p, sizeof(V));
#if SIMT_HOOKED
    if constexpr (sizeof(V) == 16) return emulator::store_bytes16(p, __builtin_bit_cast(emulator::Bytes16, v));
    if constexpr (sizeof(V) == 8) return emulator::store_bytes8(p, __builtin_bit_cast(emulator::Bytes8, v));
#endif
#endif
    *static_cast<V*>(p) = v;
}
// nvcc splits a plain store where another branch writes the same elements one by one; `make sass-check` looks for that.
template <class V>
__device__ __forceinline__ void st_global(void* p, V v) {
    static_assert(sizeof(V) == 8 || sizeof(V) == 16);
#if SIMT_EMULATED
    st_vec(p, v);
#else
    std::conditional_t<sizeof(V) == 16, uint4, uint2> words;
    memcpy(&words, &v, sizeof v);
    __stwb(static_cast<decltype(words)*>(p), words);
#endif
}
}  // namespace simt
