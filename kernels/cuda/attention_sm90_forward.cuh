// The forward kernel of attention_sm90.cu: tiles of 128 queries, blocks of 128 keys from the diagonal down to key 0.
//
// A warpgroup computes the scores of its next block beside the product of its last weights with V, while the other
// warpgroup is in its softmax: the two take turns in giving products to the tensor cores.
#pragma once
#include "kernels/cuda/attention_sm90_tile.cuh"

namespace attention_sm90 {
template <int HS>
struct Forward {
    static constexpr int kKeys = 128;                           // of a block
    static constexpr int kOwn = 2, kStages = HS == 64 ? 4 : 2;  // buffers of query tiles; of key and of value blocks
    static constexpr int kTileBytes = kBytes<HS>(kTile), kBlockBytes = kBytes<HS>(kKeys);

    struct Barriers {
        Buffers<kOwn> q;
        uint64_t ready[kOwn];  // y has replaced q
        Buffers<kStages> k, v;
    };
    static constexpr size_t kShared = kOwn * kTileBytes + 2 * kStages * kBlockBytes + sizeof(Barriers);

    static_assert(kShared <= kMaxShared);

    uint8_t *q, *k, *v;  // (kOwn, kTile, HS), (kStages, kKeys, HS) twice; bf16, in panels
    Barriers* barriers;
    const Sizes& a;

    __device__ __forceinline__ Forward(uint8_t* shared, const Sizes& sizes)
        : q(shared),
          k(q + kOwn * kTileBytes),
          v(k + kStages * kBlockBytes),
          barriers(reinterpret_cast<Barriers*>(v + kStages * kBlockBytes)),
          a(sizes) {}

    __device__ __forceinline__ void init() const {
        barriers->q.init(1, 1);
        barriers->k.init(1, kConsumerWarps), barriers->v.init(1, kConsumerWarps);
        for (uint64_t& b : barriers->ready) ptx::mbar_init(&b, kConsumerWarps);
        ptx::fence_mbarrier_init();
    }

    __device__ __forceinline__ void load(const simt::TensorMap* qkv) const {
        TileQueue queue(a, true);
        Ring<kOwn> own;
        Ring<kStages> block;  // of k and of v
        for (Tile t; queue.next(t); own.advance()) {
            barriers->q.wait_empty(own);
            ptx::mbar_arrive_expect_tx(&barriers->q.full[own.at()], kTileBytes);
            load_tile<HS, kTile>(q + own.at() * kTileBytes, qkv, &barriers->q.full[own.at()], t.h, t.number * kTile,
                                 t.b);
            for (int j = t.number; j >= 0; j--, block.advance()) {
                barriers->k.wait_empty(block);
                ptx::mbar_arrive_expect_tx(&barriers->k.full[block.at()], kBlockBytes);
                load_tile<HS, kKeys>(k + block.at() * kBlockBytes, qkv, &barriers->k.full[block.at()], a.NH + t.h,
                                     j * kKeys, t.b);
                barriers->v.wait_empty(block);
                ptx::mbar_arrive_expect_tx(&barriers->v.full[block.at()], kBlockBytes);
                load_tile<HS, kKeys>(v + block.at() * kBlockBytes, qkv, &barriers->v.full[block.at()], 2 * a.NH + t.h,
                                     j * kKeys, t.b);
            }
        }
    }

