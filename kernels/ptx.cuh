// Every PTX instruction that kernels use, wrapped once: the device body is the instruction, the host body calls the
// emulator.  Kernel files contain no inline asm.
//
// An instruction is added in three places: a wrapper here, its emulation in emulator, and a case of
// emulator/test/test_isa.cu, written from the PTX manual, which also runs on a GPU.
//
// Wrappers above the line "Hopper" need compute capability 8.0, those below it 9.0a; stmatrix needs 9.0.
#pragma once
#include <cmath>

#include "common/buf.h"
#include "kernels/simt.h"
#include "kernels/wgmma.cuh"

// PTX(call of the emulator, asm template : outputs : inputs : clobbers)
#if SIMT_EMULATED
#define PTX(emulation, ...) emulation
#else
#define PTX(emulation, ...) asm volatile(__VA_ARGS__)
#endif
#define PTX_OUT2(r) "=r"((r)[0]), "=r"((r)[1])
#define PTX_OUT4(r) "=r"((r)[0]), "=r"((r)[1]), "=r"((r)[2]), "=r"((r)[3])
#define PTX_IN2(r) "r"((r)[0]), "r"((r)[1])
#define PTX_IN4(r) "r"((r)[0]), "r"((r)[1]), "r"((r)[2]), "r"((r)[3])

namespace ptx {
// The 32-bit address of a place in shared memory.
__device__ __forceinline__ uint32_t smem_u32(const void* p) {
#if SIMT_EMULATED
    return emulator::cvta_shared(p);
#else
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#endif
}

// ---- arithmetic; approximate on the device: about 2 ulp, subnormals are zero ----
#if SIMT_EMULATED
__device__ __forceinline__ float ex2(float x) { return std::exp2(x); }
__device__ __forceinline__ float lg2(float x) { return std::log2(x); }
__device__ __forceinline__ float rcp(float x) { return 1.0f / x; }
#else
__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float lg2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float rcp(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif
// Two bf16 in a register, `low` in the lower half: the element that comes first in memory.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#if SIMT_EMULATED
    return uint32_t(bf16(low).bits) | uint32_t(bf16(high).bits) << 16;
#else
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);  // one instruction; two conversions would be three
    uint32_t bits;
    memcpy(&bits, &both, sizeof bits);
    return bits;
#endif
}

// The inverse of pack_bf16, exact.
__device__ __forceinline__ float2 unpack_bf16(uint32_t both) {
    const uint32_t low = both << 16, high = both & 0xffff0000u;
    float2 v;
    memcpy(&v.x, &low, sizeof low);
    memcpy(&v.y, &high, sizeof high);
    return v;
}

// ---- time: cycles of the multiprocessor's clock, and nanoseconds of a clock that does not change its rate ----
__device__ __forceinline__ uint64_t sm_cycles() {
#if SIMT_EMULATED
    return emulator::global_ns();  // 1 GHz
#else
    uint64_t t;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(t)::"memory");
    return t;
#endif
}
__device__ __forceinline__ uint64_t global_ns() {
#if SIMT_EMULATED
    return emulator::global_ns();
#else
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
    return t;
#endif
}

