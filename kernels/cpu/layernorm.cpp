// LayerNorm over the last axis.
//
//   forward    mu = mean_c x[c]      r = (mean_c (x[c]-mu)^2 + eps)^-1/2      y[c] = (x[c]-mu) r w[c] + b[c]
//   backward   n = (x-mu) r,  g = dy*w      dx (+)= r (g - mean_c g - n mean_c(g n))
//              dw (+)= sum_bt dy n      db (+)= sum_bt dy      dx_sum (+)= sum_bt dx
//
//   shapes     x, y, dx, dy (BT, C)    w, b, dw, db (C)    mean, rstd (BT)
//   traffic    forward one read and one write, backward two reads and one read-write: later passes over a row hit L1.
//   limits     any BT, C >= 1.   bound: memory
//   order      a row's sums: SIMD lanes, then these in order.  dw, db, dx_sum: rows of a chunk ascending, then
//              chunks; the number of chunks follows from BT alone.
#include "kernels/cpu/cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {
constexpr size_t kMinRows = 16;    // of a chunk
constexpr size_t kMaxChunks = 64;  // more chunks could keep more threads busy but cost more scratch

template <class T>
void forward_row(const LayerNorm& a, size_t bt) {
    const size_t C = size_t(a.C);
    T* y = a.y.as<T>() + bt * C;                 // (C)
    const T* x = a.x.as<T>() + bt * C;           // (C)
    const T *w = a.w.as<T>(), *b = a.b.as<T>();  // (C)
    T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t c = 0; c < C; c++) sum += x[c];
    const T mean = sum / T(C);
#pragma omp simd reduction(+ : squares)
    for (size_t c = 0; c < C; c++) squares += (x[c] - mean) * (x[c] - mean);
    const T rstd = T(1) / std::sqrt(squares / T(C) + T(a.eps));
    if (b) {
#pragma omp simd
        for (size_t c = 0; c < C; c++) y[c] = (x[c] - mean) * rstd * w[c] + b[c];
    } else {
#pragma omp simd
        for (size_t c = 0; c < C; c++) y[c] = (x[c] - mean) * rstd * w[c];
    }
    a.mean.as<T>()[bt] = mean;
    a.rstd.as<T>()[bt] = rstd;
}

// One row of the backward; adds to the chunk's dw, db and dx_sum (C).
template <class T>
void backward_row(const LayerNormGrad& a, size_t bt, T* dw, T* db, T* dx_sum) {
    const size_t C = size_t(a.C);
    T* dx = a.dx.as<T>() + bt * C;        // (C)
    const T* dy = a.dy.as<T>() + bt * C;  // (C)
    const T* x = a.x.as<T>() + bt * C;    // (C)
    const T* w = a.w.as<T>();             // (C)
    const T mean = a.mean.as<T>()[bt], rstd = a.rstd.as<T>()[bt];
    T sum_g = 0, sum_gn = 0;
#pragma omp simd reduction(+ : sum_g, sum_gn)
    for (size_t c = 0; c < C; c++) {
        const T n = (x[c] - mean) * rstd, g = dy[c] * w[c];
        sum_g += g;
        sum_gn += g * n;
        dw[c] += dy[c] * n;
        db[c] += dy[c];
    }
    const T mean_g = sum_g / T(C), mean_gn = sum_gn / T(C);
    if (a.overwrite_dx) std::fill(dx, dx + C, T(0));  // the loop below finds the row in L1
#pragma omp simd
    for (size_t c = 0; c < C; c++) {
        const T n = (x[c] - mean) * rstd;
        dx[c] += rstd * (dy[c] * w[c] - mean_g - n * mean_gn);
        dx_sum[c] += dx[c];
    }
}

// y (C) = or += the sum of `chunks` rows that lie `stride` apart.
template <class T>
void combine(T* y, const T* partial, size_t chunks, size_t stride, size_t C, bool accumulate) {
    for (size_t c = 0; c < C; c++) {
        T sum = 0;
        for (size_t i = 0; i < chunks; i++) sum += partial[i * stride + c];
        y[c] = accumulate ? y[c] + sum : sum;
    }
}

template <class T>
void backward(const LayerNormGrad& a) {
    const size_t BT = size_t(a.BT), C = size_t(a.C);
    const size_t rows = std::max(kMinRows, (BT + kMaxChunks - 1) / kMaxChunks), chunks = (BT + rows - 1) / rows;
    static thread_local std::vector<T> kept;  // of the calling thread
    if (kept.size() < chunks * 3 * C) kept.resize(chunks * 3 * C);
    T* partial = kept.data();  // (chunks, 3, C): dw, db, dx_sum
#pragma omp parallel for schedule(static) if (BT * C >= cpu::kParallelFrom)
    for (size_t i = 0; i < chunks; i++) {
        T *dw = partial + i * 3 * C, *db = dw + C, *dx_sum = db + C;  // (C)
        std::fill(dw, dx_sum + C, T(0));
        for (size_t bt = i * rows; bt < std::min(BT, (i + 1) * rows); bt++) backward_row(a, bt, dw, db, dx_sum);
    }
    combine(a.dw.as<T>(), partial, chunks, 3 * C, C, a.accumulate);
    if (a.db) combine(a.db.as<T>(), partial + C, chunks, 3 * C, C, a.accumulate);
    if (a.dx_sum) combine(a.dx_sum.as<T>(), partial + 2 * C, chunks, 3 * C, C, a.accumulate);
}
}  // namespace

namespace cpu {
void layernorm_forward(const LayerNorm& a, Stream) {
    const size_t BT = size_t(a.BT), C = size_t(a.C);
    with_real(a.x.dtype, [&]<class T>() {
        expect_dtype<T>({a.y, a.mean, a.rstd, a.x, a.w, a.b});
#pragma omp parallel for schedule(static) if (BT * C >= kParallelFrom)
        for (size_t bt = 0; bt < BT; bt++) forward_row<T>(a, bt);
    });
}

void layernorm_backward(const LayerNormGrad& a, Stream) {
    with_real(a.x.dtype, [&]<class T>() {
        expect_dtype<T>({a.dx, a.dw, a.db, a.dx_sum, a.dy, a.x, a.w, a.mean, a.rstd});
        backward<T>(a);
    });
}
}  // namespace cpu
