// LayerNorm over the last axis.
//
//   forward    mu = mean_c x[c]      r = (mean_c (x[c]-mu)^2 + eps)^-1/2      y[c] = (x[c]-mu) r w[c] + b[c]
//   backward   n = (x-mu) r,  g = dy*w      dx (+)= r (g - mean_c g - n mean_c(g n))
//              dw (+)= sum_bt dy n      db (+)= sum_bt dy      dx_sum (+)= sum_bt dx, as stored
//
//   shapes     x, y, dx, dy (BT, C) real    w, b (C) real    mean, rstd (BT) f32    dw, db, dx_sum (C) f32
//   traffic    forward one read and one write of BT C; backward three reads (two when dx is overwritten) and one write,
//              and 16 C bytes per chunk of 64 or more rows, 24 C with dx_sum.  (Below 16384 rows a chunk has BT / 256
//              rows, but 16 at least.)  This holds where rows live in registers: where every tensor allows 16-byte
//              accesses (it starts on such a boundary, C is a multiple of the vector), up to C = 2048, in the backward
//              8192.  Other rows are read again from cache, and x and dy once more for dw.   bound: memory
//   limits     any BT >= 1, C from 1 to 2^23
//   order      a row's sums: a lane's columns ascending, then a tree over the lanes, then over the warps.  dw, db,
//              dx_sum: 8 groups of warps (4 above C = 1024, 1 above 2048) take a chunk's rows in turn, ascending; then
//              groups ascending; then chunks i, i+32, ..., then these 32 sums ascending.  All of it follows from BT, C
//              and whether 16-byte accesses are allowed
#include "kernels/cuda/launch.h"
#include "kernels/elementwise.cuh"

#include <algorithm>

