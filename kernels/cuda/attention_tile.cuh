// Shared by the bf16 attention kernels: where a block works, tiles in shared memory, products of tiles by tensor cores,
// dropout masks in the layout of these products.  The shapes and the math are in attention.cu.
//
// A block has 4 warps.  A warp owns S strips of 16 rows of every product, so that rows never cross warps.  Lane l holds
// of each 16 x 8 piece of a result the elements e = 0..3 at row l/4 + 8 (e/2), column 2 (l%4) + e%2: two neighbours in
// each of two rows.  Packed to bf16, two such pieces side by side are the left operand of the next product, without a
// way through shared memory.
#pragma once
#include "kernels/device.cuh"
#include "kernels/dropout.cuh"
#include "kernels/ptx.cuh"

namespace attention {
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr float kLog2e = 1.4426950408889634f;

// A condition that a generic lambda knows at compile time.  A bool takes its place where only run time knows it.
template <bool kValue>
struct Always {
    __device__ constexpr operator bool() const { return kValue; }
};

struct Sizes {
    int T, NH, HS;
    int tiles;    // tiles of rows of one head: the grid is B * NH * tiles blocks
    float scale;  // 1 / sqrt(HS)
};

// The head of a sequence that the calling block works on, and where its tensors lie.
struct Head {
    int b, h, tile;
    size_t qkv;   // offset of q (T, HS) in (B, T, 3, NH, HS); k and v are `out` and 2 `out` further
    size_t y;     // offset in (B, T, NH, HS)
    size_t stat;  // offset in (B, NH, T)
    int in, out;  // distance of consecutive t in qkv, in y
};
__device__ __forceinline__ Head head_of_block(const Sizes& a) {
    const int tile = int(blockIdx.x % unsigned(a.tiles)), head = int(blockIdx.x / unsigned(a.tiles));
    const int b = head / a.NH, h = head % a.NH;
    const int out = a.NH * a.HS, in = 3 * out, column = h * a.HS;
    const size_t first = size_t(b) * a.T;
    return {b, h, tile, first * in + column, first * out + column, size_t(head) * a.T, in, out};
}

__device__ __forceinline__ int lane_id() { return int(threadIdx.x % 32u); }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x / 32u); }

// ---- tiles: rows of W columns in shared memory, zeros where the head is narrower or the sequence ends

// Offset of the 16-byte chunk `chunk` of a row.  Chunks are permuted within rows: ldmatrix reads the same chunk of 8
// consecutive rows at once, and these 8 lie in different groups of banks.  A multiple of 8 rows can be added to the
// offset afterwards; columns_on() adds 16 k columns where chunk is below 2.
template <int W>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
    return row * W + (chunk ^ (W == 32 ? row / 2 % 4 : row % 8)) * 8;
}

__device__ __forceinline__ int columns_on(int at, unsigned k) { return (at ^ int(16 * (k % 4))) + int(64 * (k / 4)); }

// Copies rows of a head (T, HS) to tiles.  The calling thread's share is one chunk column of every kRows-th row.
template <int W>
class Source {
  public:
    __device__ __forceinline__ Source(const bf16* head, int stride, const Sizes& a) : stride_(stride) {
        const int chunk = int(threadIdx.x % unsigned(kChunks));
        row_ = int(threadIdx.x / unsigned(kChunks));
        from_ = head + chunk * 8;
        at_ = chunk_at<W>(row_, chunk);
        end_ = chunk * 8 < a.HS ? a.T : 0;
    }
    // Starts the copies of rows [first, first + R) of the tensor `beside` elements after this one; rows from T on and
    // columns from HS on become zero.
    template <int R>
    __device__ __forceinline__ void load(bf16* tile, int first, int beside = 0) const {
        static_assert(R % kRows == 0 && kRows % 8 == 0);
        SIMT_UNROLL
        for (int i = 0; i < R; i += kRows) {
            const int row = first + i + row_;
            ptx::cp_async16(tile + at_ + i * W, from_ + ptrdiff_t(row) * stride_ + beside, row < end_);
        }
    }

  private:
    static constexpr int kChunks = W / 8, kRows = kThreads / kChunks;
    const bf16* from_;
    int stride_, row_, at_, end_;
};

