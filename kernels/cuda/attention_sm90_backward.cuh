// The backward kernels of attention_sm90.cu: dq by tiles of 128 queries, then dk and dv by tiles of 128 keys.  Each
// element is written once, by one thread: nothing is added up in memory, and the bits are the same every time.
//
// Blocks of 64 rows of the other side stream past.  A warpgroup's 64 rows begin at a block, so that its first block
// lies on the diagonal, every later block is unmasked, and one block per tile concerns only one of the two warpgroups.
#pragma once
#include "kernels/cuda/attention_sm90_tile.cuh"

namespace attention_sm90 {
constexpr int kBlock = 64;  // rows that stream past at a time

// The shared memory of both kernels: kOperands tiles that stay until results take their place, and pairs of blocks that
// stream past.  kStats: floats that come with a pair.
template <int HS, int kOperands, int kStats>
struct Backward {
    static constexpr int kOwn = HS == 64 ? 2 : 1, kStages = 4;  // buffers of tiles, of blocks
    static constexpr bool kHeld = HS == 64;  // left operands of the products of rows stay in registers
    static constexpr int kTileBytes = kBytes<HS>(kTile), kBlockBytes = kBytes<HS>(kBlock);

    struct Barriers {
        Buffers<kOwn> own;
        uint64_t ready[kOwn];  // results have replaced operands
        Buffers<kStages> pair;
    };
    static constexpr size_t kShared =
        kOwn * kOperands * kTileBytes + kStages * 2 * kBlockBytes + kStages * kStats * sizeof(float) + sizeof(Barriers);

    static_assert(kShared <= kMaxShared);

    uint8_t* tiles;   // (kOwn, kOperands, kTile, HS) bf16, in panels
    uint8_t* blocks;  // (kStages, 2, kBlock, HS) likewise
    float* stats;     // (kStages, kStats)
    Barriers* barriers;
    const Sizes& a;

    __device__ __forceinline__ Backward(uint8_t* shared, const Sizes& sizes)
        : tiles(shared),
          blocks(tiles + kOwn * kOperands * kTileBytes),
          stats(reinterpret_cast<float*>(blocks + kStages * 2 * kBlockBytes)),
          barriers(reinterpret_cast<Barriers*>(stats + kStages * kStats)),
          a(sizes) {}