namespace {
using device::kVec;
using device::Vec;

constexpr int kWarps = 8, kThreads = 32 * kWarps;  // of a block
constexpr int kWideColumns = 4;                    // of a thread that sums the columns of wide rows
// Of the sums over rows: enough blocks for a GPU, few partial rows.  Few rows make small chunks: with 4096 rows 256
// chunks of 16, two for each multiprocessor of a large GPU.
constexpr size_t kMinRows = 16, kMaxRowsOfFew = 64, kChunks = 256, kMaxChunks = 1024;

template <class T>
struct Forward {
    T* y;         // (BT, C)
    float* mean;  // (BT)
    float* rstd;  // (BT)
    const T* x;   // (BT, C)
    const T* w;   // (C)
    const T* b;   // (C) or null
    int BT, C;
    float eps;
    bool vectors;
};

// Writes the first `count` of N columns of y at c, from the columns of x in v.
template <class T>
__device__ __forceinline__ void write_y(const Forward<T>& a, size_t bt, int c, int count, bool vectors,
                                        float (&v)[kVec<T>], float mean, float rstd) {
    constexpr int N = kVec<T>;
    float w[N], b[N] = {};
    device::load_some(w, a.w + c, count, vectors);
    if (a.b) device::load_some(b, a.b + c, count, vectors);
    SIMT_UNROLL
    for (int i = 0; i < N; i++) v[i] = (v[i] - mean) * rstd * w[i] + b[i];
    device::store_some(a.y + bt * size_t(a.C) + c, v, count, vectors);
}

// One warp per row; a lane has `Columns` columns in registers.
template <class T, int Columns>
__global__ void __launch_bounds__(kThreads) layernorm_forward_kernel(SIMT_PARAM Forward<T> a) {
    constexpr int N = kVec<T>, K = Columns / N, kNext = 32 * N;  // vectors of a lane; columns from one to the next
    const int lane = int(threadIdx.x) % 32, c0 = lane * N;
    const size_t bt = size_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (bt >= size_t(a.BT)) return;
    const T* x = a.x + bt * size_t(a.C);  // (C)
    float v[K][N] = {};
    SIMT_UNROLL
    for (int k = 0; k < K; k++)
        if (c0 + k * kNext < a.C) device::load(v[k], x + c0 + k * kNext);
    float sum = 0, squares = 0;
    SIMT_UNROLL
    for (int k = 0; k < K; k++) {
        SIMT_UNROLL
        for (int i = 0; i < N; i++) sum += v[k][i];
    }
    const float mean = device::warp_sum(sum) / float(a.C);
    SIMT_UNROLL
    for (int k = 0; k < K; k++) {
        if (c0 + k * kNext >= a.C) continue;
        SIMT_UNROLL
        for (int i = 0; i < N; i++) squares += (v[k][i] - mean) * (v[k][i] - mean);
    }
    const float rstd = 1.0f / sqrtf(device::warp_sum(squares) / float(a.C) + a.eps);
    SIMT_UNROLL
    for (int k = 0; k < K; k++)
        if (c0 + k * kNext < a.C) write_y(a, bt, c0 + k * kNext, N, true, v[k], mean, rstd);
    if (lane == 0) {
        a.mean[bt] = mean;
        a.rstd[bt] = rstd;
    }
}

// One block per row of any width and alignment; the passes after the first find the row in cache.
template <class T>
__global__ void __launch_bounds__(kThreads) layernorm_forward_wide_kernel(SIMT_PARAM Forward<T> a) {
    constexpr int N = kVec<T>, kStep = N * kThreads;
    SIMT_SHARED(float, part, [kWarps]);
    const size_t bt = blockIdx.x;
    const T* x = a.x + bt * size_t(a.C);  // (C)
    float v[N], sum = 0, squares = 0;
    for (int c = int(threadIdx.x) * N; c < a.C; c += kStep) {
        device::load_some(v, x + c, min(a.C - c, N), a.vectors);
        SIMT_UNROLL
        for (int i = 0; i < N; i++) sum += v[i];
    }
    const float mean = device::block_sum(sum, part) / float(a.C);
    for (int c = int(threadIdx.x) * N; c < a.C; c += kStep) {
        const int count = min(a.C - c, N);
        device::load_some(v, x + c, count, a.vectors);
        SIMT_UNROLL
        for (int i = 0; i < N; i++) squares += i < count ? (v[i] - mean) * (v[i] - mean) : 0.0f;
    }
    const float rstd = 1.0f / sqrtf(device::block_sum(squares, part) / float(a.C) + a.eps);
    for (int c = int(threadIdx.x) * N; c < a.C; c += kStep) {
        const int count = min(a.C - c, N);
        device::load_some(v, x + c, count, a.vectors);
        write_y(a, bt, c, count, a.vectors, v, mean, rstd);
    }
    if (threadIdx.x == 0) {
        a.mean[bt] = mean;
        a.rstd[bt] = rstd;
    }
}

template <class T>
struct Backward {
    T* dx;              // (BT, C)         +=, or = when overwrite
    float* partial;     // (chunks, sums, C)  =   dw, db, dx_sum of each chunk's rows
    const T* dy;        // (BT, C)
    const T* x;         // (BT, C)
    const T* w;         // (C)
    const float* mean;  // (BT)
    const float* rstd;  // (BT)
    int BT, C;
    int rows;  // of a chunk
    int sums;  // 3, or 2 without dx_sum
    bool overwrite, vectors;
};

// Unpacks 16 bytes of a tensor.  Rows are kept as stored, because bf16 takes half the registers of floats.
template <class T>
__device__ __forceinline__ void unpack(float (&out)[kVec<T>], const uint4& packed) {
    Vec<T, kVec<T>> v;
    memcpy(&v, &packed, sizeof v);
    device::unpack(out, v);
}

// Writes the first `count` of N columns of dx at c, from the old dx, dy and x; leaves the values as stored in dx.
template <class T>
__device__ __forceinline__ void write_dx(const Backward<T>& a, size_t bt, int c, int count, bool vectors,
                                         float (&dx)[kVec<T>], const float (&dy)[kVec<T>], const float (&x)[kVec<T>],
                                         float mean, float rstd, float mean_g, float mean_gn) {
    constexpr int N = kVec<T>;
    float w[N];
    device::load_some(w, a.w + c, count, vectors);
    SIMT_UNROLL
    for (int i = 0; i < N; i++) {
        const float n = (x[i] - mean) * rstd, g = dy[i] * w[i];
        dx[i] += rstd * (g - mean_g - n * mean_gn);
    }
    device::store_rounded(a.dx + bt * size_t(a.C) + c, dx, count, vectors);
}

// One block per chunk of rows, W warps per row; a lane has `Columns` columns in registers.  Lanes keep their columns of
// dw, db and (Sum) dx_sum over all rows of the chunk; the groups of W warps add their sums at the end.
template <class T, int Columns, int W, bool Sum>
__global__ void __launch_bounds__(kThreads, Columns * sizeof(T) <= 48 ? 2 : 1)
    layernorm_backward_kernel(SIMT_PARAM Backward<T> a) {
    constexpr int N = kVec<T>, K = Columns / N, kGroups = kWarps / W;
    constexpr int kNext = W * 32 * N;  // columns from a lane's vector to its next: those of one slice of the row
    const int warp = int(threadIdx.x) / 32, group = warp / W, c0 = int(threadIdx.x) % (W * 32) * N;
    const size_t C = size_t(a.C);
    const unsigned first = blockIdx.x * unsigned(a.rows), end = min(first + unsigned(a.rows), unsigned(a.BT));
    float dw[K][N] = {}, db[K][N] = {}, dx_sum[Sum ? K : 1][N] = {};

    int turn = 0;
    for (unsigned row = first; row < end; row += kGroups, turn ^= 1) {
        const unsigned bt = row + unsigned(group);
        if (bt >= end) break;
        const float mean = a.mean[bt], rstd = a.rstd[bt];
        uint4 dx[K] = {}, dy[K] = {}, x[K] = {};
        SIMT_UNROLL
        for (int k = 0; k < K; k++) {
            const int c = c0 + k * kNext;
            if (c >= a.C) continue;
            x[k] = simt::ld_vec<uint4>(a.x + bt * C + c);
            dy[k] = simt::ld_vec<uint4>(a.dy + bt * C + c);
            if (!a.overwrite) dx[k] = simt::ld_vec<uint4>(a.dx + bt * C + c);
        }
        float sum_g = 0, sum_gn = 0;
        SIMT_UNROLL
        for (int k = 0; k < K; k++) {
            const int c = c0 + k * kNext;
            if (c >= a.C) continue;
            float w[N], xs[N], dys[N];
            device::load(w, a.w + c);
            unpack<T>(xs, x[k]);
            unpack<T>(dys, dy[k]);
            SIMT_UNROLL
            for (int i = 0; i < N; i++) {
                const float n = (xs[i] - mean) * rstd, g = dys[i] * w[i];
                sum_g += g;
                sum_gn += g * n;
                dw[k][i] += dys[i] * n;
                db[k][i] += dys[i];
            }
        }
        sum_g = device::warp_sum(sum_g);
        sum_gn = device::warp_sum(sum_gn);
        if constexpr (W > 1) {  // two turns' sums, so that one barrier per row is enough
            SIMT_SHARED(float, part, [2][2][kWarps]);
            if (threadIdx.x % 32 == 0) part[turn][0][warp] = sum_g, part[turn][1][warp] = sum_gn;
            ptx::bar_sync(1 + group, 32 * W);  // groups do not wait for each other
            sum_g = 0, sum_gn = 0;
            SIMT_UNROLL
            for (int i = 0; i < W; i++) sum_g += part[turn][0][group * W + i], sum_gn += part[turn][1][group * W + i];
        }
        const float mean_g = sum_g / float(a.C), mean_gn = sum_gn / float(a.C);
        SIMT_UNROLL
        for (int k = 0; k < K; k++) {
            const int c = c0 + k * kNext;
            if (c >= a.C) continue;
            float dxs[N], xs[N], dys[N];
            unpack<T>(dxs, dx[k]);
            unpack<T>(dys, dy[k]);
            unpack<T>(xs, x[k]);
            write_dx(a, bt, c, N, true, dxs, dys, xs, mean, rstd, mean_g, mean_gn);
            if constexpr (Sum) {
                SIMT_UNROLL
                for (int i = 0; i < N; i++) dx_sum[k][i] += dxs[i];
            }
        }
    }

    using Four = Vec<float, 4>;
    constexpr int kSums = Sum ? 3 : 2;
    SIMT_SHARED(Four, sums, [kSums][kThreads * N / 4]);     // each: (groups, kNext)
    float* partial = a.partial + blockIdx.x * (kSums * C);  // (sums, C)
    SIMT_UNROLL
    for (int k = 0; k < K; k++) {
        if (k > 0) __syncthreads();  // the slice before has been read
        SIMT_UNROLL
        for (int i = 0; i < N; i += 4) {
            const int at = device::spread((int(threadIdx.x) * N + i) / 4);
            simt::st_vec(&sums[0][at], Four{dw[k][i], dw[k][i + 1], dw[k][i + 2], dw[k][i + 3]});
            simt::st_vec(&sums[1][at], Four{db[k][i], db[k][i + 1], db[k][i + 2], db[k][i + 3]});
            if constexpr (Sum)
                simt::st_vec(&sums[2][at], Four{dx_sum[k][i], dx_sum[k][i + 1], dx_sum[k][i + 2], dx_sum[k][i + 3]});
        }
        __syncthreads();
        for (int j = int(threadIdx.x); j < kSums * kNext; j += kThreads) {
            const int which = j / kNext, c = j % kNext;
            if (k * kNext + c >= a.C) continue;
            float sum = 0;
            SIMT_UNROLL
            for (int g = 0; g < kGroups; g++) sum += sums[which][device::spread((g * kNext + c) / 4)][c % 4];
            partial[which * C + k * kNext + c] = sum;
        }
    }
}

// dx of rows of any width and alignment, one block per row.
template <class T>
__global__ void __launch_bounds__(kThreads) layernorm_backward_wide_kernel(SIMT_PARAM Backward<T> a) {
    constexpr int N = kVec<T>, kStep = N * kThreads;
    SIMT_SHARED(float, part, [kWarps]);
    const size_t bt = blockIdx.x, row = bt * size_t(a.C);
    const float mean = a.mean[bt], rstd = a.rstd[bt];
    float sum_g = 0, sum_gn = 0;
    for (int c = int(threadIdx.x) * N; c < a.C; c += kStep) {
        const int count = min(a.C - c, N);
        float dy[N], x[N], w[N];
        device::load_some(dy, a.dy + row + c, count, a.vectors);
        device::load_some(x, a.x + row + c, count, a.vectors);
        device::load_some(w, a.w + c, count, a.vectors);
        SIMT_UNROLL
        for (int i = 0; i < N; i++) {
            sum_g += dy[i] * w[i];
            sum_gn += dy[i] * w[i] * ((x[i] - mean) * rstd);
        }
    }
    const float mean_g = device::block_sum(sum_g, part) / float(a.C);
    const float mean_gn = device::block_sum(sum_gn, part) / float(a.C);
    for (int c = int(threadIdx.x) * N; c < a.C; c += kStep) {
        const int count = min(a.C - c, N);
        float dx[N] = {}, dy[N], x[N];
        if (!a.overwrite) device::load_some(dx, a.dx + row + c, count, a.vectors);
        device::load_some(dy, a.dy + row + c, count, a.vectors);
        device::load_some(x, a.x + row + c, count, a.vectors);
        write_dx(a, bt, c, count, a.vectors, dx, dy, x, mean, rstd, mean_g, mean_gn);
    }
}

// dw, db and dx_sum of chunk blockIdx.y for rows of any width and alignment: a thread has four columns (so that the
// sums leave in full sectors) and walks over the rows.
template <class T>
__global__ void __launch_bounds__(kThreads) layernorm_backward_wide_columns_kernel(SIMT_PARAM Backward<T> a) {
    constexpr int N = kWideColumns;
    const int c = (int(blockIdx.x) * kThreads + int(threadIdx.x)) * N, count = min(a.C - c, N);
    const size_t C = size_t(a.C), first = size_t(blockIdx.y) * a.rows;
    float dw[N] = {}, db[N] = {}, dx_sum[N] = {};
    for (size_t bt = first; bt < first + a.rows && bt < size_t(a.BT); bt++) {
        const float mean = a.mean[bt], rstd = a.rstd[bt];
        float dy[N], x[N];
        device::load_some(dy, a.dy + bt * C + c, count, a.vectors);
        device::load_some(x, a.x + bt * C + c, count, a.vectors);
        SIMT_UNROLL
        for (int i = 0; i < N; i++) {
            dw[i] += dy[i] * ((x[i] - mean) * rstd);
            db[i] += dy[i];
        }
        if (a.sums < 3) continue;
        device::load_some(x, a.dx + bt * C + c, count, a.vectors);
        SIMT_UNROLL
        for (int i = 0; i < N; i++) dx_sum[i] += x[i];
    }
    float* partial = a.partial + blockIdx.y * (a.sums * C);  // (sums, C)
    device::store_some(partial + c, dw, count, a.vectors);
    device::store_some(partial + C + c, db, count, a.vectors);
    if (a.sums == 3) device::store_some(partial + 2 * C + c, dx_sum, count, a.vectors);
}

// dw, db, dx_sum (+)= the sums over chunks: a lane per column of (sums, C), a block's warps take turns with the chunks.
__global__ void layernorm_combine_kernel(float* dw,             // (C)
                                         float* db,             // (C) or null
                                         float* dx_sum,         // (C) or null
                                         const float* partial,  // (chunks, sums, C)
                                         int chunks, int sums, int C, bool accumulate) {
    SIMT_SHARED(float, part, [32][32]);
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, n_warps = int(blockDim.x) / 32;
    const size_t column = size_t(blockIdx.x) * 32 + lane, width = size_t(sums) * C;
    float sum = 0;
    for (int i = warp; i < chunks && column < width; i += n_warps) sum += partial[i * width + column];
    part[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= width) return;
    const size_t which = column / size_t(C);
    float* out = which == 0 ? dw : which == 1 ? db : dx_sum;  // (C)
    if (!out) return;
    out += column - which * size_t(C);
    sum = 0;
    for (int i = 0; i < n_warps; i++) sum += part[i][lane];
    *out = accumulate ? *out + sum : sum;
}

template <class T>
void launch_forward(const Forward<T>& a, Stream s) {
    const auto run = [&](auto* kernel, size_t blocks) {
        cuda::launch(kernel, dim3(unsigned(blocks)), dim3(kThreads), 0, s, a);
    };
    const size_t blocks = cuda::blocks_for(size_t(a.BT), kWarps);
    if (!a.vectors || a.C > 32 * 64)
        run(layernorm_forward_wide_kernel<T>, size_t(a.BT));
    else if (a.C <= 32 * 8)
        run(layernorm_forward_kernel<T, 8>, blocks);
    else if (a.C <= 32 * 24)
        run(layernorm_forward_kernel<T, 24>, blocks);
    else if (a.C <= 32 * 32)
        run(layernorm_forward_kernel<T, 32>, blocks);
    else
        run(layernorm_forward_kernel<T, 64>, blocks);
}

template <class T>
void launch_backward(const Backward<T>& a, size_t chunks, Stream s) {
    const auto run = [&](auto* kernel, dim3 blocks) { cuda::launch(kernel, blocks, dim3(kThreads), 0, s, a); };
    if (!a.vectors || a.C > 32 * 32 * 8) {
        run(layernorm_backward_wide_kernel<T>, dim3(unsigned(a.BT)));
        run(layernorm_backward_wide_columns_kernel<T>,
            dim3(cuda::blocks_for(size_t(a.C), size_t(kThreads) * kWideColumns), unsigned(chunks)));
        return;
    }
    const auto in_registers = [&]<int Columns, int W>() {
        const dim3 blocks{unsigned(chunks)};
        if (a.sums == 3)
            run(layernorm_backward_kernel<T, Columns, W, true>, blocks);
        else
            run(layernorm_backward_kernel<T, Columns, W, false>, blocks);
    };
    if (a.C <= 32 * 8)
        in_registers.template operator()<8, 1>();
    else if (a.C <= 32 * 24)
        in_registers.template operator()<24, 1>();
    else if (a.C <= 32 * 32)
        in_registers.template operator()<32, 1>();
    else if (a.C <= 32 * 32 * 2)
        in_registers.template operator()<32, 2>();
    else
        in_registers.template operator()<32, 8>();
}
}  // namespace

