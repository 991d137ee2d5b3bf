// The products of kiln's attention kernels by kiln's own functions and, with -DCUTE, by CuTe's gemm() over CuTe's
// layouts of the same tiles.  products.py compares the machine code.
#include <cstdint>

#ifdef CUTE
#include <cute/tensor.hpp>  // before the others, which need it

#include <cute/algorithm/gemm.hpp>
#include <cute/atom/mma_atom.hpp>
using namespace cute;
namespace G = SM90::GMMA;
using Bf16 = bfloat16_t;

template <int N>
using RowsOp = conditional_t<N == 64, G::MMA_64x64x16_F32BF16BF16_SS<G::Major::K, G::Major::K>,
                             G::MMA_64x128x16_F32BF16BF16_SS<G::Major::K, G::Major::K>>;
template <int N>
using RowsRegistersOp = conditional_t<N == 64, G::MMA_64x64x16_F32BF16BF16_RS<G::Major::K, G::Major::K>,
                                      G::MMA_64x128x16_F32BF16BF16_RS<G::Major::K, G::Major::K>>;
template <int N>
using TileOp = conditional_t<N == 64, G::MMA_64x64x16_F32BF16BF16_RS<G::Major::K, G::Major::MN>,
                             G::MMA_64x128x16_F32BF16BF16_RS<G::Major::K, G::Major::MN>>;

