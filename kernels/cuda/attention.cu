// Causal self-attention with a streaming softmax: no T x T matrix in memory.  The FlashAttention-2 design for every GPU
// from compute capability 8.0 on, and plain kernels for fp32.
//
//   forward    s_ij = q_i . k_j / sqrt(HS), j <= i     p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij)
//              y_i = sum_j f_ij p_ij v_j               f_ij = 0 or 1/(1-p): dropout, 1 without it
//   backward   D_i = dy_i . y_i     t_ij = dy_i . v_j     ds_ij = p_ij (f_ij t_ij - D_i)
//              dv_j = sum_i f_ij p_ij dy_i     dk_j = sum_i ds_ij q_i / sqrt(HS)     dq_i = sum_j ds_ij k_j / sqrt(HS)
//
//   shapes     qkv, dqkv (B, T, 3, NH, HS)    y, dy (B, T, NH, HS)    lse, scratch (B, NH, T) f32
//   kernels    bf16: attention_forward.cuh, attention_backward.cuh (D; then dk, dv; then dq).  fp32: attention_fp32.cuh
//   rounding   bf16: f p and ds are rounded to bf16 before the products with v, dy, q and k; all else is fp32
//   traffic    forward reads q once and k, v once per tile of 128 queries; backward reads q, dy once per 64 keys and k,
//              v once per 64 queries, mostly from L2.   bound: compute; 2 products forward, 7 backward: sums of dq by
//              atomics would save two, but differ from run to run
//   tiles      a tile of rows stays, tiles of the other side stream through two stages of shared memory by cp.async:
//              one barrier per tile.  Only tiles that meet the diagonal are masked; tiles beyond it are never read.
//   limits     bf16: HS a multiple of 8 up to 128 (compiled for 32, 64 and 128, the rest of a tile is zeros), tensors
//              on 16-byte boundaries.  fp32: HS up to kMaxFp32Head.  Any B, T, NH; B NH ceil(T/64) < 2^31 blocks.
//              Shared memory: 65 KiB a block at most; GPUs 8.6 and 8.9 have the least, 99 KiB.
//   order      every sum in the order of its tiles, ascending; nothing depends on the number of multiprocessors
#include "kernels/cuda/attention.h"
#include "kernels/cuda/launch.h"

#include "kernels/cuda/attention_backward.cuh"
#include "kernels/cuda/attention_forward.cuh"
#include "kernels/cuda/attention_fp32.cuh"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace {
using attention::Sizes;

// The shapes of one call, and its dropout.
struct Call {
    int B;
    Sizes a;
    device::DropoutStream drop;
    Stream stream;

    // One block per `rows` rows of each head.
    template <class Kernel, class Tensors>
    void launch(Kernel* kernel, int rows, int threads, size_t n_shared, const Tensors& tensors) const {
        Sizes sizes = a;
        sizes.tiles = (a.T - 1) / rows + 1;
        const size_t blocks = size_t(B) * a.NH * sizes.tiles;
        CHECK_THAT(blocks < (size_t(1) << 31), "attention: B*NH*ceil(T/{}) = {} blocks, more than a grid has", rows,
                   blocks);
        cuda::launch(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), n_shared, stream, tensors, sizes, drop);
    }
};
Call call_of(int B, int T, int NH, int HS, const DropoutMask& mask, Stream s) {
    return {B, {T, NH, HS, 0, 1 / std::sqrt(float(HS))}, device::dropout_stream(mask), s};
}

void expect_bf16_head(int HS) {
    if (HS % 8 == 0 && HS <= 128) return;
    fail(Exit::usage,
         "model.n_embd / model.n_head = {} is a head size that attention in bf16 cannot have on a GPU: it must be a "
         "multiple of 8, at most 128; change model.n_head or model.n_embd, or set device.dtype to fp32",
         HS);
}
// f.operator()<W, dropout>(): W is the compiled head size that HS is padded to.
template <class F>
void with_shape(int HS, bool dropout, F&& f) {
    const auto width = [&]<int W>() { dropout ? f.template operator()<W, true>() : f.template operator()<W, false>(); };
    if (HS <= 32)
        width.template operator()<32>();
    else if (HS <= 64)
        width.template operator()<64>();
    else
        width.template operator()<128>();
}

