// Linear: a matrix product, then bias, GELU and residual.
//
//   forward    y = gelu(x w + b) + residual                      pre_gelu = x w + b is kept
//   backward   dx = dy w^T [* gelu'(pre_gelu)]       dw (+)= x^T dy       db (+)= sum_bt dy
//
//   shapes     x, dx (BT, C)    y, dy (BT, OC)    w, dw (C, OC), or (OC, C) when w_transposed    b, db (OC)
//   traffic    products: see gemm.h.  Fused, the bias, the residual and both GELUs cost no pass of their own.  Apart,
//              because they cannot be fused or timing chose so (gemm_tuning.h): one more write and read of y, and
//              GELU's own 2n or 3n.  db: 1 read of dy, and at most 1/16 of its bytes for the partial sums; none where
//              timing chose to fuse the sums to the product
//   bound      products: compute.  db: memory
//   limits     any BT, C, OC from 1 to 2^31 - 512
//   order      products: the library's, the same from run to run on one kind of GPU.  db: a chunk of rows is summed by
//              8 warps, each over every eighth row in order; then the warps' sums in order; then the chunks' sums in
//              the same way.  Chunks depend on the shape alone, so db has the same bits on every GPU (fused to the
//              product it has the library's order)
//   rounding   bf16: each store of y, pre_gelu, dx rounds once.  A fused GELU sees the fp32 sum; a separate one sees
//              pre_gelu as stored, which moves y by gelu' 2^-8 |pre_gelu|.  A separate gelu' multiplies a dx that was
//              rounded before, 2^-8 |dx| more.  The backward pass always sees pre_gelu as stored.  A bias that is not
//              fused goes first into y together with the residual (rounded where both are given), and the product is
//              added to that
#include "kernels/cuda/launch.h"
#include "kernels/cuda/gemm.h"
#include "kernels/elementwise.cuh"