    __device__ __forceinline__ void init() const {
        barriers->own.init(1, 1);
        barriers->pair.init(kStats > 0 ? 2 : 1, kConsumerWarps);
        for (uint64_t& b : barriers->ready) ptx::mbar_init(&b, kConsumerWarps);
        ptx::fence_mbarrier_init();
    }
    __device__ __forceinline__ uint8_t* tile(int buffer, int operand) const {
        return tiles + (buffer * kOperands + operand) * kTileBytes;
    }
    __device__ __forceinline__ uint8_t* block(int stage, int operand) const {
        return blocks + (stage * 2 + operand) * kBlockBytes;
    }
    __device__ __forceinline__ void expect_tiles(const Ring<kOwn>& own) const {
        barriers->own.wait_empty(own);
        ptx::mbar_arrive_expect_tx(&barriers->own.full[own.at()], kOperands * kTileBytes);
    }
    __device__ __forceinline__ void expect_pair(const Ring<kStages>& pair) const {
        barriers->pair.wait_empty(pair);
        ptx::mbar_arrive_expect_tx(&barriers->pair.full[pair.at()], 2 * kBlockBytes);
    }
    // Skips a block that concerns only the other warpgroup.
    __device__ __forceinline__ void pass(Ring<kStages>& pair) const {
        barriers->pair.wait_full(pair);
        barriers->pair.give_back(pair);
        pair.advance();
    }
};

// d (64, kBlock) = the warpgroup's rows, held in registers or read from their tile, times a block's rows.
template <int HS, bool kHeld>
struct LeftRows {
    uint32_t held[kHeld ? HS / 16 : 1][4];
    const uint8_t* rows;
    __device__ __forceinline__ void take(const uint8_t* from) {
        rows = from;
        if constexpr (kHeld) read_rows<HS>(held, from);
    }
    __device__ __forceinline__ void start(float (&d)[kBlock / 2], const uint8_t* block) {
        ptx::wgmma_done(d);
        if constexpr (kHeld) ptx::wgmma_done(held);
        ptx::wgmma_fence();
        if constexpr (kHeld)
            multiply_rows<HS, kBlock>(d, held, block);
        else
            multiply_rows<HS, kBlock>(d, rows, block);
        ptx::wgmma_commit();
    }
};
// d (64, HS) = or += a (64, kBlock) times a block.
template <int HS, bool kAdd>
__device__ __forceinline__ void start_sum(float (&d)[HS / 2], uint32_t (&a)[kBlock / 16][4], const uint8_t* block) {
    if constexpr (kAdd) ptx::wgmma_done(d);
    ptx::wgmma_done(a);
    ptx::wgmma_fence();
    multiply_tile<HS, kBlock, kBlock, kAdd>(d, a, block);
    ptx::wgmma_commit();
}

// Runs step<first>() for each of n >= 1 blocks.
template <class Step>
__device__ __forceinline__ void for_blocks(int n, Step step) {
    step.template operator()<true>();
    SIMT_NO_UNROLL
    for (int i = 1; i < n; i++) step.template operator()<false>();
}

// ---- dq, and D for the other kernel

template <int HS>
using Queries = Backward<HS, 3, 0>;  // tiles of q, dy and y; blocks of k and v

struct QueryMaps {
    simt::TensorMap q;      // qkv (B, T, 3 NH, HS) in boxes of kTile rows
    simt::TensorMap dy, y;  // (B, T, NH, HS) likewise
    simt::TensorMap key;    // qkv in boxes of kBlock rows
    simt::TensorMap dq;     // dqkv (B, T, 3 NH, HS) in boxes of kTile rows
};

template <int HS>
__device__ __forceinline__ void load_queries(const Queries<HS>& s, const QueryMaps& maps) {
    TileQueue queue(s.a, true);
    Ring<Queries<HS>::kOwn> own;
    Ring<Queries<HS>::kStages> pair;
    for (Tile t; queue.next(t); own.advance()) {
        s.expect_tiles(own);
        uint64_t* full = &s.barriers->own.full[own.at()];
        load_tile<HS, kTile>(s.tile(own.at(), 0), &maps.q, full, t.h, t.number * kTile, t.b);
        load_tile<HS, kTile>(s.tile(own.at(), 1), &maps.dy, full, t.h, t.number * kTile, t.b);
        load_tile<HS, kTile>(s.tile(own.at(), 2), &maps.y, full, t.h, t.number * kTile, t.b);
        for (int j = t.number * kConsumers + kConsumers - 1; j >= 0; j--, pair.advance()) {
            s.expect_pair(pair);
            full = &s.barriers->pair.full[pair.at()];
            load_tile<HS, kBlock>(s.block(pair.at(), 0), &maps.key, full, s.a.NH + t.h, j * kBlock, t.b);
            load_tile<HS, kBlock>(s.block(pair.at(), 1), &maps.key, full, 2 * s.a.NH + t.h, j * kBlock, t.b);
        }
    }
}

// sum = dot products of rows of x and y: for the lane's two rows, the same in all lanes that share these rows.
template <int N>
__device__ __forceinline__ void dot_rows(float (&sum)[2], const uint32_t (&x)[N][4], const uint32_t (&y)[N][4]) {
    sum[0] = sum[1] = 0;
    SIMT_UNROLL
    for (int k = 0; k < N; k++) {
        SIMT_UNROLL
        for (int i = 0; i < 4; i++) {
            const float2 a = ptx::unpack_bf16(x[k][i]), b = ptx::unpack_bf16(y[k][i]);
            sum[i % 2] = fmaf(a.x, b.x, fmaf(a.y, b.y, sum[i % 2]));
        }
    }
    sum[0] = row_sum(sum[0]), sum[1] = row_sum(sum[1]);
}

template <int HS, int group>
__device__ __forceinline__ void query_gradients(const Queries<HS>& s, const float* lse_of, float* D_of) {
    using Q = Queries<HS>;
    const Sizes& a = s.a;
    const int lane = lane_id(), row = 16 * warp_in_group() + lane / 4;
    const float scale_log2 = a.scale * kLog2e;

    LeftRows<HS, Q::kHeld> q, dy;
    float p[kBlock / 2];          // (64, kBlock) scores, then weights
    float products[kBlock / 2];   // (64, kBlock) dy . v, then ds
    uint32_t ds[kBlock / 16][4];  // (64, kBlock) as left operands
    float dq[HS / 2];             // (64, HS)
    TileQueue queue(a, true);
    Ring<Q::kOwn> own;
    Ring<Q::kStages> before, now;  // the pair whose product with ds runs; the pair whose scores are computed
    for (Tile t; queue.next(t); own.advance()) {
        float lse[2], D[2];  // of the lane's rows; lse log2(e)
        SIMT_UNROLL
        for (int half = 0; half < 2; half++) {  // a query past the end: all its weights are 0
            const int i = t.number * kTile + group * kRows + row + 8 * half;
            lse[half] = i < a.T ? lse_of[size_t(t.head) * a.T + i] * kLog2e : INFINITY;
        }
        s.barriers->own.wait_full(own);
        const int rows = group * kRows * 128;  // bytes before the warpgroup's rows in a panel
        if (group == 0) s.pass(now);
        before = now;
        q.take(s.tile(own.at(), 0) + rows);
        dy.take(s.tile(own.at(), 1) + rows);
        {
            uint32_t x[HS / 16][4], y[HS / 16][4];
            read_rows<HS>(x, s.tile(own.at(), 1) + rows);
            read_rows<HS>(y, s.tile(own.at(), 2) + rows);
            dot_rows(D, x, y);
        }
        SIMT_UNROLL
        for (int half = 0; half < 2; half++) {
            const int i = t.number * kTile + group * kRows + row + 8 * half;
            if (lane % 4 == 0 && i < a.T) D_of[size_t(t.head) * a.T + i] = D[half];
        }

        for_blocks(t.number * kConsumers + group + 1, [&]<bool kFirst>() {
            s.barriers->pair.wait_full(now);
            q.start(p, s.block(now.at(), 0));
            dy.start(products, s.block(now.at(), 1));
            ptx::wgmma_wait<1>();
            ptx::wgmma_done(p);
            if (!kFirst) {
                s.barriers->pair.give_back(before);
                before.advance();
            }
            SIMT_UNROLL
            for (int i = 0; i < kBlock / 2; i++) {
                p[i] = ptx::ex2(fmaf(p[i], scale_log2, -lse[i / 2 % 2]));
                if (kFirst && i / 4 * 8 + lane % 4 * 2 + i % 2 > row + i / 2 % 2 * 8) p[i] = 0;
            }
            ptx::wgmma_wait<0>();
            ptx::wgmma_done(products), ptx::wgmma_done(ds);
            SIMT_UNROLL
            for (int i = 0; i < kBlock / 2; i++) products[i] = p[i] * (products[i] - D[i / 2 % 2]);
            pack(ds, products);
            start_sum<HS, !kFirst>(dq, ds, s.block(now.at(), 0));
            now.advance();
        });
        ptx::wgmma_wait<0>();
        ptx::wgmma_done(dq), ptx::wgmma_done(ds);
        s.barriers->pair.give_back(before);

        const float factor[2] = {a.scale, a.scale};
        ptx::bar_sync(1 + group, kGroup);  // no warp of the group reads q any more: dq takes its place
        write_rows<HS>(s.tile(own.at(), 0) + rows, dq, factor);
        announce_results(&s.barriers->ready[own.at()]);
    }
}

template <int HS>
__global__ void __launch_bounds__(kThreads, 1)
    attention_sm90_backward_queries_kernel(SIMT_PARAM QueryMaps maps, const float* lse,  // (B, NH, T)
                                           float* D,  // (B, NH, T)  out  =  sum_c dy y
                                           SIMT_PARAM Sizes a) {
    SIMT_DYN_SHARED(shared);
    const Queries<HS> s(shared, a);
    if (threadIdx.x == 0) s.init();
    __syncthreads();
    const int group = group_id();
    if (group == 0) {
        ptx::setmaxnreg_dec<Registers<40>::kProducer>();
        if (warp_in_group() == 0 && ptx::elect_one()) load_queries(s, maps);
        if (warp_in_group() == 1 && ptx::elect_one())
            store_results(TileQueue(a, true), s.barriers->own, s.barriers->ready, [&](const Tile& t, int at) {
                store_tile<HS>(&maps.dq, s.tile(at, 0), t.h, t.number * kTile, t.b);
            });
    } else {
        ptx::setmaxnreg_inc<Registers<40>::kConsumer>();
        if (group == 1)
            query_gradients<HS, 0>(s, lse, D);
        else
            query_gradients<HS, 1>(s, lse, D);
    }
}

// ---- dk and dv

template <int HS>
using Keys = Backward<HS, 2, 2 * kBlock>;  // tiles of k and v; blocks of q and dy with lse log2(e) and D of the queries

struct KeyMaps {
    simt::TensorMap key;        // qkv (B, T, 3 NH, HS) in boxes of kTile rows
    simt::TensorMap query, dy;  // qkv; (B, T, NH, HS); in boxes of kBlock rows
    simt::TensorMap dkv;        // dqkv (B, T, 3 NH, HS) in boxes of kTile rows
};

// Blocks of queries from the first one that sees the tile to the end of the last tile.
__device__ __forceinline__ int first_block(const Tile& t) { return t.number * kConsumers; }
__device__ __forceinline__ int end_block(const Sizes& a) { return a.tiles * kConsumers; }

template <int HS>
__device__ __forceinline__ void load_keys(const Keys<HS>& s, const KeyMaps& maps) {
    TileQueue queue(s.a, false);
    Ring<Keys<HS>::kOwn> own;
    Ring<Keys<HS>::kStages> pair;
    for (Tile t; queue.next(t); own.advance()) {
        s.expect_tiles(own);
        uint64_t* full = &s.barriers->own.full[own.at()];
        load_tile<HS, kTile>(s.tile(own.at(), 0), &maps.key, full, s.a.NH + t.h, t.number * kTile, t.b);
        load_tile<HS, kTile>(s.tile(own.at(), 1), &maps.key, full, 2 * s.a.NH + t.h, t.number * kTile, t.b);
        for (int i = first_block(t); i < end_block(s.a); i++, pair.advance()) {
            s.expect_pair(pair);
            full = &s.barriers->pair.full[pair.at()];
            load_tile<HS, kBlock>(s.block(pair.at(), 0), &maps.query, full, t.h, i * kBlock, t.b);
            load_tile<HS, kBlock>(s.block(pair.at(), 1), &maps.dy, full, t.h, i * kBlock, t.b);
        }
    }
}
// Runs on a whole warp: TMA cannot fetch rows of statistics that begin off a 16-byte boundary, as they do for most T.
template <int HS>
__device__ __forceinline__ void load_stats(const Keys<HS>& s, const float* lse, const float* D) {
    const int lane = lane_id();
    TileQueue queue(s.a, false);
    Ring<Keys<HS>::kStages> pair;
    for (Tile t; queue.next(t);) {
        const size_t head = size_t(t.head) * s.a.T;
        for (int block = first_block(t); block < end_block(s.a); block++, pair.advance()) {
            s.barriers->pair.wait_empty(pair);
            float* const stats = s.stats + pair.at() * 2 * kBlock + lane;
            SIMT_UNROLL
            for (int n = 0; n < kBlock; n += 32) {
                const int i = block * kBlock + lane + n;  // a query past the end: all its weights are 0
                stats[n] = i < s.a.T ? lse[head + i] * kLog2e : INFINITY;
                stats[n + kBlock] = i < s.a.T ? D[head + i] : 0.0f;
            }
            __syncwarp();
            if (lane == 0) ptx::mbar_arrive(&s.barriers->pair.full[pair.at()]);
        }
    }
}

// Scores are transposed here, keys by queries: in registers, weights and ds are left operands of the sums over queries.
template <int HS, int group>
__device__ __forceinline__ void key_gradients(const Keys<HS>& s) {
    using K = Keys<HS>;
    const Sizes& a = s.a;
    const int lane = lane_id(), row = 16 * warp_in_group() + lane / 4;
    const float scale_log2 = a.scale * kLog2e;

    LeftRows<HS, K::kHeld> k, v;
    float p[kBlock / 2];         // (64 keys, kBlock queries) scores, then weights
    float products[kBlock / 2];  // (64, kBlock) dy . v, then ds
    // (64, kBlock) p and ds as left operands.  A wide head leaves registers for only one of them: then each product
    // ends before its operand is overwritten, and the other warpgroup's products fill the gap.
    constexpr bool kWide = HS > 64;
    uint32_t left[kWide ? 1 : 2][kBlock / 16][4];
    uint32_t(&weights)[kBlock / 16][4] = left[0], (&ds)[kBlock / 16][4] = left[kWide ? 0 : 1];
    float dk[HS / 2], dv[HS / 2];  // (64, HS)
    TileQueue queue(a, false);
    Ring<K::kOwn> own;
    Ring<K::kStages> before, now;  // the pair whose products with weights, ds run; the pair whose scores are computed
    for (Tile t; queue.next(t); own.advance()) {
        s.barriers->own.wait_full(own);
        const int rows = group * kRows * 128;  // bytes before the warpgroup's rows in a panel
        if (group == 1) s.pass(now);
        before = now;
        k.take(s.tile(own.at(), 0) + rows);
        v.take(s.tile(own.at(), 1) + rows);

        for_blocks(end_block(a) - first_block(t) - group, [&]<bool kFirst>() {
            s.barriers->pair.wait_full(now);
            k.start(p, s.block(now.at(), 0));
            v.start(products, s.block(now.at(), 1));
            ptx::wgmma_wait<1>();
            ptx::wgmma_done(p), ptx::wgmma_done(weights), ptx::wgmma_done(ds);
            if (!kFirst) {
                s.barriers->pair.give_back(before);
                before.advance();
            }
            const float* stats = s.stats + now.at() * 2 * kBlock + lane % 4 * 2;
            SIMT_UNROLL
            for (int j = 0; j < kBlock / 8; j++) {
                const float2 lse = simt::ld_vec<float2>(stats + 8 * j);
                SIMT_UNROLL
                for (int i = 4 * j; i < 4 * j + 4; i++) {
                    p[i] = ptx::ex2(fmaf(p[i], scale_log2, -(i % 2 ? lse.y : lse.x)));
                    if (kFirst && j * 8 + lane % 4 * 2 + i % 2 < row + i / 2 % 2 * 8) p[i] = 0;
                }
            }
            pack(weights, p);
            start_sum<HS, !kFirst>(dv, weights, s.block(now.at(), 1));
            ptx::wgmma_wait<1>();
            ptx::wgmma_done(products);
            SIMT_UNROLL
            for (int j = 0; j < kBlock / 8; j++) {
                const float2 D = simt::ld_vec<float2>(stats + kBlock + 8 * j);
                SIMT_UNROLL
                for (int i = 4 * j; i < 4 * j + 4; i++) products[i] = p[i] * (products[i] - (i % 2 ? D.y : D.x));
            }
            if constexpr (kWide) {
                ptx::wgmma_wait<0>();
                ptx::wgmma_done(dv), ptx::wgmma_done(weights);
            }
            pack(ds, products);
            start_sum<HS, !kFirst>(dk, ds, s.block(now.at(), 0));
            if constexpr (kWide) {
                ptx::wgmma_wait<0>();
                ptx::wgmma_done(dk), ptx::wgmma_done(ds);
            }
            __syncwarp();  // all lanes have read the statistics, before one of them gives the pair back
            now.advance();
        });
        ptx::wgmma_wait<0>();
        ptx::wgmma_done(dk), ptx::wgmma_done(dv), ptx::wgmma_done(weights), ptx::wgmma_done(ds);
        s.barriers->pair.give_back(before);

        const float scale[2] = {a.scale, a.scale}, one[2] = {1, 1};
        ptx::bar_sync(1 + group, kGroup);  // no warp of the group reads k or v any more: dk and dv take their places
        write_rows<HS>(s.tile(own.at(), 0) + rows, dk, scale);
        write_rows<HS>(s.tile(own.at(), 1) + rows, dv, one);
        announce_results(&s.barriers->ready[own.at()]);
    }
}

template <int HS>
__global__ void __launch_bounds__(kThreads, 1)
    attention_sm90_backward_keys_kernel(SIMT_PARAM KeyMaps maps, const float* lse, const float* D,  // (B, NH, T) both
                                        SIMT_PARAM Sizes a) {
    using R = Registers<(HS == 64 ? 40 : 24)>;  // wide sums need every register that can be had
    SIMT_DYN_SHARED(shared);
    const Keys<HS> s(shared, a);
    if (threadIdx.x == 0) s.init();
    __syncthreads();
    const int group = group_id();
    if (group == 0) {
        ptx::setmaxnreg_dec<R::kProducer>();
        if (warp_in_group() == 0 && ptx::elect_one()) load_keys(s, maps);
        if (warp_in_group() == 1 && ptx::elect_one())
            store_results(TileQueue(a, false), s.barriers->own, s.barriers->ready, [&](const Tile& t, int at) {
                store_tile<HS>(&maps.dkv, s.tile(at, 0), a.NH + t.h, t.number * kTile, t.b);
                store_tile<HS>(&maps.dkv, s.tile(at, 1), 2 * a.NH + t.h, t.number * kTile, t.b);
            });
        if (warp_in_group() == 2) load_stats(s, lse, D);
    } else {
        ptx::setmaxnreg_inc<R::kConsumer>();
        if (group == 1)
            key_gradients<HS, 0>(s);
        else
            key_gradients<HS, 1>(s);
    }
}
}  // namespace attention_sm90