constexpr size_t kFp32Shared = 48 * 1024;  // of a block, without asking the driver for more
constexpr int kMaxFp32Head =
    (kFp32Shared / sizeof(float) - attention::fp32_backward_floats(0)) / 4;  // 4 HS + 64 floats

// One warp per row, in blocks of as many warps as shared memory allows.
template <class Kernel>
void launch_fp32(const Call& call, Kernel* kernel, size_t n_floats, const attention::Fp32Tensors& t) {
    if (call.a.HS > kMaxFp32Head)
        fail(Exit::usage,
             "model.n_embd / model.n_head = {} is too large a head size for attention on a GPU: at most {}", call.a.HS,
             kMaxFp32Head);
    const size_t n_bytes = n_floats * sizeof(float);
    const int warps = int(std::min(kFp32Shared / n_bytes, size_t(attention::kWarps)));
    call.launch(kernel, warps, 32 * warps, size_t(warps) * n_bytes, t);
}
}  // namespace

namespace cuda {
void attention_forward(const Attention& a, Stream s) {
    if (a.qkv.dtype == DType::bf16) expect_aligned(a);
    const Call call = call_of(a.B, a.T, a.NH, a.HS, a.dropout, s);
    if (a.qkv.count == 0) return;
    with_real(a.qkv.dtype, [&]<class T>() {
        if constexpr (std::is_same_v<T, float>) {
            launch_fp32(call, attention::attention_fp32_forward_kernel, attention::fp32_forward_floats(a.HS),
                        {.y = a.y.as<float>(), .lse = a.lse.as<float>(), .qkv = a.qkv.as<float>()});
        } else {
            expect_bf16_head(a.HS);
            const attention::ForwardTensors t = {a.y.as<bf16>(), a.lse.as<float>(), a.qkv.as<bf16>()};
            with_shape(a.HS, call.drop.on(), [&]<int W, bool kDrop>() {
                using Shape = attention::ForwardShape<W, kDrop>;
                call.launch(attention::attention_forward_kernel<W, kDrop>, Shape::kQueries, attention::kThreads,
                            Shape::kBytes, t);
            });
        }
    });
}

void attention_backward(const AttentionGrad& a, Stream s) {
    if (a.qkv.dtype == DType::bf16) expect_aligned(a);
    const Call call = call_of(a.B, a.T, a.NH, a.HS, a.dropout, s);
    if (a.qkv.count == 0) return;
    float *lse = a.lse.as<float>(), *D = a.scratch.as<float>();  // (B, NH, T)
    with_real(a.qkv.dtype, [&]<class T>() {
        constexpr bool kFp32 = std::is_same_v<T, float>;
        if constexpr (!kFp32) expect_bf16_head(a.HS);
        const size_t rows = size_t(a.B) * a.T * a.NH;
        constexpr auto sums = attention::attention_backward_sums_kernel<T, (kFp32 ? 1 : 8)>;
        cuda::launch(sums, dim3(blocks_for(rows, attention::kThreads / 8)), dim3(attention::kThreads), 0, s, D,
                     a.dy.as<T>(), a.y.as<T>(), rows, a.T, a.NH, a.HS);
        if constexpr (kFp32) {
            const attention::Fp32Tensors t = {.y = a.y.as<float>(),
                                              .lse = lse,
                                              .qkv = a.qkv.as<float>(),
                                              .dqkv = a.dqkv.as<float>(),
                                              .dy = a.dy.as<float>(),
                                              .D = D};
            const size_t n_floats = attention::fp32_backward_floats(a.HS);
            launch_fp32(call, attention::attention_fp32_backward_keys_kernel, n_floats, t);
            launch_fp32(call, attention::attention_fp32_backward_queries_kernel, n_floats, t);
        } else {
            const attention::BackwardTensors t = {a.dqkv.as<bf16>(), a.dy.as<bf16>(), a.qkv.as<bf16>(), lse, D};
            with_shape(a.HS, call.drop.on(), [&]<int W, bool kDrop>() {
                using Keys = attention::KeyShape<W, kDrop>;
                using Queries = attention::QueryShape<W, kDrop>;
                call.launch(attention::attention_backward_keys_kernel<W, kDrop>, Keys::kKeys, attention::kThreads,
                            Keys::kBytes, t);
                call.launch(attention::attention_backward_queries_kernel<W, kDrop>, Queries::kQueries,
                            attention::kThreads, Queries::kBytes, t);
            });
        }
    });
}
}  // namespace cuda