namespace {
using device::aligned16;

// y = residual + b, or b alone, in every row; then a product is added to y.
template <class T>
__global__ void linear_bias_kernel(T* y,               // (BT, OC)
                                   const T* residual,  // (BT, OC), null, or y itself
                                   const T* b,         // (OC)
                                   int OC, bool vectors) {
    constexpr int N = device::kVec<T>;
    const size_t row = size_t(blockIdx.x) * OC;
    for (int j = int(threadIdx.x) * N; j < OC; j += int(blockDim.x) * N) {
        const int count = OC - j < N ? OC - j : N;
        float v[N], r[N] = {};
        device::load_some(v, b + j, count, vectors);
        if (residual) device::load_some(r, residual + row + j, count, vectors);
        SIMT_UNROLL
        for (int i = 0; i < N; i++) v[i] += r[i];
        device::store_some(y + row + j, v, count, vectors);
    }
}

// Column sums.  A block has 32 N columns of one chunk of rows; a warp takes every kWarps-th row.  The rows of a warp do
// not depend on N, so neither do the bits.
constexpr int kWarps = 8, kBatch = 4;  // kBatch rows are in flight per thread
using Four = device::Vec<float, 4>;

template <class T, int N>
__global__ void __launch_bounds__(kWarps * 32)
    linear_column_sum_kernel(float* sums,  // (chunks, columns)  out  =, or +=
                             const T* x,   // (rows, columns)
                             int rows, int columns, int rows_of_chunk, bool accumulate) {
    SIMT_SHARED(Four, part, [kWarps][8 * N]);  // (warps, 32 N)
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const int first = int(blockIdx.x) * 32 * N, column = first + lane * N, chunk = int(blockIdx.y);
    const int begin = chunk * rows_of_chunk;
    const int end = rows - begin < rows_of_chunk ? rows : begin + rows_of_chunk;

    float sum[N] = {};
    if (column < columns) {  // then column + N <= columns: N divides columns
        for (int r = begin + warp; r < end; r += kBatch * kWarps) {
            float v[kBatch][N] = {};
            SIMT_UNROLL
            for (int k = 0; k < kBatch; k++) {
                const int row = r + k * kWarps;
                if (row < end) device::load<N>(v[k], x + size_t(row) * columns + column);
            }
            SIMT_UNROLL
            for (int k = 0; k < kBatch; k++) {
                SIMT_UNROLL
                for (int i = 0; i < N; i++) sum[i] += v[k][i];
            }
        }
    }
    if constexpr (N == 1) {
        part[warp][lane / 4][lane % 4] = sum[0];
    } else {
        SIMT_UNROLL
        for (int i = 0; i < N; i += 4) {
            const Four four = {{sum[i], sum[i + 1], sum[i + 2], sum[i + 3]}};
            simt::st_vec(&part[warp][device::spread((lane * N + i) / 4)], four);
        }
    }
    __syncthreads();
    for (int c = int(threadIdx.x); c < 32 * N && first + c < columns; c += kWarps * 32) {
        float total = 0;
        SIMT_UNROLL
        for (int w = 0; w < kWarps; w++) total += part[w][device::spread(c / 4)][c % 4];
        float* to = sums + size_t(chunk) * columns + first + c;
        *to = accumulate ? *to + total : total;
    }
}

template <class T, int N>
void launch_column_sum(float* sums, const T* x, int rows, int columns, int rows_of_chunk, bool accumulate, Stream s) {
    const dim3 grid(cuda::blocks_for(size_t(columns), 32 * N), cuda::blocks_for(size_t(rows), size_t(rows_of_chunk)));
    cuda::launch(linear_column_sum_kernel<T, N>, grid, dim3(kWarps * 32), 0, s, sums, x, rows, columns, rows_of_chunk,
                 accumulate);
}

// Rows of a chunk: about 512 blocks of 256 columns keep the largest GPU busy; at least 64 rows, so that partial sums
// are few: at most 512 * 256, half a megabyte.  More columns than that are summed in one chunk.
int chunk_rows(int rows, int columns) {
    const size_t tiles = (size_t(columns) + 255) / 256, chunks = tiles < 512 ? 512 / tiles : 1;
    const size_t each = (size_t(rows) + chunks - 1) / chunks;
    return int((each + 63) / 64 * 64);
}

// db (+)= column sums of dy.
template <class T>
void column_sums(float* db, const T* dy, int BT, int OC, bool accumulate, Stream s) {
    constexpr int N = device::kVec<T>;
    const int each = chunk_rows(BT, OC), chunks = int(cuda::blocks_for(size_t(BT), size_t(each)));
    float* sums = chunks == 1 ? db : cuda::workspace<float>(s, size_t(chunks) * OC, "linear.db");  // (chunks, OC)
    const bool add = chunks == 1 && accumulate;
    if (OC % N == 0 && aligned16(dy))
        launch_column_sum<T, N>(sums, dy, BT, OC, each, add, s);
    else
        launch_column_sum<T, 1>(sums, dy, BT, OC, each, add, s);
    // One column per thread: few rows are left, so many blocks matter more than wide accesses.
    if (chunks > 1) launch_column_sum<float, 1>(db, sums, chunks, OC, chunks, accumulate, s);
}

// target = x w + b + residual; the bias is in the product's epilogue, or the product is added to the bias.
template <class T>
void product_and_bias(const Linear& a, const Buf& target, Stream s) {
    cuda::Gemm g = {.d = target,
                    .a = a.x,
                    .b = a.w,
                    .c = a.residual,
                    .bias = a.b,
                    .M = a.BT,
                    .N = a.OC,
                    .K = a.C,
                    .b_transposed = a.w_transposed};
    if (!a.b) return cuda::gemm(g, s);
    cuda::gemm_or(g, s, [&] {
        constexpr int N = device::kVec<T>;
        T* y = target.as<T>();                   // (BT, OC)
        const T* residual = a.residual.as<T>();  // (BT, OC) or null
        const T* b = a.b.as<T>();                // (OC)
        const unsigned warps = cuda::blocks_for(size_t(a.OC), 32 * N);
        cuda::launch(linear_bias_kernel<T>, dim3(unsigned(a.BT)), dim3(32 * (warps < 8 ? warps : 8)), 0, s, y, residual,
                     b, a.OC, a.OC % N == 0 && aligned16(y, residual, b));
        cuda::Gemm plain = g;
        plain.bias = {};
        plain.c = target;
        cuda::gemm(plain, s);
    });
}

template <class T>
void check_dtypes(std::initializer_list<Buf> all) {
    for (const Buf& b : all) b.as<T>();
}

template <class T>
void forward(const Linear& a, Stream s) {
    check_dtypes<T>({a.y, a.pre_gelu, a.x, a.w, a.b, a.residual});
    if (!a.pre_gelu) return product_and_bias<T>(a, a.y, s);
    const auto apart = [&] {
        product_and_bias<T>(a, a.pre_gelu, s);
        cuda::gelu_forward({.y = a.y, .x = a.pre_gelu}, s);
    };
    if (!a.fuse_gelu) return apart();
    const cuda::Gemm fused = {.d = a.y,
                              .a = a.x,
                              .b = a.w,
                              .bias = a.b,
                              .pre_gelu = a.pre_gelu,
                              .M = a.BT,
                              .N = a.OC,
                              .K = a.C,
                              .b_transposed = a.w_transposed};
    cuda::gemm_or(fused, s, apart);
}

// dx = dy w^T as a product of (BT, OC) and (OC, C).
void input_gradient(const LinearGrad& a, Stream s) {
    cuda::Gemm g = {.d = a.dx,
                    .a = a.dy,
                    .b = a.w,
                    .through_gelu = a.pre_gelu,
                    .M = a.BT,
                    .N = a.C,
                    .K = a.OC,
                    .b_transposed = !a.w_transposed};
    if (!a.pre_gelu) return cuda::gemm(g, s);
    cuda::gemm_or(g, s, [&] {
        cuda::Gemm plain = g;
        plain.through_gelu = {};
        cuda::gemm(plain, s);
        cuda::gelu_backward({.dx = a.dx, .dy = a.dx, .x = a.pre_gelu}, s);
    });
}

// dw (+)= x^T dy, or dy^T x when w_transposed, and db: the epilogue can write the sums of db, but not add to them.
template <class T>
void weight_gradient(const LinearGrad& a, Stream s) {
    const cuda::Gemm product = {.d = a.dw,
                                .a = a.w_transposed ? a.dy : a.x,  // (BT, M)
                                .b = a.w_transposed ? a.x : a.dy,  // (BT, N)
                                .c = a.accumulate ? a.dw : Buf(),
                                .M = a.w_transposed ? a.OC : a.C,
                                .N = a.w_transposed ? a.C : a.OC,
                                .K = a.BT,
                                .a_transposed = true};
    const auto apart = [&] {
        cuda::gemm(product, s);
        if (a.db) column_sums(a.db.as<float>(), a.dy.as<T>(), a.BT, a.OC, a.accumulate, s);
    };
    if (!a.db || a.accumulate) return apart();
    cuda::Gemm fused = product;
    (a.w_transposed ? fused.sums_a : fused.sums_b) = a.db;
    cuda::gemm_or(fused, s, apart);
}

template <class T>
void backward(const LinearGrad& a, Stream s) {
    check_dtypes<T>({a.dx, a.dy, a.x, a.w, a.pre_gelu});
    check_dtypes<float>({a.dw, a.db});
    if (a.dx) input_gradient(a, s);
    weight_gradient<T>(a, s);
}
}  // namespace

namespace cuda {
void linear_forward(const Linear& a, Stream s) {
    with_real(a.y.dtype, [&]<class T>() { forward<T>(a, s); });
}

void linear_backward(const LinearGrad& a, Stream s) {
    with_real(a.dy.dtype, [&]<class T>() { backward<T>(a, s); });
}
}  // namespace cuda
