// The same instructions by kiln's wrappers and, with -DCUTE, by CUTLASS's: kernels of the same names and parameters.
// Both are compiled to PTX, which instructions.py compares.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#ifdef CUTE
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <utility>
namespace G = cute::SM90::GMMA;
#define KILN(...)
#define THEIRS(...) __VA_ARGS__
#else
#include "kernels/ptx.cuh"
#define KILN(...) __VA_ARGS__
#define THEIRS(...)
#endif
#define KERNEL(name, ...) extern "C" __global__ void name(__VA_ARGS__)
using U = uint32_t;

KERNEL(mma, float* d, const U* a, const U* b) {
    float c[4] = {d[0], d[1], d[2], d[3]};
    U x[4] = {a[0], a[1], a[2], a[3]}, y[2] = {b[0], b[1]};
    KILN(ptx::mma_m16n8k16(c, x, y);)
    THEIRS(cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(c[0], c[1], c[2], c[3], x[0], x[1], x[2], x[3], y[0], y[1], c[0],
                                                     c[1], c[2], c[3]);)
    for (int i = 0; i < 4; i++) d[i] = c[i];
}
#ifdef CUTE
#define ROW(p) (*reinterpret_cast<const cute::uint128_t*>(p))
#define ROW_OUT(p) (*reinterpret_cast<cute::uint128_t*>(p))
#endif
#define LOAD4(name, mine, theirs)                                                                              \
    KERNEL(name, U* out, char* s) {                                                                            \
        U r[4];                                                                                                \
        KILN(ptx::mine(r, s);)                                                                                 \
        THEIRS(cute::theirs::copy(ROW(s), r[0], r[1], r[2], r[3]);) for (int i = 0; i < 4; i++) out[i] = r[i]; \
    }
#define LOAD2(name, mine, theirs)                                                                  \
    KERNEL(name, U* out, char* s) {                                                                \
        U r[2];                                                                                    \
        KILN(ptx::mine(r, s);)                                                                     \
        THEIRS(cute::theirs::copy(ROW(s), r[0], r[1]);) for (int i = 0; i < 2; i++) out[i] = r[i]; \
    }
LOAD4(ldmatrix_x4, ldmatrix_x4, SM75_U32x4_LDSM_N)
LOAD4(ldmatrix_x4_trans, ldmatrix_x4_trans, SM75_U16x8_LDSM_T)
LOAD2(ldmatrix_x2, ldmatrix_x2, SM75_U32x2_LDSM_N)
LOAD2(ldmatrix_x2_trans, ldmatrix_x2_trans, SM75_U16x4_LDSM_T)
#define STORE4(name, mine, theirs)                                                             \
    KERNEL(name, const U* in, char* s) {                                                       \
        U r[4] = {in[0], in[1], in[2], in[3]};                                                 \
        KILN(ptx::mine(r, s);) THEIRS(cute::theirs::copy(r[0], r[1], r[2], r[3], ROW_OUT(s));) \
    }
#define STORE2(name, mine, theirs)                                                 \
    KERNEL(name, const U* in, char* s) {                                           \
        U r[2] = {in[0], in[1]};                                                   \
        KILN(ptx::mine(r, s);) THEIRS(cute::theirs::copy(r[0], r[1], ROW_OUT(s));) \
    }
STORE4(stmatrix_x4, stmatrix_x4, SM90_U32x4_STSM_N)
STORE4(stmatrix_x4_trans, stmatrix_x4_trans, SM90_U16x8_STSM_T)
STORE2(stmatrix_x2, stmatrix_x2, SM90_U32x2_STSM_N)
STORE2(stmatrix_x2_trans, stmatrix_x2_trans, SM90_U16x4_STSM_T)

