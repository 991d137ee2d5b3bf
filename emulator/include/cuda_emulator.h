// CUDA's keywords and intrinsics for the emulated build, on top of emulator.h: all that a kernel file may use beyond
// C++.  Every function is inlined into the kernel, so that a return address names the kernel's own line.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "emulator.h"

// __noinline__ is not defined: libstdc++ uses that word inside __attribute__.
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (::emulator::t_cur->tid)
#define blockIdx (::emulator::t_blk->bid)
#define blockDim (::emulator::t_blk->bdim)
#define gridDim (::emulator::t_blk->gdim)
#define warpSize 32

// Declares `name` as a reference to an array in the block's window of shared memory; the address of the static tag
// identifies the array.  The reference has a true array type: UBSan checks its bounds.
#define SIMT_SHARED(T, name, dims)     \
    static const char name##_tag_ = 0; \
    using name##_type_ = T dims;       \
    auto& name = *static_cast<name##_type_*>(::emulator::static_shared(&name##_tag_, sizeof(name##_type_), alignof(T)))
#define SIMT_DYN_SHARED(name) uint8_t* const name = static_cast<uint8_t*>(::emulator::dyn_shared())

// ---- synchronisation ----
__forceinline__ void __syncthreads() { emulator::bar_sync(0, 0); }
__forceinline__ int __syncthreads_count(int p) { return emulator::bar_reduce(p, emulator::Reduce::count); }
__forceinline__ int __syncthreads_and(int p) { return emulator::bar_reduce(p, emulator::Reduce::all); }
__forceinline__ int __syncthreads_or(int p) { return emulator::bar_reduce(p, emulator::Reduce::any); }
__forceinline__ void __syncwarp(uint32_t mask = 0xffffffffu) { emulator::warp_fence(mask); }
__forceinline__ void __threadfence() { emulator::thread_fence(); }
__forceinline__ void __threadfence_block() {}
__forceinline__ void __nanosleep(unsigned) { emulator::spin_yield(); }

// ---- shuffles ----
namespace emulator {
enum class Shuffle { index, up, down, exclusive_or };
template <class T>
struct ShuffleLane {
    T in, out;
    int selector, width;
};
// The lane that `lane` reads, by the PTX definition of shfl.
inline int shuffle_source(Shuffle mode, int lane, int selector, int width) {
    const int first = lane & ~(width - 1);
    int source = lane;
    switch (mode) {
        case Shuffle::index:
            return first + (selector & (width - 1));
        case Shuffle::up:
            source = lane - selector;
            return source < first ? lane : source;
        case Shuffle::down:
            source = lane + selector;
            break;
        case Shuffle::exclusive_or:
            source = lane ^ selector;
            break;
    }
    return source >= first + width ? lane : source;
}
template <class T, Shuffle mode>
void shuffle_lanes(void* const* lanes, uint32_t mask) {
    for (int lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        auto* self = static_cast<ShuffleLane<T>*>(lanes[lane]);
        const int source = shuffle_source(mode, lane, self->selector, self->width);
        if (!(mask >> source & 1))
            fail("synccheck", "shuffle: lane " + std::to_string(lane) + " reads lane " + std::to_string(source) +
                                  ", which is not in the mask");
        self->out = static_cast<ShuffleLane<T>*>(lanes[source])->in;
    }
}
template <class T, Shuffle mode>
__forceinline__ T shuffle(const char* op, uint32_t mask, T v, int selector, int width) {
    ShuffleLane<T> lane{v, v, selector, width};
    warp_collective(op, mask, &lane, shuffle_lanes<T, mode>);
    return lane.out;
}
}  // namespace emulator
template <class T>
__forceinline__ T __shfl_sync(uint32_t mask, T v, int source, int width = 32) {
    return emulator::shuffle<T, emulator::Shuffle::index>("__shfl_sync", mask, v, source, width);
}
template <class T>
__forceinline__ T __shfl_up_sync(uint32_t mask, T v, unsigned delta, int width = 32) {
    return emulator::shuffle<T, emulator::Shuffle::up>("__shfl_up_sync", mask, v, int(delta), width);
}
template <class T>
__forceinline__ T __shfl_down_sync(uint32_t mask, T v, unsigned delta, int width = 32) {
    return emulator::shuffle<T, emulator::Shuffle::down>("__shfl_down_sync", mask, v, int(delta), width);
}
template <class T>
__forceinline__ T __shfl_xor_sync(uint32_t mask, T v, int lanes, int width = 32) {
    return emulator::shuffle<T, emulator::Shuffle::exclusive_or>("__shfl_xor_sync", mask, v, lanes, width);
}