namespace cuda {
void layernorm_forward(const LayerNorm& a, Stream s) {
    with_real(a.x.dtype, [&]<class T>() {
        Forward<T> f = {.y = a.y.as<T>(),
                        .mean = a.mean.as<float>(),
                        .rstd = a.rstd.as<float>(),
                        .x = a.x.as<T>(),
                        .w = a.w.as<T>(),
                        .b = a.b.as<T>(),
                        .BT = a.BT,
                        .C = a.C,
                        .eps = a.eps,
                        .vectors = false};
        f.vectors = a.C % kVec<T> == 0 && device::aligned16(f.y, f.x, f.w, f.b);
        launch_forward(f, s);
    });
}

void layernorm_backward(const LayerNormGrad& a, Stream s) {
    const size_t BT = size_t(a.BT), C = size_t(a.C);
    const size_t room =
        std::max<size_t>(1, kWorkspaceBytes / (3 * C * sizeof(float)));  // chunks that the workspace holds
    const size_t few = std::clamp(BT / kChunks / kWarps * kWarps, kMinRows, kMaxRowsOfFew);  // rows of a chunk
    const size_t most = std::min(kMaxChunks, room), rows = std::max(few, (BT + most - 1) / most);
    const size_t chunks = (BT + rows - 1) / rows;
    const int sums = a.dx_sum ? 3 : 2;
    float* partial = workspace<float>(s, chunks * sums * C, "layernorm_backward");  // (chunks, sums, C)
    with_real(a.x.dtype, [&]<class T>() {
        Backward<T> b = {.dx = a.dx.as<T>(),
                         .partial = partial,
                         .dy = a.dy.as<T>(),
                         .x = a.x.as<T>(),
                         .w = a.w.as<T>(),
                         .mean = a.mean.as<float>(),
                         .rstd = a.rstd.as<float>(),
                         .BT = a.BT,
                         .C = a.C,
                         .rows = int(rows),
                         .sums = sums,
                         .overwrite = a.overwrite_dx,
                         .vectors = false};
        b.vectors = C % kVec<T> == 0 && device::aligned16(b.dx, b.dy, b.x, b.w);
        launch_backward(b, chunks, s);
    });
    const unsigned warps = unsigned(std::min<size_t>(chunks, 32));
    cuda::launch(layernorm_combine_kernel, dim3(blocks_for(sums * C, 32)), dim3(32 * warps), 0, s, a.dw.as<float>(),
                 a.db.as<float>(), a.dx_sum.as<float>(), partial, int(chunks), sums, a.C, a.accumulate);
}
}  // namespace cuda