template <int R, int C>
__device__ auto k_major(uint8_t* p) {
    return make_tensor(make_smem_ptr(reinterpret_cast<Bf16*>(p)),
                       tile_to_shape(G::Layout_K_SW128_Atom<Bf16>{}, Shape<Int<R>, Int<C>>{}));
}
template <int MN, int K>
__device__ auto mn_major(uint8_t* p) {
    return make_tensor(make_smem_ptr(reinterpret_cast<Bf16*>(p)),
                       tile_to_shape(G::Layout_MN_SW128_Atom<Bf16>{}, Shape<Int<MN>, Int<K>>{}, Step<_2, _1>{}));
}
template <int N, class Mma, class A, class B>
__device__ void multiply(Mma mma, A const& a, B const& b, bool add, float* out) {
    auto d = partition_fragment_C(mma, Shape<_64, Int<N>>{});
    CUTE_UNROLL
    for (int i = 0; i < N / 2; i++) d(i) = add ? out[i * 128 + threadIdx.x] : 0.0f;
    warpgroup_arrive();
    mma.accumulate_ = add ? G::ScaleOut::One : G::ScaleOut::Zero;
    CUTE_UNROLL
    for (int k = 0; k < size<2>(a); k++) {
        gemm(mma, a(_, _, k), b(_, _, k), d);
        mma.accumulate_ = G::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    CUTE_UNROLL
    for (int i = 0; i < N / 2; i++) out[i * 128 + threadIdx.x] = d(i);
}
template <int kDepth>
__device__ auto registers_of(const uint32_t* in) {
    auto a = make_tensor<Bf16>(Shape<Shape<_2, _2, _2>, _1, Int<kDepth / 16>>{});
    auto words = recast<uint32_t>(a);
    CUTE_UNROLL
    for (int i = 0; i < size(words); i++) words(i) = in[i * 128 + threadIdx.x];
    return a;
}

template <int HS, int R, int N>
__global__ void rows(float* out) {
    extern __shared__ __align__(1024) uint8_t shared[];
    auto mma = make_tiled_mma(RowsOp<N>{});
    auto thread = mma.get_slice(threadIdx.x);
    const auto first = make_coord(0, 0);
    auto a = local_tile(k_major<128, HS>(shared), Shape<_64, Int<HS>>{}, first);
    auto b = local_tile(k_major<R, HS>(shared + 128 * HS * 2), Shape<Int<N>, Int<HS>>{}, first);
    multiply<N>(mma, thread.make_fragment_A(thread.partition_A(a)), thread.make_fragment_B(thread.partition_B(b)),
                false, out);
}
template <int HS, int R, int N>
__global__ void rows_in_registers(float* out, const uint32_t* in) {
    extern __shared__ __align__(1024) uint8_t shared[];
    auto mma = make_tiled_mma(RowsRegistersOp<N>{});
    auto thread = mma.get_slice(threadIdx.x);
    auto b = local_tile(k_major<R, HS>(shared + 128 * HS * 2), Shape<Int<N>, Int<HS>>{}, make_coord(0, 0));
    multiply<N>(mma, registers_of<HS>(in), thread.make_fragment_B(thread.partition_B(b)), false, out);
}
template <int HS, int R, int kDepth, bool kAdd>
__global__ void tile(float* out, const uint32_t* in) {
    extern __shared__ __align__(1024) uint8_t shared[];
    auto mma = make_tiled_mma(TileOp<HS>{});
    auto thread = mma.get_slice(threadIdx.x);
    auto b = local_tile(mn_major<HS, R>(shared + 128 * HS * 2), Shape<Int<HS>, Int<kDepth>>{}, make_coord(0, 0));
    multiply<HS>(mma, registers_of<kDepth>(in), thread.make_fragment_B(thread.partition_B(b)), kAdd, out);
}
#else
#include "kernels/cuda/attention_sm90_tile.cuh"

template <int N, class Product>
__device__ void multiply(bool add, float* out, Product product) {
    float d[N / 2];
    SIMT_UNROLL
    for (int i = 0; i < N / 2; i++) d[i] = add ? out[i * 128 + threadIdx.x] : 0.0f;
    ptx::wgmma_fence();
    product(d);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_done(d);
    SIMT_UNROLL
    for (int i = 0; i < N / 2; i++) out[i * 128 + threadIdx.x] = d[i];
}
template <int kDepth>
__device__ void read_registers(uint32_t (&a)[kDepth / 16][4], const uint32_t* in) {
    SIMT_UNROLL
    for (int i = 0; i < kDepth / 4; i++) a[i / 4][i % 4] = in[i * 128 + threadIdx.x];
}

template <int HS, int R, int N>
__global__ void rows(float* out) {
    SIMT_DYN_SHARED(shared);
    multiply<N>(false, out,
                [&](float(&d)[N / 2]) { attention_sm90::multiply_rows<HS, R>(d, shared, shared + 128 * HS * 2); });
}
template <int HS, int R, int N>
__global__ void rows_in_registers(float* out, const uint32_t* in) {
    SIMT_DYN_SHARED(shared);
    uint32_t a[HS / 16][4];
    read_registers<HS>(a, in);
    multiply<N>(false, out,
                [&](float(&d)[N / 2]) { attention_sm90::multiply_rows<HS, R>(d, a, shared + 128 * HS * 2); });
}
template <int HS, int R, int kDepth, bool kAdd>
__global__ void tile(float* out, const uint32_t* in) {
    SIMT_DYN_SHARED(shared);
    uint32_t a[kDepth / 16][4];
    read_registers<kDepth>(a, in);
    multiply<HS>(kAdd, out, [&](float(&d)[HS / 2]) {
        attention_sm90::multiply_tile<HS, R, kDepth, kAdd>(d, a, shared + 128 * HS * 2);
    });
}
#endif

// Those of test_products.cu.
template __global__ void rows<64, 128, 64>(float*);
template __global__ void rows<64, 128, 128>(float*);
template __global__ void rows<128, 128, 64>(float*);
template __global__ void rows<128, 128, 128>(float*);
template __global__ void rows<128, 64, 64>(float*);
template __global__ void rows_in_registers<64, 64, 64>(float*, const uint32_t*);
template __global__ void tile<64, 128, 64, false>(float*, const uint32_t*);
template __global__ void tile<64, 128, 128, false>(float*, const uint32_t*);
template __global__ void tile<64, 128, 64, true>(float*, const uint32_t*);
template __global__ void tile<64, 128, 128, true>(float*, const uint32_t*);
template __global__ void tile<128, 128, 64, false>(float*, const uint32_t*);
template __global__ void tile<128, 128, 128, false>(float*, const uint32_t*);
template __global__ void tile<128, 128, 64, true>(float*, const uint32_t*);
template __global__ void tile<128, 128, 128, true>(float*, const uint32_t*);
template __global__ void tile<64, 64, 64, false>(float*, const uint32_t*);
template __global__ void tile<64, 64, 64, true>(float*, const uint32_t*);
template __global__ void tile<128, 64, 64, false>(float*, const uint32_t*);
template __global__ void tile<128, 64, 64, true>(float*, const uint32_t*);