#ifdef CUTE
template <class Op, class... A, int N, size_t... I>
__device__ void fma_of(std::index_sequence<I...>, float (&d)[N], int s, A... a) {
    Op::fma(a..., d[I]..., G::ScaleOut(s));
}
#endif
#define SS(name, N, ta, tb, op)                                                                             \
    KERNEL(name, float* d, uint64_t a, uint64_t b, int s) {                                                 \
        float c[N / 2];                                                                                     \
        for (int i = 0; i < N / 2; i++) c[i] = d[i];                                                        \
        KILN(ptx::wgmma_m64n##N##k16_ss<ta, tb>(c, a, b, s);)                                               \
        THEIRS((fma_of<G::op<G::Major(ta), G::Major(tb)>>(std::make_index_sequence<N / 2>{}, c, s, a, b));) \
        for (int i = 0; i < N / 2; i++) d[i] = c[i];                                                        \
    }
#define RS(name, N, tb, op)                                                                                         \
    KERNEL(name, float* d, const U* a, uint64_t b, int s) {                                                         \
        float c[N / 2];                                                                                             \
        U x[4] = {a[0], a[1], a[2], a[3]};                                                                          \
        for (int i = 0; i < N / 2; i++) c[i] = d[i];                                                                \
        KILN(ptx::wgmma_m64n##N##k16_rs<tb>(c, x, b, s);)                                                           \
        THEIRS((fma_of<G::op<G::Major::K, G::Major(tb)>>(std::make_index_sequence<N / 2>{}, c, s, x[0], x[1], x[2], \
                                                         x[3], b));)                                                \
        for (int i = 0; i < N / 2; i++) d[i] = c[i];                                                                \
    }
// 0: K-major, 1: MN-major, as GMMA::Major's members
#ifdef CUTE
static_assert(int(G::Major::K) == 0 && int(G::Major::MN) == 1);
#endif
SS(wgmma_64_ss_k_k, 64, 0, 0, MMA_64x64x16_F32BF16BF16_SS)
SS(wgmma_64_ss_mn_mn, 64, 1, 1, MMA_64x64x16_F32BF16BF16_SS)
SS(wgmma_128_ss_k_k, 128, 0, 0, MMA_64x128x16_F32BF16BF16_SS)
SS(wgmma_128_ss_k_mn, 128, 0, 1, MMA_64x128x16_F32BF16BF16_SS)
SS(wgmma_128_ss_mn_k, 128, 1, 0, MMA_64x128x16_F32BF16BF16_SS)
RS(wgmma_64_rs_k, 64, 0, MMA_64x64x16_F32BF16BF16_RS)
RS(wgmma_64_rs_mn, 64, 1, MMA_64x64x16_F32BF16BF16_RS)
RS(wgmma_128_rs_k, 128, 0, MMA_64x128x16_F32BF16BF16_RS)
RS(wgmma_128_rs_mn, 128, 1, MMA_64x128x16_F32BF16BF16_RS)

KERNEL(wgmma_fence, int) { KILN(ptx::wgmma_fence();) THEIRS(cute::warpgroup_arrive();) }
KERNEL(wgmma_commit, int) { KILN(ptx::wgmma_commit();) THEIRS(cute::warpgroup_commit_batch();) }
KERNEL(wgmma_wait_1, int) { KILN(ptx::wgmma_wait<1>();) THEIRS(cute::warpgroup_wait<1>();) }
KERNEL(bulk_commit, int) { KILN(ptx::bulk_commit();) THEIRS(cute::tma_store_arrive();) }
KERNEL(bulk_wait_read_0, int) { KILN(ptx::bulk_wait_read<0>();) THEIRS(cute::tma_store_wait<0>();) }
KERNEL(fence_mbarrier_init, int) { KILN(ptx::fence_mbarrier_init();) THEIRS(cutlass::arch::fence_barrier_init();) }
KERNEL(fence_proxy_async, int) { KILN(ptx::fence_proxy_async();) THEIRS(cutlass::arch::fence_view_async_shared();) }
KERNEL(setmaxnreg, int) {
    KILN(ptx::setmaxnreg_dec<40>(); ptx::setmaxnreg_inc<232>();)
    THEIRS(cutlass::arch::warpgroup_reg_dealloc<40>(); cutlass::arch::warpgroup_reg_alloc<232>();)
}
KERNEL(bar_sync, int id, int n) {
    KILN(ptx::bar_sync(id, n);) THEIRS(cutlass::arch::NamedBarrier::sync(U(n), U(id - 8));)
}
KERNEL(bar_arrive, int id, int n) {
    KILN(ptx::bar_arrive(id, n);) THEIRS(cutlass::arch::NamedBarrier::arrive(U(n), U(id - 8));)
}
KERNEL(mbar_init, uint64_t* b, int n) {
    KILN(ptx::mbar_init(b, U(n));) THEIRS(cutlass::arch::ClusterBarrier::init(b, U(n));)
}
KERNEL(mbar_arrive, uint64_t* b) { KILN(ptx::mbar_arrive(b);) THEIRS(cutlass::arch::ClusterBarrier::arrive(b);) }
KERNEL(mbar_arrive_expect_tx, uint64_t* b, U n) {
    KILN(ptx::mbar_arrive_expect_tx(b, n);)
    THEIRS(cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(b, n);)
}
KERNEL(mbar_try_wait, uint64_t* b, U p, U* out) {
    KILN(*out = ptx::mbar_try_wait(b, p);) THEIRS(*out = cutlass::arch::ClusterBarrier::try_wait(b, p);)
}
KERNEL(elect, U* out) { KILN(*out = ptx::elect_one();) THEIRS(*out = cute::elect_one_sync();) }
// CUTLASS's loads always carry a cache hint; instructions.py drops it.
KERNEL(tma_load_2d, char* s, const CUtensorMap* m, uint64_t* b, int x, int y) {
    KILN(ptx::tma_load_2d(s, m, b, x, y);) THEIRS(cute::SM90_TMA_LOAD_2D::copy(m, b, 77, s, x, y);)
}
KERNEL(tma_load_3d, char* s, const CUtensorMap* m, uint64_t* b, int x, int y, int z) {
    KILN(ptx::tma_load_3d(s, m, b, x, y, z);) THEIRS(cute::SM90_TMA_LOAD_3D::copy(m, b, 77, s, x, y, z);)
}
KERNEL(tma_load_4d, char* s, const CUtensorMap* m, uint64_t* b, int x, int y, int z, int w) {
    KILN(ptx::tma_load_4d(s, m, b, x, y, z, w);) THEIRS(cute::SM90_TMA_LOAD_4D::copy(m, b, 77, s, x, y, z, w);)
}
KERNEL(tma_store_2d, char* s, const CUtensorMap* m, int x, int y) {
    KILN(ptx::tma_store_2d(m, s, x, y);) THEIRS(cute::SM90_TMA_STORE_2D::copy(m, s, x, y);)
}
KERNEL(tma_store_4d, char* s, const CUtensorMap* m, int x, int y, int z, int w) {
    KILN(ptx::tma_store_4d(m, s, x, y, z, w);) THEIRS(cute::SM90_TMA_STORE_4D::copy(m, s, x, y, z, w);)
}
KERNEL(tma_reduce_add_2d, char* s, const CUtensorMap* m, int x, int y) {
    KILN(ptx::tma_reduce_add_2d(m, s, x, y);) THEIRS(cute::SM90_TMA_REDUCE_ADD_2D::copy(m, s, x, y);)
}
#ifdef CUTE
struct alignas(16) Sixteen {
    U w[4];
};
#endif
KERNEL(cp_async16, char* s, const char* g, bool valid) {
    KILN(ptx::cp_async16(s, g, valid);)
    THEIRS(cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<Sixteen>::copy(*reinterpret_cast<const Sixteen*>(g),
                                                                *reinterpret_cast<Sixteen*>(s), valid);)
}
KERNEL(cp_async8, char* s, const char* g, bool valid) {
    KILN(ptx::cp_async8(s, g, valid);)
    THEIRS(cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<uint64_t>::copy(*reinterpret_cast<const uint64_t*>(g),
                                                                 *reinterpret_cast<uint64_t*>(s), valid);)
}
KERNEL(cp_async4, char* s, const char* g, bool valid) {
    KILN(ptx::cp_async4(s, g, valid);)
    THEIRS(cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<U>::copy(*reinterpret_cast<const U*>(g), *reinterpret_cast<U*>(s),
                                                          valid);)
}
KERNEL(cp_async_commit, int) { KILN(ptx::cp_async_commit();) THEIRS(cute::cp_async_fence();) }
KERNEL(cp_async_wait_1, int) { KILN(ptx::cp_async_wait<1>();) THEIRS(cute::cp_async_wait<1>();) }