// Stores rows [first, first + 16 S) of a head: the warp's results * factor, rounded.  They pass through the warp's own
// 16 S rows of a tile that nobody reads any more, so that whole 16-byte chunks go out.
template <int S, int W>
__device__ __forceinline__ void store_rows(bf16* to, int stride, bf16* rows, const float (&sum)[S][W / 8][4],
                                           const float (&factor)[S][2], int first, const Sizes& a) {
    const int lane = lane_id();
    __syncwarp();  // after the warp's last reads of these rows
    SIMT_UNROLL
    for (int s = 0; s < S; s++) {
        SIMT_UNROLL
        for (int n = 0; n < W / 8; n++) {
            SIMT_UNROLL
            for (int half = 0; half < 2; half++) {
                bf16* at = rows + chunk_at<W>(16 * s + 8 * half + lane / 4, n) + lane % 4 * 2;
                *reinterpret_cast<uint32_t*>(at) =
                    ptx::pack_bf16(sum[s][n][2 * half] * factor[s][half], sum[s][n][2 * half + 1] * factor[s][half]);
            }
        }
    }
    __syncwarp();
    constexpr int kChunks = W / 8;
    SIMT_UNROLL
    for (int i = 0; i < S * 16 * kChunks / 32; i++) {
        const int at = i * 32 + lane, row = at / kChunks, chunk = at % kChunks;
        if (first + row < a.T && chunk * 8 < a.HS)
            simt::st_vec(to + size_t(first + row) * stride + chunk * 8,
                         simt::ld_vec<uint4>(rows + chunk_at<W>(row, chunk)));
    }
}

// ---- products

// The left operand of a product: the warp's 16 S rows of a tile, kept in registers where they fit, else read as needed.
template <int S, int W, bool kHeld>
struct Rows {
    const bf16* rows;  // (16 S, W) of a tile
    uint32_t held[kHeld ? W / 16 : 1][S][4];

    __device__ __forceinline__ void take(const bf16* from) {
        rows = from;
        if constexpr (kHeld) {
            SIMT_UNROLL
            for (int k = 0; k < W / 16; k++) read(held[k], k);
        }
    }
    __device__ __forceinline__ void read(uint32_t (&fragment)[S][4], unsigned k) const {  // columns 16 k ..
        const int at = chunk_at<W>(lane_id() % 16, lane_id() / 16);
        SIMT_UNROLL
        for (int s = 0; s < S; s++) ptx::ldmatrix_x4(fragment[s], rows + columns_on(at, k) + 16 * s * W);
    }
    __device__ __forceinline__ void get(uint32_t (&fragment)[S][4], unsigned k) const {
        if constexpr (kHeld) {
            SIMT_UNROLL
            for (int s = 0; s < S; s++) {
                SIMT_UNROLL
                for (int i = 0; i < 4; i++) fragment[s][i] = held[k][s][i];
            }
        } else {
            read(fragment, k);
        }
    }
};

// sum (16 S, N) += left (16 S, W) right^T, right (N, W) the tile `at` elements after `tiles`
template <int S, int N, int W, bool kHeld>
__device__ __forceinline__ void add_rows_by_rows(float (&sum)[S][N / 8][4], const Rows<S, W, kHeld>& left,
                                                 const bf16* tiles, int at) {
    const int lane = lane_id();
    at += chunk_at<W>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const auto step = [&](unsigned k) {
        uint32_t a[S][4];
        left.get(a, k);
        SIMT_UNROLL
        for (int n = 0; n < N / 16; n++) {
            uint32_t b[4];
            ptx::ldmatrix_x4(b, tiles + columns_on(at, k) + 16 * n * W);
            const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
            SIMT_UNROLL
            for (int s = 0; s < S; s++) {
                ptx::mma_m16n8k16(sum[s][2 * n], a[s], b0);
                ptx::mma_m16n8k16(sum[s][2 * n + 1], a[s], b1);
            }
        }
    };
    if constexpr (W <= 64) {
        SIMT_UNROLL
        for (unsigned k = 0; k < W / 16; k++) step(k);
    } else {  // the compiler schedules longer straight code into more registers than there are
        static_assert(!kHeld);
        SIMT_NO_UNROLL
        for (unsigned first = 0; first < W / 16; first += 2) {
            SIMT_UNROLL
            for (unsigned k = 0; k < 2; k++) step(first + k);
        }
    }
}