// ---- named barriers: id 0 is __syncthreads'; n_threads is a multiple of 32 ----
__device__ __forceinline__ void bar_sync(int id, int n_threads) {
    PTX(emulator::bar_sync(id, n_threads), "bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}
// Counts as arrived, does not wait.
__device__ __forceinline__ void bar_arrive(int id, int n_threads) {
    PTX(emulator::bar_arrive(id, n_threads), "bar.arrive %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

// ---- cp.async: global to shared memory, aligned to the size; zeros when not valid, and then `g` is not read ----
__device__ __forceinline__ void cp_async16(void* smem, const void* g, bool valid = true) {
    PTX(emulator::cp_async(smem, g, 16, valid ? 16 : 0),
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_u32(smem)), "l"(g), "r"(valid ? 16 : 0)
        : "memory");
}
__device__ __forceinline__ void cp_async8(void* smem, const void* g, bool valid = true) {
    PTX(emulator::cp_async(smem, g, 8, valid ? 8 : 0),
        "cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(smem_u32(smem)), "l"(g), "r"(valid ? 8 : 0)
        : "memory");
}
__device__ __forceinline__ void cp_async4(void* smem, const void* g, bool valid = true) {
    PTX(emulator::cp_async(smem, g, 4, valid ? 4 : 0),
        "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_u32(smem)), "l"(g), "r"(valid ? 4 : 0)
        : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
    PTX(emulator::cp_async_commit(), "cp.async.commit_group;" ::: "memory");
}
// Waits until at most N groups of this thread are in flight.  Other threads' copies need a barrier as well.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    PTX(emulator::cp_async_wait(N), "cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- ldmatrix, stmatrix: 8x8 matrices of 16 bits; lane l points to row l % 8 of matrix l / 8 ----
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    PTX(emulator::matrix_load("ldmatrix.x4", r, row, 4, false),
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : PTX_OUT4(r)
        : "r"(smem_u32(row))
        : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    PTX(emulator::matrix_load("ldmatrix.x4.trans", r, row, 4, true),
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : PTX_OUT4(r)
        : "r"(smem_u32(row))
        : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
    PTX(emulator::matrix_load("ldmatrix.x2", r, row, 2, false),
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
        : PTX_OUT2(r)
        : "r"(smem_u32(row))
        : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
    PTX(emulator::matrix_load("ldmatrix.x2.trans", r, row, 2, true),
        "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
        : PTX_OUT2(r)
        : "r"(smem_u32(row))
        : "memory");
}
__device__ __forceinline__ void stmatrix_x4(const uint32_t (&r)[4], void* row) {
    PTX(emulator::matrix_store("stmatrix.x4", r, row, 4, false),
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(smem_u32(row)), PTX_IN4(r)
        : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(const uint32_t (&r)[4], void* row) {
    PTX(emulator::matrix_store("stmatrix.x4.trans", r, row, 4, true),
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(smem_u32(row)), PTX_IN4(r)
        : "memory");
}
__device__ __forceinline__ void stmatrix_x2(const uint32_t (&r)[2], void* row) {
    PTX(emulator::matrix_store("stmatrix.x2", r, row, 2, false),
        "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};" ::"r"(smem_u32(row)), PTX_IN2(r)
        : "memory");
}
__device__ __forceinline__ void stmatrix_x2_trans(const uint32_t (&r)[2], void* row) {
    PTX(emulator::matrix_store("stmatrix.x2.trans", r, row, 2, true),
        "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(smem_u32(row)), PTX_IN2(r)
        : "memory");
}

// ---- mma.sync: d += a * b for 16x16 times 16x8 of bf16.  With g = lane / 4, t = 2 (lane % 4):
//   a[i]  rows g + 8 (i & 1), columns t + 8 (i / 2) and the next      d[i]  row g + 8 (i / 2), column t + (i & 1)
//   b[i]  rows (k) t + 8 i and the next, column (n) g
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    PTX(emulator::mma_m16n8k16(d, a, b),
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : PTX_IN4(a), PTX_IN2(b));
}

// ================================================= Hopper =================================================
__device__ __forceinline__ bool elect_one() {
#if SIMT_EMULATED
    return __ballot_sync(0xffffffffu, 1) && emulator::t_cur->lane == 0;
#else
    uint32_t elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
    return elected != 0;
#endif
}
// Sets the registers of each thread of the warpgroup from here on.  A block can only share out the registers that it
// was launched with: an increase waits until other warpgroups have given up enough.
template <int N>
__device__ __forceinline__ void setmaxnreg_inc() {
    PTX(emulator::setmaxnreg(true, N), "setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void setmaxnreg_dec() {
    PTX(emulator::setmaxnreg(false, N), "setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- mbarrier: a phase ends when `count` arrivals and all announced bytes are in ----
__device__ __forceinline__ void mbar_init(uint64_t* b, unsigned count) {
    const uint32_t s = smem_u32(b);
    PTX(emulator::mbar_init(s, count), "mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(s), "r"(count) : "memory");
}
__device__ __forceinline__ void mbar_arrive(uint64_t* b) {
    const uint32_t s = smem_u32(b);
    PTX(emulator::mbar_arrive(s, 1, 0), "mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(s) : "memory");
}
__device__ __forceinline__ void mbar_arrive_expect_tx(uint64_t* b, unsigned n_bytes) {
    const uint32_t s = smem_u32(b);
    PTX(emulator::mbar_arrive(s, 1, n_bytes), "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(s),
        "r"(n_bytes)
        : "memory");
}
// True when the phase of this parity has ended; may also return false for no reason.
__device__ __forceinline__ bool mbar_try_wait(uint64_t* b, unsigned parity) {
    const uint32_t s = smem_u32(b);
#if SIMT_EMULATED
    return emulator::mbar_try_wait(s, parity);
#else
    uint32_t done;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(s), "r"(parity)
                 : "memory");
    return done != 0;
#endif
}
__device__ __forceinline__ void mbar_wait(uint64_t* b, unsigned parity) {
    while (!mbar_try_wait(b, parity)) {}
}
__device__ __forceinline__ void fence_mbarrier_init() {
    PTX((void)0, "fence.mbarrier_init.release.cluster;" ::: "memory");
}
// TMA and wgmma after this fence see the ordinary stores to shared memory before it.
__device__ __forceinline__ void fence_proxy_async() {
    PTX(emulator::proxy_fence(), "fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- TMA: x counts elements of the contiguous dimension; loads end in the mbarrier, stores in a bulk group ----
__device__ __forceinline__ void tma_load_2d(void* to, const simt::TensorMap* m, uint64_t* bar, int x, int y) {
    const uint32_t s = smem_u32(to), b = smem_u32(bar);
    PTX(emulator::tma_load(s, m, b, {x, y}),
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(s),
        "l"(m), "r"(b), "r"(x), "r"(y)
        : "memory");
}
__device__ __forceinline__ void tma_load_3d(void* to, const simt::TensorMap* m, uint64_t* bar, int x, int y, int z) {
    const uint32_t s = smem_u32(to), b = smem_u32(bar);
    PTX(emulator::tma_load(s, m, b, {x, y, z}),
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(s),
        "l"(m), "r"(b), "r"(x), "r"(y), "r"(z)
        : "memory");
}
__device__ __forceinline__ void tma_load_4d(void* to, const simt::TensorMap* m, uint64_t* bar, int x, int y, int z,
                                            int w) {
    const uint32_t s = smem_u32(to), b = smem_u32(bar);
    PTX(emulator::tma_load(s, m, b, {x, y, z, w}),
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(s),
        "l"(m), "r"(b), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
}
__device__ __forceinline__ void tma_store_2d(const simt::TensorMap* m, const void* from, int x, int y) {
    const uint32_t s = smem_u32(from);
    PTX(emulator::tma_store(m, s, {x, y}, false),
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(m), "r"(s), "r"(x), "r"(y)
        : "memory");
}
__device__ __forceinline__ void tma_store_4d(const simt::TensorMap* m, const void* from, int x, int y, int z, int w) {
    const uint32_t s = smem_u32(from);
    PTX(emulator::tma_store(m, s, {x, y, z, w}, false),
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(m), "r"(s), "r"(x),
        "r"(y), "r"(z), "r"(w)
        : "memory");
}
__device__ __forceinline__ void tma_reduce_add_2d(const simt::TensorMap* m, const void* from, int x, int y) {
    const uint32_t s = smem_u32(from);
    PTX(emulator::tma_store(m, s, {x, y}, true),
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];" ::"l"(m), "r"(s),
        "r"(x), "r"(y)
        : "memory");
}
__device__ __forceinline__ void bulk_commit() {
    PTX(emulator::bulk_commit(), "cp.async.bulk.commit_group;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void bulk_wait() {
    PTX(emulator::bulk_wait(N), "cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
// Waits only until the shared memory may be written again.
template <int N>
__device__ __forceinline__ void bulk_wait_read() {
    PTX(emulator::bulk_wait_read(N), "cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// ---- wgmma (the products themselves are in wgmma.cuh) ---- Descriptor of a bf16 tile with the 128-byte swizzle.
// K-major: rows of 64 k-elements, groups of 8 rows `stride` bytes apart (1024 when dense).  MN-major: rows of 64
// mn-elements, one per k; groups of 8 k `stride` bytes apart, chunks of 64 mn `leading` bytes apart.
__device__ __forceinline__ uint64_t wgmma_desc_sw128(const void* p, uint32_t leading, uint32_t stride) {
    constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
    return uint64_t((smem_u32(p) & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
           kSwizzle128;
}
__device__ __forceinline__ void wgmma_fence() {
    PTX(emulator::wgmma_fence(), "wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    PTX(emulator::wgmma_commit(), "wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most N groups are in flight.  Then the operands and results of the ended groups may be touched; the
// compiler knows that only of registers given to wgmma_done after the wait.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    PTX(emulator::wgmma_wait(N), "wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Ties registers that a wgmma has written (or read, as A) to this place: no use of them moves to before this place.
template <size_t N>
__device__ __forceinline__ void wgmma_done([[maybe_unused]] float (&r)[N]) {
#if !SIMT_EMULATED
    SIMT_UNROLL
    for (size_t i = 0; i < N; i++) asm volatile("" : "+f"(r[i])::"memory");
#endif
}
template <size_t K>
__device__ __forceinline__ void wgmma_done([[maybe_unused]] uint32_t (&r)[K][4]) {
#if !SIMT_EMULATED
    SIMT_UNROLL
    for (size_t k = 0; k < K; k++)
        asm volatile("" : "+r"(r[k][0]), "+r"(r[k][1]), "+r"(r[k][2]), "+r"(r[k][3])::"memory");
#endif
}
}  // namespace ptx

#undef PTX_OUT2
#undef PTX_OUT4
#undef PTX_IN2
#undef PTX_IN4
#undef PTX