// ---- votes and reductions ----
namespace emulator {
struct VoteLane {
    uint32_t in, out;
};
// fold(result so far, value of a lane, lane)
template <uint32_t (*fold)(uint32_t, uint32_t, int), uint32_t first>
void vote_lanes(void* const* lanes, uint32_t mask) {
    uint32_t result = first;
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1) result = fold(result, static_cast<VoteLane*>(lanes[l])->in, l);
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1) static_cast<VoteLane*>(lanes[l])->out = result;
}
inline uint32_t fold_ballot(uint32_t r, uint32_t v, int lane) { return r | (v ? 1u << lane : 0u); }
inline uint32_t fold_any(uint32_t r, uint32_t v, int) { return r | (v != 0); }
inline uint32_t fold_all(uint32_t r, uint32_t v, int) { return r & (v != 0); }
inline uint32_t fold_add(uint32_t r, uint32_t v, int) { return r + v; }
inline uint32_t fold_max(uint32_t r, uint32_t v, int) { return std::max(r, v); }
inline uint32_t fold_min(uint32_t r, uint32_t v, int) { return std::min(r, v); }
inline uint32_t fold_or(uint32_t r, uint32_t v, int) { return r | v; }
inline uint32_t fold_and(uint32_t r, uint32_t v, int) { return r & v; }
inline uint32_t fold_xor(uint32_t r, uint32_t v, int) { return r ^ v; }
}  // namespace emulator
#define EMULATOR_VOTE(NAME, RESULT, VALUE, FOLD, FIRST)                                             \
    __forceinline__ RESULT NAME(uint32_t mask, VALUE v) {                                           \
        emulator::VoteLane lane{uint32_t(v), 0};                                                    \
        emulator::warp_collective(#NAME, mask, &lane, emulator::vote_lanes<emulator::FOLD, FIRST>); \
        return RESULT(lane.out);                                                                    \
    }
EMULATOR_VOTE(__ballot_sync, unsigned, int, fold_ballot, 0u)
EMULATOR_VOTE(__any_sync, int, int, fold_any, 0u)
EMULATOR_VOTE(__all_sync, int, int, fold_all, 1u)
EMULATOR_VOTE(__reduce_add_sync, unsigned, unsigned, fold_add, 0u)
EMULATOR_VOTE(__reduce_max_sync, unsigned, unsigned, fold_max, 0u)
EMULATOR_VOTE(__reduce_min_sync, unsigned, unsigned, fold_min, ~0u)
EMULATOR_VOTE(__reduce_or_sync, unsigned, unsigned, fold_or, 0u)
EMULATOR_VOTE(__reduce_and_sync, unsigned, unsigned, fold_and, ~0u)
EMULATOR_VOTE(__reduce_xor_sync, unsigned, unsigned, fold_xor, 0u)
#undef EMULATOR_VOTE

// ---- atomics: the host's atomic instructions, because blocks may run on several OS threads ----
namespace emulator {
template <class T, class F>
__forceinline__ T atomic_update(T* p, F f) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    atomic_hook(p, sizeof(T));
    auto* word = reinterpret_cast<Word*>(p);
    Word old = __atomic_load_n(word, __ATOMIC_RELAXED);
    for (;;) {
        const T before = __builtin_bit_cast(T, old), after = f(before);
        if (__atomic_compare_exchange_n(word, &old, __builtin_bit_cast(Word, after), false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST))
            return before;
    }
}
}  // namespace emulator
template <class T>
__forceinline__ T atomicAdd(T* p, std::type_identity_t<T> v) {
    return emulator::atomic_update(p, [v](T old) { return T(old + v); });
}
template <class T>
__forceinline__ T atomicMax(T* p, std::type_identity_t<T> v) {
    return emulator::atomic_update(p, [v](T old) { return old > v ? old : v; });
}
template <class T>
__forceinline__ T atomicMin(T* p, std::type_identity_t<T> v) {
    return emulator::atomic_update(p, [v](T old) { return old < v ? old : v; });
}
template <class T>
__forceinline__ T atomicOr(T* p, std::type_identity_t<T> v) {
    return emulator::atomic_update(p, [v](T old) { return T(old | v); });
}
template <class T>
__forceinline__ T atomicExch(T* p, std::type_identity_t<T> v) {
    return emulator::atomic_update(p, [v](T) { return v; });
}
template <class T>
__forceinline__ T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
    return emulator::atomic_update(p, [expected, v](T old) { return old == expected ? v : old; });
}

// ---- loads and stores with a cache hint ----
template <class T>
__forceinline__ T __ldg(const T* p) {
    return *p;
}
template <class T>
__forceinline__ T __ldcs(const T* p) {
    return *p;
}
template <class T>
__forceinline__ T __ldcg(const T* p) {
    return *p;
}
template <class T>
__forceinline__ void __stcs(T* p, std::type_identity_t<T> v) {
    *p = v;
}
template <class T>
__forceinline__ void __stcg(T* p, std::type_identity_t<T> v) {
    *p = v;
}

// ---- numbers ----
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
using std::max;
using std::min;
