// The bf16 backward kernels of attention.cu: dk and dv by one block per 64 keys of a head, dq by one per 64 queries.
//
// Both kernels compute the weights anew from lse.  The first one transposes the scores (keys by queries), so that the
// weights and ds, as they lie in registers, are left operands of its sums over queries.  In the second one ds is a left
// operand of the sum over keys in the same way.
#pragma once
#include "kernels/cuda/attention_tile.cuh"

namespace attention {
struct BackwardTensors {
    bf16* dqkv;        // (B, T, 3, NH, HS)
    const bf16* dy;    // (B, T, NH, HS)
    const bf16* qkv;   // (B, T, 3, NH, HS)
    const float* lse;  // (B, NH, T)
    const float* D;    // (B, NH, T)  sum_c dy y
};

// Sizes for heads padded to W columns: the block's own rows, and the rows that stream past.  kHold: the own rows stay
// in registers too.  kBlocks: how many blocks share the registers of a multiprocessor.
template <int W, bool kDrop>
struct KeyShape {
    static constexpr int kKeys = 16 * kWarps, kQueries = W <= 64 ? 64 : kDrop ? 16 : 32, kBlocks = 2;
    static constexpr bool kHold = W <= 64 && !kDrop;
    static constexpr size_t kBytes =
        size_t(2 * kKeys + 4 * kQueries) * W * sizeof(bf16) + size_t(4 * kQueries) * sizeof(float);
};
template <int W, bool kDrop>
struct QueryShape {
    static constexpr int kQueries = 16 * kWarps, kKeys = W <= 64 ? 64 : 32, kBlocks = W <= 64 && !kDrop ? 3 : 2;
    static constexpr size_t kBytes = size_t(2 * kQueries + 4 * kKeys) * W * sizeof(bf16);
};

template <int W, bool kDrop>
__global__ void __launch_bounds__(kThreads, KeyShape<W, kDrop>::kBlocks)
    attention_backward_keys_kernel(SIMT_PARAM BackwardTensors t, SIMT_PARAM Sizes a,
                                   SIMT_PARAM device::DropoutStream parameter) {
    using Shape = KeyShape<W, kDrop>;
    constexpr int kKeys = Shape::kKeys, kQueries = Shape::kQueries, kTile = kQueries * W;
    SIMT_DYN_SHARED(shared);
    bf16* k_tile = reinterpret_cast<bf16*>(shared);                 // (kKeys, W)
    bf16* v_tile = k_tile + kKeys * W;                              // (kKeys, W)
    bf16* q_tiles = v_tile + kKeys * W;                             // (2, kQueries, W)
    bf16* dy_tiles = q_tiles + 2 * kTile;                           // (2, kQueries, W)
    float* stats = reinterpret_cast<float*>(dy_tiles + 2 * kTile);  // (2, 2, kQueries): lse log2(e); D

    const Head at = head_of_block(a);
    const bf16* head = t.qkv + at.qkv;  // (T, HS) in rows of at.in
    const Source<W> q(head, at.in, a), dy(t.dy + at.y, at.out, a);
    const int j0 = at.tile * kKeys, row0 = j0 + 16 * warp_id();  // first key of the block, of the warp
    const int lane = lane_id(), thread = int(threadIdx.x);
    device::DropoutStream drop = parameter;
    if constexpr (kDrop) drop.read_where();

    Rows<1, W, Shape::kHold> k_rows, v_rows;
    float dk[1][W / 8][4] = {}, dv[1][W / 8][4] = {};

    // A query past the end has lse = infinity: all its weights are 0.
    const auto stat_of = [&](int i0) {
        const int i = i0 + thread % kQueries;
        if (thread < kQueries) return i < a.T ? t.lse[at.stat + i] * kLog2e : INFINITY;
        return i < a.T ? t.D[at.stat + i] : 0.0f;
    };
    const auto load_queries = [&](int i0, int stage) {
        q.template load<kQueries>(q_tiles + stage * kTile, i0);
        dy.template load<kQueries>(dy_tiles + stage * kTile, i0);
        ptx::cp_async_commit();
    };
    const int first = j0 / kQueries, blocks = (a.T + kQueries - 1) / kQueries;
    Source<W>(head + at.out, at.in, a).template load<kKeys>(k_tile, j0);
    Source<W>(head + 2 * at.out, at.in, a).template load<kKeys>(v_tile, j0);
    ptx::cp_async_commit();
    load_queries(first * kQueries, first % 2);
    if (thread < 2 * kQueries) stats[first % 2 * 2 * kQueries + thread] = stat_of(first * kQueries);
    ptx::cp_async_wait<1>();
    __syncthreads();
    k_rows.take(k_tile + 16 * warp_id() * W);
    v_rows.take(v_tile + 16 * warp_id() * W);

    const auto compute = [&](int i0, int stage, auto masked) {
        if (row0 >= a.T || i0 + kQueries <= row0) return;  // this block does not concern this warp
        const int tile = stage * kTile;
        const float* stat = stats + stage * 2 * kQueries;
        const int ahead = i0 + lane % 4 * 2 - (row0 + lane / 4);  // the lane's first query minus its first key
        float p[1][kQueries / 8][4] = {};                         // scores, then weights; keys by queries
        add_rows_by_rows<1, kQueries, W>(p, k_rows, q_tiles, tile);
        SIMT_UNROLL
        for (int n = 0; n < kQueries / 8; n++) {
            const float2 lse = simt::ld_vec<float2>(stat + 8 * n + lane % 4 * 2);
            SIMT_UNROLL
            for (int e = 0; e < 4; e++) {
                p[0][n][e] = ptx::ex2(fmaf(p[0][n][e], a.scale * kLog2e, -(e % 2 ? lse.y : lse.x)));
                if (masked && e / 2 * 8 - 8 * n - e % 2 > ahead) p[0][n][e] = 0;
            }
        }
        [[maybe_unused]] uint32_t keep = 0;
        if constexpr (kDrop) keep = keep_bits<true, kQueries>(drop, at, i0, row0, a.T);
        float ds[1][kQueries / 8][4] = {};  // dy . v, then ds
        add_rows_by_rows<1, kQueries, W>(ds, v_rows, dy_tiles, tile);
        SIMT_UNROLL
        for (int n = 0; n < kQueries / 8; n++) {
            const float2 D = simt::ld_vec<float2>(stat + kQueries + 8 * n + lane % 4 * 2);
            SIMT_UNROLL
            for (int e = 0; e < 4; e++) {
                const float weight = p[0][n][e];
                float product = ds[0][n][e];
                if constexpr (kDrop) {
                    const float factor = keep >> (4 * n + e) & 1 ? drop.scale : 0.0f;
                    p[0][n][e] = weight * factor;
                    product *= factor;
                }
                ds[0][n][e] = weight * (product - (e % 2 ? D.y : D.x));
            }
        }
        add_times_tile<1, kQueries, W>(dv, p, dy_tiles, tile);
        add_times_tile<1, kQueries, W>(dk, ds, q_tiles, tile);
    };
    const auto step = [&](int block, auto masked) {
        const int i0 = block * kQueries, stage = block % 2;
        ptx::cp_async_wait<0>();
        __syncthreads();  // this block has arrived, and nobody reads the other stage any more
        const bool more = block + 1 < blocks;
        float next = 0;
        if (more) {
            load_queries(i0 + kQueries, stage ^ 1);
            if (thread < 2 * kQueries) next = stat_of(i0 + kQueries);  // stored below, when it has arrived
        }
        compute(i0, stage, masked);
        if (more && thread < 2 * kQueries) stats[(stage ^ 1) * 2 * kQueries + thread] = next;
    };
    int block = first;
    SIMT_NO_UNROLL
    for (; block < min(blocks, (j0 + kKeys) / kQueries); block++) step(block, Always<true>());
    SIMT_NO_UNROLL
    for (; block < blocks; block++) step(block, Always<false>());

    const float one[1][2] = {{1, 1}}, scale[1][2] = {{a.scale, a.scale}};
    bf16* out = t.dqkv + at.qkv;  // (T, HS) in rows of at.in
    store_rows<1, W>(out + at.out, at.in, k_tile + 16 * warp_id() * W, dk, scale, row0, a);
    store_rows<1, W>(out + 2 * at.out, at.in, v_tile + 16 * warp_id() * W, dv, one, row0, a);
}

template <int W, bool kDrop>
__global__ void __launch_bounds__(kThreads, QueryShape<W, kDrop>::kBlocks)
    attention_backward_queries_kernel(SIMT_PARAM BackwardTensors t, SIMT_PARAM Sizes a,
                                      SIMT_PARAM device::DropoutStream parameter) {
    using Shape = QueryShape<W, kDrop>;
    constexpr int kKeys = Shape::kKeys, kQueries = Shape::kQueries, kTile = kKeys * W;
    SIMT_DYN_SHARED(shared);
    bf16* q_tile = reinterpret_cast<bf16*>(shared);  // (kQueries, W)
    bf16* dy_tile = q_tile + kQueries * W;           // (kQueries, W)
    bf16* k_tiles = dy_tile + kQueries * W;          // (2, kKeys, W)
    bf16* v_tiles = k_tiles + 2 * kTile;             // (2, kKeys, W)

    const Head at = head_of_block(a);
    const bf16* q = t.qkv + at.qkv;                          // (T, HS) in rows of at.in
    const Source<W> keys(q + at.out, at.in, a);              // of keys; values are at.out further
    const int q0 = (a.tiles - 1 - at.tile) * kQueries;       // the longest rows start first
    const int row0 = q0 + 16 * warp_id(), lane = lane_id();  // first query of the warp
    device::DropoutStream drop = parameter;
    if constexpr (kDrop) drop.read_where();

    Source<W>(q, at.in, a).template load<kQueries>(q_tile, q0);
    Source<W>(t.dy + at.y, at.out, a).template load<kQueries>(dy_tile, q0);
    keys.template load<kKeys>(k_tiles, 0);
    keys.template load<kKeys>(v_tiles, 0, at.out);
    ptx::cp_async_commit();

    Rows<1, W, false> q_rows, dy_rows;         // not held: that leaves registers for a third block
    float dq[1][W / 8][4] = {}, lse[2], D[2];  // of the lane's two rows; lse log2(e)
    SIMT_UNROLL
    for (int half = 0; half < 2; half++) {
        const int i = row0 + 8 * half + lane / 4;
        lse[half] = i < a.T ? t.lse[at.stat + i] * kLog2e : INFINITY;
        D[half] = i < a.T ? t.D[at.stat + i] : 0.0f;
    }
    q_rows.take(q_tile + 16 * warp_id() * W);
    dy_rows.take(dy_tile + 16 * warp_id() * W);
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
        if (row0 >= a.T || j0 >= row0 + 16) return;  // this block does not concern this warp
        const int tile = stage * kTile, ahead = row0 + lane / 4 - (j0 + lane % 4 * 2);
        [[maybe_unused]] uint32_t keep = 0;
        if constexpr (kDrop) keep = keep_bits<false, kKeys>(drop, at, row0, j0, a.T);
        float p[1][kKeys / 8][4] = {}, ds[1][kKeys / 8][4] = {};  // scores, then weights; dy . v, then ds
        add_rows_by_rows<1, kKeys, W>(p, q_rows, k_tiles, tile);
        add_rows_by_rows<1, kKeys, W>(ds, dy_rows, v_tiles, tile);
        SIMT_UNROLL
        for (int n = 0; n < kKeys / 8; n++) {
            SIMT_UNROLL
            for (int e = 0; e < 4; e++) {
                const float weight = ptx::ex2(fmaf(p[0][n][e], a.scale * kLog2e, -lse[e / 2]));
                const float factor = !kDrop ? 1.0f : keep >> (4 * n + e) & 1 ? drop.scale : 0.0f;
                ds[0][n][e] = weight * (ds[0][n][e] * factor - D[e / 2]);
                if (masked && 8 * n + e % 2 - e / 2 * 8 > ahead) ds[0][n][e] = 0;
            }
        }
        add_times_tile<1, kKeys, W>(dq, ds, k_tiles, tile);
    };
    int block = 0;
    SIMT_NO_UNROLL
    for (; block < q0 / kKeys; block++) step(block, Always<false>());
    SIMT_NO_UNROLL
    for (; block < blocks; block++) step(block, Always<true>());

    const float scale[1][2] = {{a.scale, a.scale}};
    store_rows<1, W>(t.dqkv + at.qkv, at.in, q_tile + 16 * warp_id() * W, dq, scale, row0, a);
}
}  // namespace attention