// sum (16 S, W) += left (16 S, N), rounded to bf16, times right (N, W), likewise
template <int S, int N, int W>
__device__ __forceinline__ void add_times_tile(float (&sum)[S][W / 8][4], const float (&left)[S][N / 8][4],
                                               const bf16* tiles, int at) {
    at += chunk_at<W>(lane_id() % 16, lane_id() / 16);
    SIMT_UNROLL
    for (int k = 0; k < N / 16; k++) {
        uint32_t a[S][4];
        SIMT_UNROLL
        for (int s = 0; s < S; s++) {
            SIMT_UNROLL
            for (int i = 0; i < 4; i++)
                a[s][i] = ptx::pack_bf16(left[s][2 * k + i / 2][i % 2 * 2], left[s][2 * k + i / 2][i % 2 * 2 + 1]);
        }
        SIMT_UNROLL
        for (int n = 0; n < W / 16; n++) {
            uint32_t b[4];
            ptx::ldmatrix_x4_trans(b, tiles + columns_on(at, n) + 16 * k * W);
            const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
            SIMT_UNROLL
            for (int s = 0; s < S; s++) {
                ptx::mma_m16n8k16(sum[s][2 * n], a[s], b0);
                ptx::mma_m16n8k16(sum[s][2 * n + 1], a[s], b1);
            }
        }
    }
}

// ---- dropout

__device__ __forceinline__ uint32_t exchanged(uint32_t bits, int lanes) {
    return lanes == 0 ? bits : __shfl_xor_sync(device::kAllLanes, bits, lanes);
}

// The mask of one strip of scores, 16 x N: bit 4 n + e of the calling lane is set when element e of its piece n is
// kept.  Rows are queries from i0 and columns keys from j0, or the other way round.  Whole warps call it.
// A call of the generator gives four neighbouring keys of one query.  Where rows of the mask begin on such groups (T a
// multiple of 4), the lanes that hold parts of a group share its call: one call per four elements.  Else one call each.
template <bool kRowsAreKeys, int N>
__device__ __forceinline__ uint32_t keep_bits(const device::DropoutStream& drop, const Head& at, int i0, int j0,
                                              int T) {
    static_assert(N <= 64);
    const int lane = lane_id(), row = lane / 4, column = lane % 4 * 2;
    const size_t head = size_t(at.h) * T;  // element = (head + i) T + j
    uint32_t bits = 0;
    if (T % 4 != 0) {
        SIMT_NO_UNROLL
        for (int k = 0; k < N / 2; k++) {
            const int r = row + k % 4 / 2 * 8, c = column + k / 4 * 8 + k % 2;
            const size_t element = (head + (kRowsAreKeys ? i0 + c : i0 + r)) * T + (kRowsAreKeys ? j0 + r : j0 + c);
            const Philox4 w = drop.words(at.b, uint32_t(element / 4));
            const uint32_t low = element & 1 ? w.v[1] : w.v[0], high = element & 1 ? w.v[3] : w.v[2];
            bits |= uint32_t(drop.keeps(element & 2 ? high : low)) << k;
        }
        return bits;
    }
    // The lane's own share in piece n: group `mine` of those that the sharing lanes need; four bits, one per key.
    const int mine = kRowsAreKeys ? row % 4 : lane % 2;
    SIMT_NO_UNROLL
    for (int n = 0; n < N / 8; n++) {
        const int i = kRowsAreKeys ? i0 + 8 * n + column + mine % 2 : i0 + row + 8 * mine;
        const int j = kRowsAreKeys ? j0 + 8 * (mine / 2) + row / 4 * 4 : j0 + 8 * n + column / 4 * 4;
        const Philox4 w = drop.words(at.b, (uint32_t(head) + i) * uint32_t(T / 4) + uint32_t(j / 4));
        SIMT_UNROLL
        for (int k = 0; k < 4; k++) bits |= uint32_t(drop.keeps(w.v[k])) << (4 * n + k);
    }
    uint32_t out = 0;
    if constexpr (kRowsAreKeys) {  // four lanes, one key each; lane e computed element e of all four
        SIMT_UNROLL
        for (int d = 0; d < 4; d++) out |= (exchanged(bits, 4 * d) >> mine & 0x11111111u) << (mine ^ d);
    } else {  // two lanes, two keys each; lane e computed row half e of both
        SIMT_UNROLL
        for (int d = 0; d < 2; d++) out |= (exchanged(bits, d) >> (2 * mine) & 0x33333333u) << (2 * (mine ^ d));
    }
    return out;
}
}  // namespace attention
