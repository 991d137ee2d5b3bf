// Shared by Hopper's attention kernels: which tiles a block works on, tiles in shared memory, products by wgmma.
// The math is in attention_sm90.cu; DESIGN.md has a picture of the pipeline.
//
// A block has three warpgroups.  The first moves data: one of its threads loads tiles by TMA, another one stores
// results.  The other two compute, each on its own 64 of the tile's 128 rows, and meet nowhere but at barriers.
//
// Lane l of warp w (0..3) of a warpgroup holds of a 64 x N result d the elements d[4 j + e], e = 0..3, at row
// 16 w + l/4 + 8 (e/2), column 8 j + 2 (l%4) + e%2.  Packed to bf16, columns 16 k .. 16 k + 15 are the left operand of
// step k of the next product, without a way through shared memory.
#pragma once
#include "kernels/device.cuh"
#include "kernels/ptx.cuh"

namespace attention_sm90 {
constexpr int kGroup = 128, kConsumers = 2, kThreads = (1 + kConsumers) * kGroup;
constexpr int kRows = 64, kTile = kConsumers * kRows;  // rows of a warpgroup, of a block
constexpr unsigned kConsumerWarps = kConsumers * kGroup / 32;
constexpr int kPanel = 64;  // columns of a panel: 128 bytes, the span of the swizzle
// Registers of a thread after setmaxnreg: of the first warpgroup, and of the others.  A block is launched with as many
// per thread as 65,536 allow, in steps of 8, and can share out only these: an increase beyond them would wait for ever.
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;  // 168
template <int kOfProducer>
struct Registers {
    static constexpr int kProducer = kOfProducer;
    static constexpr int kConsumer = ((1 + kConsumers) * kLaunchRegisters - kProducer) / kConsumers;
    static_assert(kProducer % 8 == 0 && kConsumer % 8 == 0 && kConsumer <= 255);
};
constexpr size_t kMaxShared = 227 * 1024;  // of a block
constexpr float kLog2e = 1.4426950408889634f;

struct Sizes {
    int T, NH;
    int tiles;    // of kTile rows of one head
    int heads;    // B * NH
    float scale;  // 1 / sqrt(HS)
    // Of TileQueue:
    bool single;  // tiles are handed out one by one, not in pairs
    int items;    // single tiles or pairs, of all heads
    int divisor;  // pairs of one head; for single tiles the number of heads
};

__device__ __forceinline__ int lane_id() { return int(threadIdx.x % 32u); }
__device__ __forceinline__ int warp_in_group() { return int(threadIdx.x / 32u % 4u); }
// The warpgroup's number.  A shuffle tells the compiler that a whole warp has the same number: branches on it do not
// divide the warp, and values that depend on it stay in uniform registers, where wgmma wants its descriptors.
__device__ __forceinline__ int group_id() { return __shfl_sync(device::kAllLanes, int(threadIdx.x) / kGroup, 0); }

// ---- which tiles

struct Tile {
    int b, h;    // the sequence, and the head in it
    int head;    // b * NH + h
    int number;  // of the tile in its head
};

// The tiles of the calling block, in the order in which all of its warps walk them.  No bit of a result depends on the
// order.
//
// Many tiles: always a tile and its mirror image (t and tiles - 1 - t), the longer one first.  Under the causal mask
// all such pairs are equal work (the middle tile of an odd number is half as much), so that blocks which take pairs in
// turn differ by one pair at the end.  Neighbouring blocks work on one head, whose rows come from L2.
//
// Few tiles, less than two pairs for each block: a second pair for some of the blocks would leave the others idle.  All
// heads' tiles go one by one, the longest first, in turns that run forward and backward: 0 1 2, 2 1 0, 0 1 2.
class TileQueue {
  public:
    // last_is_longest: true for tiles of queries, false for tiles of keys.
    __device__ __forceinline__ TileQueue(const Sizes& a, bool last_is_longest)
        : a_(a), item_(int(blockIdx.x)), last_is_longest_(last_is_longest) {}
    __device__ __forceinline__ bool next(Tile& t) {
        if (item_ >= a_.items) return false;
        // Pairs are counted head by head.  Single tiles are counted by length: first the longest of each head.
        const int quotient = item_ / a_.divisor, rest = item_ % a_.divisor;
        t.head = a_.single ? rest : quotient;
        t.b = t.head / a_.NH;
        t.h = t.head % a_.NH;
        const int tile = a_.single ? quotient : rest, mirror = a_.tiles - 1 - tile;
        const bool mirrored = !a_.single && second_;
        t.number = mirrored != last_is_longest_ ? mirror : tile;
        if (a_.single) {  // from place `block` of a turn to place `block` from the end of the next one, and back
            const int block = int(blockIdx.x);
            item_ += second_ ? 2 * block + 1 : 2 * (int(gridDim.x) - block) - 1;
            second_ = !second_;
        } else {
            second_ = !second_ && mirror != tile;
            if (!second_) item_ += int(gridDim.x);
        }
        return true;
    }

