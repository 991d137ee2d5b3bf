// The bf16 forward kernel of attention.cu: one block per 128 queries of a head.
#pragma once
#include "kernels/cuda/attention_tile.cuh"

namespace attention {
struct ForwardTensors {
    bf16* y;          // (B, T, NH, HS)
    float* lse;       // (B, NH, T)
    const bf16* qkv;  // (B, T, 3, NH, HS)
};

// Shapes of the forward kernel for heads padded to W columns.  With two strips per warp each fragment of K and V read
// from shared memory feeds four products instead of two; with one strip shared memory would be the limit.
template <int W, bool kDrop>
struct ForwardShape {
    static constexpr int kStrips = kDrop ? 1 : 2, kRows = 16 * kStrips, kQueries = kRows * kWarps,
                         kKeys = W <= 64 ? 64 : 32;
    static constexpr bool kHoldQ = W <= 64;  // the sums of a wider head leave no registers for Q
    static constexpr size_t kBytes = size_t(kQueries + 4 * kKeys) * W * sizeof(bf16);
};

// Turns a warp's block of scores s into weights exp(s - m), and scales the sums so far to the new largest score m.
template <int S, int N, int W>
__device__ __forceinline__ void softmax_step(float (&s)[S][N / 8][4], float (&o)[S][W / 8][4], float (&m)[S][2],
                                             float (&l)[S][2], float scale_log2) {
    SIMT_UNROLL
    for (int i = 0; i < S; i++) {
        SIMT_UNROLL
        for (int half = 0; half < 2; half++) {
            float largest = m[i][half];
            SIMT_UNROLL
            for (int n = 0; n < N / 8; n++) largest = fmaxf(largest, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(device::kAllLanes, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(device::kAllLanes, largest, 2));
            const float kept = ptx::ex2((m[i][half] - largest) * scale_log2);  // 0 for the first block
            const float offset = largest * scale_log2;
            m[i][half] = largest;
            float sum = 0;
            SIMT_UNROLL
            for (int n = 0; n < N / 8; n++) {
                SIMT_UNROLL
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    s[i][n][e] = ptx::ex2(fmaf(s[i][n][e], scale_log2, -offset));
                    sum += s[i][n][e];
                }
            }
            l[i][half] = fmaf(l[i][half], kept, sum);
            SIMT_UNROLL
            for (int n = 0; n < W / 8; n++) o[i][n][2 * half] *= kept, o[i][n][2 * half + 1] *= kept;
        }
    }
}

template <int W, bool kDrop>
__global__ void __launch_bounds__(kThreads, 2) attention_forward_kernel(SIMT_PARAM ForwardTensors t, SIMT_PARAM Sizes a,
                                                                        SIMT_PARAM device::DropoutStream parameter) {
    using Shape = ForwardShape<W, kDrop>;
    constexpr int S = Shape::kStrips, kQueries = Shape::kQueries, kKeys = Shape::kKeys, kTile = kKeys * W;
    SIMT_DYN_SHARED(shared);
    bf16* q_tile = reinterpret_cast<bf16*>(shared);  // (kQueries, W)
    bf16* k_tiles = q_tile + kQueries * W;           // (2, kKeys, W)
    bf16* v_tiles = k_tiles + 2 * kTile;             // (2, kKeys, W)

    const Head at = head_of_block(a);
    const bf16* q = t.qkv + at.qkv;                     // (T, HS) in rows of at.in
    const Source<W> keys(q + at.out, at.in, a);         // of keys; values are at.out further
    const int q0 = (a.tiles - 1 - at.tile) * kQueries;  // the longest rows start first
    const int row0 = q0 + warp_id() * Shape::kRows;     // first query of the warp
    const int lane = lane_id();
    device::DropoutStream drop = parameter;
    if constexpr (kDrop) drop.read_where();

    Rows<S, W, Shape::kHoldQ> q_rows;
    float o[S][W / 8][4] = {}, m[S][2], l[S][2];  // of the lane's rows: sum f exp(s - m) v, largest s, sum exp(s - m)
    SIMT_UNROLL
    for (int i = 0; i < S; i++) {
        SIMT_UNROLL
        for (int half = 0; half < 2; half++) m[i][half] = -INFINITY, l[i][half] = 0;
    }

    Source<W>(q, at.in, a).template load<kQueries>(q_tile, q0);
    ptx::cp_async_commit();
    keys.template load<kKeys>(k_tiles, 0);
    keys.template load<kKeys>(v_tiles, 0, at.out);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    q_rows.take(q_tile + warp_id() * Shape::kRows * W);

    const int blocks = (min(q0 + kQueries, a.T) + kKeys - 1) / kKeys;
    const auto step = [&](int block, auto masked) {
        const int j0 = block * kKeys, stage = block % 2;
        ptx::cp_async_wait<0>();
        __syncthreads();  // this block has arrived, and nobody reads the other stage any more
        if (block + 1 < blocks) {
            keys.template load<kKeys>(k_tiles + (stage ^ 1) * kTile, j0 + kKeys);
            keys.template load<kKeys>(v_tiles + (stage ^ 1) * kTile, j0 + kKeys, at.out);
            ptx::cp_async_commit();
        }
        if (row0 >= a.T || j0 >= row0 + Shape::kRows) return;  // this block does not concern this warp
        [[maybe_unused]] uint32_t keep[S];
        if constexpr (kDrop) {
            SIMT_UNROLL
            for (int i = 0; i < S; i++) keep[i] = keep_bits<false, kKeys>(drop, at, row0 + 16 * i, j0, a.T);
        }
        float s[S][kKeys / 8][4] = {};
        add_rows_by_rows<S, kKeys, W>(s, q_rows, k_tiles, stage * kTile);
        if (masked) {  // keys from T on come after every query below T
            const int ahead = row0 + lane / 4 - (j0 + lane % 4 * 2);
            SIMT_UNROLL
            for (int i = 0; i < S; i++) {
                SIMT_UNROLL
                for (int n = 0; n < kKeys / 8; n++) {
                    SIMT_UNROLL
                    for (int e = 0; e < 4; e++)
                        if (8 * n + e % 2 - 16 * i - e / 2 * 8 > ahead) s[i][n][e] = -INFINITY;
                }
            }
        }
        softmax_step<S, kKeys, W>(s, o, m, l, a.scale * kLog2e);
        if constexpr (kDrop) {
            SIMT_UNROLL
            for (int i = 0; i < S; i++) {
                SIMT_UNROLL
                for (int n = 0; n < kKeys / 8; n++) {
                    SIMT_UNROLL
                    for (int e = 0; e < 4; e++)
                        if (!(keep[i] >> (4 * n + e) & 1)) s[i][n][e] = 0;
                }
            }
        }
        add_times_tile<S, kKeys, W>(o, s, v_tiles, stage * kTile);
    };
    const int whole = q0 / kKeys;  // blocks in which no query of the tile is masked
    int block = 0;
    if constexpr (W <= 64) {
        SIMT_NO_UNROLL
        for (; block < whole; block++) step(block, Always<false>());
        SIMT_NO_UNROLL
        for (; block < blocks; block++) step(block, Always<true>());
    } else {  // one loop: the wider sums leave no registers for two
        SIMT_NO_UNROLL
        for (; block < blocks; block++) step(block, block >= whole);
    }

    float factor[S][2];
    SIMT_UNROLL
    for (int i = 0; i < S; i++) {
        SIMT_UNROLL
        for (int half = 0; half < 2; half++) {
            float sum = l[i][half];
            sum += __shfl_xor_sync(device::kAllLanes, sum, 1);
            sum += __shfl_xor_sync(device::kAllLanes, sum, 2);
            const int row = row0 + 16 * i + 8 * half + lane / 4;
            if (lane % 4 == 0 && row < a.T) t.lse[at.stat + row] = m[i][half] * a.scale + logf(sum);
            factor[i][half] = (kDrop ? drop.scale : 1.0f) / sum;
        }
    }
    store_rows<S, W>(t.y + at.y, at.out, q_tile + warp_id() * Shape::kRows * W, o, factor, row0, a);
}
}  // namespace attention
