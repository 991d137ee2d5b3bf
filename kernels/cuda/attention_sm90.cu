// Causal self-attention for Hopper (compute capability 9.0): bf16, heads of 64 and 128.  The portable kernels in
// attention.cu compute the same, and also take dropout, fp32 and other heads.
//
//   forward    s_ij = q_i . k_j / sqrt(HS), j <= i     p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij)
//              y_i = sum_j p_ij v_j
//   backward   D_i = dy_i . y_i     ds_ij = p_ij (dy_i . v_j - D_i)
//              dv_j = sum_i p_ij dy_i     dk_j = sum_i ds_ij q_i / sqrt(HS)     dq_i = sum_j ds_ij k_j / sqrt(HS)
//
//   shapes     qkv, dqkv (B, T, 3, NH, HS)    y, dy (B, T, NH, HS)    lse, scratch (B, NH, T) f32
//   kernels    attention_sm90_forward.cuh; attention_sm90_backward.cuh: dq and D, then dk and dv
//   rounding   p and ds are rounded to bf16 before the products with v, dy, q and k; all else is fp32
//   traffic    TMA moves every tile straight from and to the packed layouts, from L2 except the first time; forward
//              reads k, v once per 128 queries; backward does too, and reads q, dy once per 128 keys.   bound: compute,
//              2 products forward and 7 backward.  A backward that adds up dq in memory, in a fixed order, needs 5;
//              which one is faster is not measured (docs/log.md)
//   work       persistent blocks, one per multiprocessor, take tiles of 128 rows in pairs of equal work; a warpgroup
//              has 64 of the rows and skips the keys that none of them sees: at T = 1024 6 % more scores than the
//              causal half
//   limits     any B, T, NH with B NH ceil(T/256) <= 2^30; tensors on 16-byte boundaries.  Shared memory: 225 KiB a
//              block at most
//   order      forward and dq from the diagonal down to key 0, dk and dv from the diagonal up; one thread writes each
//              element, once: the bits depend on no schedule and on no number of multiprocessors
#include "kernels/cuda/attention.h"
#include "kernels/cuda/launch.h"

#include "kernels/cuda/attention_sm90_backward.cuh"
#include "kernels/cuda/attention_sm90_forward.cuh"
#include "kernels/tensor_map.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace {
using attention_sm90::kBlock;
using attention_sm90::kThreads;
using attention_sm90::kTile;
using attention_sm90::Sizes;

// True for the calls that these kernels take.  The portable ones compute all others.
bool takes(DType real, int HS, const DropoutMask& dropout) {
    return real == DType::bf16 && is_fast_head(HS) && !(dropout.p > 0);
}

// The shapes of one call.
template <int HS>
struct Call {
    int B;
    Sizes a;
    Stream stream;

    Call(int batch, int T, int NH, Stream s)
        : B(batch), a{T, NH, (T - 1) / kTile + 1, batch * NH, 1 / std::sqrt(float(HS)), false, 0, 0}, stream(s) {
        CHECK_THAT(size_t(batch) * NH * ((a.tiles + 1) / 2) <= size_t(std::numeric_limits<int>::max() / 2),
                   "attention: B*NH*ceil(T/256) = {}*{}*{} pairs of tiles, more than 2^30", batch, NH,
                   (a.tiles + 1) / 2);
    }
    // A tensor (B, T, columns, HS) in boxes of `rows` tokens of one column.
    simt::TensorMap map(const Buf& b, int columns, int rows) const {
        const uint64_t token = uint64_t(columns) * HS * sizeof(bf16);
        const uint64_t dim[4] = {uint64_t(HS), uint64_t(columns), uint64_t(a.T), uint64_t(B)};
        const uint64_t stride[4] = {0, HS * sizeof(bf16), token, token * a.T};
        const uint32_t box[4] = {attention_sm90::kPanel, 1, uint32_t(rows), 1};
        return simt::make_tmap(b.as<bf16>(), sizeof(bf16), 4, dim, stride, box, true);
    }
    // One block per multiprocessor, or per tile where those are fewer.
    template <class... P, class... A>
    void launch(void (*kernel)(P...), size_t n_shared, A&&... arguments) const {
        const int n = cuda::n_multiprocessors(), pairs = (a.tiles + 1) / 2;  // of a head
        Sizes sizes = a;
        sizes.single = a.heads * pairs < 2 * n;
        sizes.items = a.heads * (sizes.single ? a.tiles : pairs);
        sizes.divisor = sizes.single ? a.heads : pairs;
        const dim3 grid(unsigned(std::min(sizes.items, n)));
        cuda::launch(kernel, grid, dim3(kThreads), n_shared, stream, std::forward<A>(arguments)..., sizes);
    }
};

template <int HS>
void forward(const Attention& p, Stream s) {
    const Call<HS> call(p.B, p.T, p.NH, s);
    call.launch(attention_sm90::attention_sm90_forward_kernel<HS>, attention_sm90::Forward<HS>::kShared,
                call.map(p.y, p.NH, kTile), call.map(p.qkv, 3 * p.NH, kTile), p.lse.as<float>());
}

template <int HS>
void backward(const AttentionGrad& p, Stream s) {
    const Call<HS> call(p.B, p.T, p.NH, s);
    float *lse = p.lse.as<float>(), *D = p.scratch.as<float>();  // (B, NH, T)
    const simt::TensorMap dqkv = call.map(p.dqkv, 3 * p.NH, kTile), tiles = call.map(p.qkv, 3 * p.NH, kTile),
                          blocks = call.map(p.qkv, 3 * p.NH, kBlock);
    call.launch(
        attention_sm90::attention_sm90_backward_queries_kernel<HS>, attention_sm90::Queries<HS>::kShared,
        attention_sm90::QueryMaps{
            .q = tiles, .dy = call.map(p.dy, p.NH, kTile), .y = call.map(p.y, p.NH, kTile), .key = blocks, .dq = dqkv},
        lse, D);
    call.launch(attention_sm90::attention_sm90_backward_keys_kernel<HS>, attention_sm90::Keys<HS>::kShared,
                attention_sm90::KeyMaps{.key = tiles, .query = blocks, .dy = call.map(p.dy, p.NH, kBlock), .dkv = dqkv},
                lse, D);
}
}  // namespace

namespace cuda {
void attention_sm90_forward(const Attention& a, Stream s) {
    if (!takes(a.qkv.dtype, a.HS, a.dropout)) return attention_forward(a, s);
    expect_aligned(a);
    if (a.qkv.count == 0) return;
    a.HS == 64 ? forward<64>(a, s) : forward<128>(a, s);
}

void attention_sm90_backward(const AttentionGrad& a, Stream s) {
    if (!takes(a.qkv.dtype, a.HS, a.dropout)) return attention_backward(a, s);
    expect_aligned(a);
    if (a.qkv.count == 0) return;
    a.HS == 64 ? backward<64>(a, s) : backward<128>(a, s);
}

std::string attention_sm90_refusal() {
    const int capability = open_capability();
    if (capability == 90) return "";
    return fmt::format("the sm90 kernels are for compute capability 9.0 alone, this GPU has {}.{}", capability / 10,
                       capability % 10);
}
}  // namespace cuda