  private:
    const Sizes& a_;
    int item_;
    bool last_is_longest_, second_ = false;  // the second tile of a pair is next; a turn runs backward
};

// ---- buffers that are used in turn

// One side's place in a ring of N buffers: which buffer, and the parity of the round.
template <int N>
class Ring {
    static_assert((N & (N - 1)) == 0);

  public:
    __device__ __forceinline__ int at() const { return int(n_ % N); }
    __device__ __forceinline__ unsigned parity() const { return n_ / N % 2; }
    __device__ __forceinline__ void advance() { n_++; }

  private:
    unsigned n_ = 0;  // may overflow: N divides 2^32
};
// Barriers of such a ring.  The producer waits for `empty` of the round before; in the first round that is no wait.
template <int N>
struct Buffers {
    uint64_t full[N], empty[N];
    __device__ __forceinline__ void init(unsigned filled_by, unsigned emptied_by) {
        for (int i = 0; i < N; i++) ptx::mbar_init(&full[i], filled_by), ptx::mbar_init(&empty[i], emptied_by);
    }
    __device__ __forceinline__ void wait_full(const Ring<N>& r) { ptx::mbar_wait(&full[r.at()], r.parity()); }
    __device__ __forceinline__ void wait_empty(const Ring<N>& r) { ptx::mbar_wait(&empty[r.at()], r.parity() ^ 1); }
    // Each consuming warp calls it after its last read of the buffer.
    __device__ __forceinline__ void give_back(const Ring<N>& r) {
        if (lane_id() == 0) ptx::mbar_arrive(&empty[r.at()]);
    }
};

// ---- tiles in shared memory: panels of R rows of 64 columns, one behind the other; within a row, 16-byte chunks are
// permuted as TMA's 128-byte swizzle does

template <int HS>
constexpr int kBytes(int rows) {
    return rows * HS * int(sizeof(bf16));
}
// Byte offset of a 16-byte chunk in a panel.
__device__ __forceinline__ int chunk_at(int row, int chunk) { return row * 128 + (chunk ^ row % 8) * 16; }

// Rows [row, row + R) of the tensor's `column`-th (HS) columns of every token of sequence b; rows from T on are zeros.
template <int HS, int R>
__device__ __forceinline__ void load_tile(uint8_t* to, const simt::TensorMap* from, uint64_t* full, int column, int row,
                                          int b) {
    SIMT_UNROLL
    for (int panel = 0; panel < HS / kPanel; panel++)
        ptx::tma_load_4d(to + panel * R * 128, from, full, panel * kPanel, column, row, b);
}
template <int HS>
__device__ __forceinline__ void store_tile(const simt::TensorMap* to, const uint8_t* from, int column, int row, int b) {
    SIMT_UNROLL
    for (int panel = 0; panel < HS / kPanel; panel++)
        ptx::tma_store_4d(to, from + panel * kTile * 128, panel * kPanel, column, row, b);
}

// The warp's 16 rows of a tile of kTile rows as left operands, one per 16 columns.  `rows`: the warpgroup's first row.
template <int HS>
__device__ __forceinline__ void read_rows(uint32_t (&a)[HS / 16][4], const uint8_t* rows) {
    const int lane = lane_id(), row = 16 * warp_in_group() + lane % 16;
    SIMT_UNROLL
    for (int k = 0; k < HS / 16; k++)
        ptx::ldmatrix_x4(a[k], rows + k / 4 * kTile * 128 + chunk_at(row, k % 4 * 2 + lane / 16));
}

// Writes the warpgroup's result times `factor` of each of the lane's two rows, rounded, to its rows of a tile.
template <int HS>
__device__ __forceinline__ void write_rows(uint8_t* rows, const float (&d)[HS / 2], const float (&factor)[2]) {
    const int lane = lane_id(), row = 16 * warp_in_group() + lane % 16;
    SIMT_UNROLL
    for (int k = 0; k < HS / 16; k++) {
        uint32_t r[4];
        SIMT_UNROLL
        for (int i = 0; i < 4; i++)
            r[i] = ptx::pack_bf16(d[8 * k + 2 * i] * factor[i % 2], d[8 * k + 2 * i + 1] * factor[i % 2]);
        ptx::stmatrix_x4(r, rows + k / 4 * kTile * 128 + chunk_at(row, k % 4 * 2 + lane / 16));
    }
}

// ---- products; all asynchronous: wgmma_fence before, wgmma_commit after

template <int kTransposeB, int N>
__device__ __forceinline__ void wgmma_ss(float (&d)[N], uint64_t a, uint64_t b, int scale_d) {
    if constexpr (N == 32)
        ptx::wgmma_m64n64k16_ss<0, kTransposeB>(d, a, b, scale_d);
    else
        ptx::wgmma_m64n128k16_ss<0, kTransposeB>(d, a, b, scale_d);
}
template <int kTransposeB, int N>
__device__ __forceinline__ void wgmma_rs(float (&d)[N], const uint32_t (&a)[4], uint64_t b, int scale_d) {
    if constexpr (N == 32)
        ptx::wgmma_m64n64k16_rs<kTransposeB>(d, a, b, scale_d);
    else
        ptx::wgmma_m64n128k16_rs<kTransposeB>(d, a, b, scale_d);
}

// The offset of columns 16 k .. 16 k + 15 of a tile with panels of R rows, in a descriptor's units of 16 bytes.
template <int R>
__device__ constexpr uint64_t step_at(int k) {
    return uint64_t(k / 4 * R * 128 + k % 4 * 32) >> 4;
}

// d (64, N) = a b^T: a (64, HS) the warpgroup's rows of a tile of kTile, b (N, HS) the first N rows of one of R.
template <int HS, int R, int N>
__device__ __forceinline__ void multiply_rows(float (&d)[N], const uint8_t* a, const uint8_t* b) {
    const uint64_t at_a = ptx::wgmma_desc_sw128(a, 16, 1024), at_b = ptx::wgmma_desc_sw128(b, 16, 1024);
    SIMT_UNROLL
    for (int k = 0; k < HS / 16; k++) wgmma_ss<0>(d, at_a + step_at<kTile>(k), at_b + step_at<R>(k), k != 0);
}
// The same with a in registers.
template <int HS, int R, int N>
__device__ __forceinline__ void multiply_rows(float (&d)[N], const uint32_t (&a)[HS / 16][4], const uint8_t* b) {
    const uint64_t at_b = ptx::wgmma_desc_sw128(b, 16, 1024);
    SIMT_UNROLL
    for (int k = 0; k < HS / 16; k++) wgmma_rs<0>(d, a[k], at_b + step_at<R>(k), k != 0);
}
// d (64, HS) = or += a b: a (64, K) in registers, b (K, HS) the first K rows of a tile of R.
template <int HS, int R, int K, bool kAdd, int N, int A>
__device__ __forceinline__ void multiply_tile(float (&d)[N], const uint32_t (&a)[A][4], const uint8_t* b) {
    static_assert(N == HS / 2 && K <= 16 * A);
    const uint64_t at_b = ptx::wgmma_desc_sw128(b, R * 128, 1024);
    SIMT_UNROLL
    for (int k = 0; k < K / 16; k++) wgmma_rs<1>(d, a[k], at_b + (uint64_t(k * 16 * 128) >> 4), kAdd || k != 0);
}

// a = d rounded to bf16: the left operand of a product over the columns of d.
template <int N, int A>
__device__ __forceinline__ void pack(uint32_t (&a)[A][4], const float (&d)[N]) {
    SIMT_UNROLL
    for (int k = 0; k < N / 8; k++) {
        SIMT_UNROLL
        for (int i = 0; i < 4; i++) a[k][i] = ptx::pack_bf16(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]);
    }
}

// Sum over the four lanes that share rows; all get it.
__device__ __forceinline__ float row_sum(float v) {
    v += __shfl_xor_sync(device::kAllLanes, v, 1);
    return v + __shfl_xor_sync(device::kAllLanes, v, 2);
}

// ---- roles

// For a consuming warp that has written results to shared memory: shows them to TMA and tells the storing thread.
__device__ __forceinline__ void announce_results(uint64_t* ready) {
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane_id() == 0) ptx::mbar_arrive(ready);
}
// For the storing thread: stores each tile's results, which lie where its operands were, then frees the buffer.
template <int N, class Store>
__device__ __forceinline__ void store_results(TileQueue queue, Buffers<N>& own, uint64_t (&ready)[N], Store store) {
    Ring<N> ring;
    for (Tile t; queue.next(t); ring.advance()) {
        ptx::mbar_wait(&ready[ring.at()], ring.parity());
        store(t, ring.at());
        ptx::bulk_commit();
        ptx::bulk_wait_read<0>();
        ptx::mbar_arrive(&own.empty[ring.at()]);
    }
}
}  // namespace attention_sm90