    __device__ __forceinline__ void store(const simt::TensorMap* y) const {
        store_results(TileQueue(a, true), barriers->q, barriers->ready, [&](const Tile& t, int at) {
            store_tile<HS>(y, q + at * kTileBytes, t.h, t.number * kTile, t.b);
        });
    }
};

// Turns scores s of W keys into weights exp(s - m), where m is the largest score so far; l is the lane's share of their
// sum.  kept: the factor for the sums so far.  kMasked: row r sees the first r + 1 + W - 64 keys.
template <int W, bool kMasked>
__device__ __forceinline__ void softmax(float* s, float (&m)[2], float (&l)[2], float (&kept)[2], float scale_log2) {
    const int row = 16 * warp_in_group() + lane_id() / 4 + W - kRows, column = lane_id() % 4 * 2;
    SIMT_UNROLL
    for (int half = 0; half < 2; half++) {
        float largest = m[half];
        SIMT_UNROLL
        for (int j = 0; j < W / 8; j++) {
            float &x = s[4 * j + 2 * half], &y = s[4 * j + 2 * half + 1];
            if (kMasked && 8 * j + column > row + 8 * half) x = -INFINITY;
            if (kMasked && 8 * j + column + 1 > row + 8 * half) y = -INFINITY;
            largest = fmaxf(largest, fmaxf(x, y));
        }
        largest = fmaxf(largest, __shfl_xor_sync(device::kAllLanes, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(device::kAllLanes, largest, 2));
        kept[half] = ptx::ex2((m[half] - largest) * scale_log2);  // 0 for the first block
        m[half] = largest;
    }
    SIMT_UNROLL
    for (int half = 0; half < 2; half++) {
        const float offset = m[half] * scale_log2;
        float sum = 0;
        SIMT_UNROLL
        for (int j = 0; j < W / 8; j++) {
            float &x = s[4 * j + 2 * half], &y = s[4 * j + 2 * half + 1];
            x = ptx::ex2(fmaf(x, scale_log2, -offset)), y = ptx::ex2(fmaf(y, scale_log2, -offset));
            sum += x + y;
        }
        l[half] = fmaf(l[half], kept[half], sum);
    }
}

// One consuming warpgroup.  On the diagonal the first warpgroup (kDiagonal = 64) sees half of the keys of a block, the
// second (kDiagonal = 128) all of them.
template <int HS, int kDiagonal>
__device__ __forceinline__ void attend(const Forward<HS>& f, float* lse) {
    using F = Forward<HS>;
    constexpr int kNumber = kDiagonal / kRows - 1;                                 // of the warpgroup
    constexpr int kTurn = 1 + kNumber, kOther = 2 - kNumber, kMeet = 3 + kNumber;  // named barriers
    constexpr int kThreadsOfTurn = kConsumers * kGroup;
    const Sizes& a = f.a;
    const float scale_log2 = a.scale * kLog2e;
    const int row = kNumber * kRows + 16 * warp_in_group() + lane_id() / 4;  // the lane's first, in the tile

    float s[F::kKeys / 2];                 // (64, kKeys) of the warpgroup: scores, then weights
    uint32_t p[F::kKeys / 16][4];          // (64, kKeys) weights as left operands
    float o[HS / 2], m[2], l[2], kept[2];  // (64, HS) sum exp(s - m) v; (64) of the lane's rows
    TileQueue queue(a, true);
    Ring<F::kOwn> own;
    Ring<F::kStages> key, value;

    // start_* starts a product.  end_* gives back the block that the product reads, once the product has ended.
    const auto start_scores = [&](auto& scores, const uint8_t* q) {  // of the first keys of a block, or of all
        f.barriers->k.wait_full(key);
        ptx::wgmma_done(scores);
        ptx::wgmma_fence();
        multiply_rows<HS, F::kKeys>(scores, q, f.k + key.at() * F::kBlockBytes);
        ptx::wgmma_commit();
    };
    const auto end_scores = [&] {
        f.barriers->k.give_back(key);
        key.advance();
    };
    const auto start_values = [&]<int kWeights, bool kAdd>() {  // o = or += the first kWeights columns of p times v
        f.barriers->v.wait_full(value);
        if constexpr (kAdd) ptx::wgmma_done(o);
        ptx::wgmma_done(p);
        ptx::wgmma_fence();
        multiply_tile<HS, F::kKeys, kWeights, kAdd>(o, p, f.v + value.at() * F::kBlockBytes);
        ptx::wgmma_commit();
    };
    const auto end_values = [&] {
        ptx::wgmma_wait<0>();
        ptx::wgmma_done(o), ptx::wgmma_done(p);
        f.barriers->v.give_back(value);
        value.advance();
    };

    if (kNumber == 1) ptx::bar_arrive(kOther, kThreadsOfTurn);  // the first warpgroup begins
    for (Tile t; queue.next(t); own.advance()) {
        uint8_t* const q = f.q + own.at() * F::kTileBytes + kNumber * kRows * 128;
        m[0] = m[1] = -INFINITY, l[0] = l[1] = 0;
        f.barriers->q.wait_full(own);

        // The block on the diagonal.
        auto& diagonal = reinterpret_cast<float(&)[kDiagonal / 2]>(s);
        ptx::bar_sync(kTurn, kThreadsOfTurn);
        start_scores(diagonal, q);
        ptx::bar_arrive(kOther, kThreadsOfTurn);
        ptx::wgmma_wait<0>();
        ptx::wgmma_done(diagonal);
        end_scores();
        softmax<kDiagonal, true>(s, m, l, kept, scale_log2);
        pack(p, diagonal);

        // Computes the scores of one more block, beside the product of the weights before with their values.
        const auto block = [&]<int kWeights, bool kAdd>() {
            ptx::bar_sync(kTurn, kThreadsOfTurn);
            start_scores(s, q);
            start_values.template operator()<kWeights, kAdd>();
            ptx::bar_arrive(kOther, kThreadsOfTurn);
            ptx::wgmma_wait<1>();
            ptx::wgmma_done(s);
            end_scores();
            softmax<F::kKeys, false>(s, m, l, kept, scale_log2);
            end_values();
            SIMT_UNROLL
            for (int i = 0; i < HS / 2; i++) o[i] *= kept[i / 2 % 2];
            pack(p, s);
        };
        if (t.number == 0) {
            start_values.template operator()<kDiagonal, false>();
            end_values();  // in both branches: with one wait after them ptxas serialises the products (C7511)
        } else {
            block.template operator()<kDiagonal, false>();
            SIMT_NO_UNROLL
            for (int j = 1; j < t.number; j++) block.template operator()<F::kKeys, true>();
            start_values.template operator()<F::kKeys, true>();
            end_values();
        }

        float factor[2];
        SIMT_UNROLL
        for (int half = 0; half < 2; half++) {
            const float sum = row_sum(l[half]);
            const int i = t.number * kTile + row + 8 * half;
            if (lane_id() % 4 == 0 && i < a.T) lse[size_t(t.head) * a.T + i] = m[half] * a.scale + logf(sum);
            factor[half] = 1 / sum;
        }
        ptx::bar_sync(kMeet, kGroup);  // no warp of the group reads q any more: y takes its place
        write_rows<HS>(q, o, factor);
        announce_results(&f.barriers->ready[own.at()]);
    }
    if (kNumber == 0)
        ptx::bar_sync(kTurn, kThreadsOfTurn);  // answers the other warpgroup's last arrival: as many waits as arrivals
}

template <int HS>
__global__ void __launch_bounds__(kThreads, 1)
    attention_sm90_forward_kernel(SIMT_PARAM simt::TensorMap y,    // (B, T, NH, HS) in boxes of kTile rows
                                  SIMT_PARAM simt::TensorMap qkv,  // (B, T, 3 NH, HS) likewise
                                  float* lse,                      // (B, NH, T)
                                  SIMT_PARAM Sizes a) {
    SIMT_DYN_SHARED(shared);
    const Forward<HS> f(shared, a);
    if (threadIdx.x == 0) f.init();
    __syncthreads();
    const int group = group_id();
    if (group == 0) {
        ptx::setmaxnreg_dec<Registers<40>::kProducer>();
        if (warp_in_group() == 0 && ptx::elect_one()) f.load(&qkv);
        if (warp_in_group() == 1 && ptx::elect_one()) f.store(&y);
    } else {
        ptx::setmaxnreg_inc<Registers<40>::kConsumer>();
        if (group == 1)
            attend<HS, 64>(f, lse);
        else
            attend<HS, 128>(f, lse);
    }
}
}  // namespace attention_sm90
