// Linear: a matrix product, then bias, GELU and residual.
//
//   forward    y = gelu(x w + b) + residual                      pre_gelu = x w + b is kept
//   backward   dx = dy w^T [* gelu'(pre_gelu)]       dw (+)= x^T dy       db (+)= sum_bt dy
//
//   shapes     x, dx (BT, C)    y, dy (BT, OC)    w, dw (C, OC), or (OC, C) when w_transposed    b, db (OC)
//   traffic    each operand once per row or column of tiles; bias, GELU and residual while a tile is in cache.
//   bound      compute
//   limits     any BT, C, OC >= 1
//   order      tiles by shape alone (gemm.h); db: 32 rows are summed in order, then these sums in order
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/gelu_math.h"
#include "kernels/cpu/gemm.h"

namespace {
constexpr int kSumColumns = 64;  // columns of db that one task sums: 256 bytes of each row
constexpr int kSumRows = 32;     // rows of a partial sum: the rounding error grows with 32 + BT/32 instead of BT

// Bias, GELU and residual on one tile of y.  All tensors have rows of OC elements.
template <class T>
struct Epilogue {
    T* y;               // (BT, OC)
    T* pre_gelu;        // (BT, OC) or null
    const T* b;         // (OC) or null
    const T* residual;  // (BT, OC) or null; also null when the product is added to it
    int OC;

    void operator()(cpu::Tile t) const {
        if (!b && !pre_gelu && !residual) return;
        for (int i = t.i; i < t.i + t.m; i++) {
            const size_t begin = size_t(i) * OC + t.j;
            const T* bias = b ? b + t.j : nullptr;  // (t.n)
            if (pre_gelu) {
                gelu_row(y + begin, pre_gelu + begin, bias, t.n);
            } else {
                if (bias) add_row(y + begin, bias, t.n);
                if (residual) add_row(y + begin, residual + begin, t.n);
            }
        }
    }
    static void add_row(T* y, const T* x, int n) {
#pragma omp simd
        for (int j = 0; j < n; j++) y[j] += x[j];
    }
    static void gelu_row(T* y, T* pre, const T* bias, int n) {
        if (bias) add_row(pre, bias, n);
#pragma omp simd
        for (int j = 0; j < n; j++) y[j] = cpu::gelu(pre[j]);
    }
};

template <class T>
void forward(const Linear& p) {
    const bool in_place = p.residual && p.residual.data == p.y.data;  // then the product is added to y
    T* y = p.y.as<T>();                                               // (BT, OC)
    T* pre_gelu = p.pre_gelu.as<T>();                                 // (BT, OC) or null
    const cpu::Gemm<T> product = {.c = pre_gelu ? pre_gelu : y,
                                  .a = p.x.as<T>(),
                                  .b = p.w.as<T>(),
                                  .M = p.BT,
                                  .N = p.OC,
                                  .K = p.C,
                                  .b_transposed = p.w_transposed,
                                  .accumulate = in_place};
    const Epilogue<T> epilogue = {.y = y,
                                  .pre_gelu = pre_gelu,
                                  .b = p.b.as<T>(),
                                  .residual = in_place ? nullptr : p.residual.as<T>(),
                                  .OC = p.OC};
    cpu::team(size_t(p.BT) * p.OC * p.C, [&] { return cpu::share_gemm(product, epilogue); });
}

// db (+)= column sums of dy, shared out among the threads of a team by columns.
template <class T>
void share_column_sums(T* db, const T* dy, int BT, int OC, bool accumulate) {
#pragma omp for schedule(dynamic, 1) nowait
    for (int j = 0; j < OC; j += kSumColumns) {
        const int n = OC - j < kSumColumns ? OC - j : kSumColumns;
        T total[kSumColumns] = {};
        for (int begin = 0; begin < BT; begin += kSumRows) {
            const int end = BT - begin < kSumRows ? BT : begin + kSumRows;
            T part[kSumColumns] = {};
            for (int i = begin; i < end; i++) {
                const T* row = dy + size_t(i) * OC + j;  // (n)
#pragma omp simd
                for (int c = 0; c < n; c++) part[c] += row[c];
            }
            for (int c = 0; c < n; c++) total[c] += part[c];
        }
        for (int c = 0; c < n; c++) db[j + c] = accumulate ? db[j + c] + total[c] : total[c];
    }
}

// dx = dy w^T as a product of (BT, OC) and (OC, C).
template <class T>
cpu::Gemm<T> input_product(const LinearGrad& p) {
    return {.c = p.dx.as<T>(),
            .a = p.dy.as<T>(),
            .b = p.w.as<T>(),
            .M = p.BT,
            .N = p.C,
            .K = p.OC,
            .b_transposed = !p.w_transposed};
}
// dw (+)= x^T dy, or dy^T x when w_transposed.
template <class T>
cpu::Gemm<T> weight_product(const LinearGrad& p) {
    const Buf& left = p.w_transposed ? p.dy : p.x;   // (BT, M)
    const Buf& right = p.w_transposed ? p.x : p.dy;  // (BT, N)
    return {.c = p.dw.as<T>(),
            .a = left.as<T>(),
            .b = right.as<T>(),
            .M = p.w_transposed ? p.OC : p.C,
            .N = p.w_transposed ? p.C : p.OC,
            .K = p.BT,
            .a_transposed = true,
            .accumulate = p.accumulate};
}

template <class T>
void backward(const LinearGrad& p) {
    const cpu::Gemm<T> dx = input_product<T>(p), dw = weight_product<T>(p);
    const T* pre_gelu = p.pre_gelu.as<T>();  // (BT, C) or null
    const T* dy = p.dy.as<T>();              // (BT, OC)
    T* db = p.db.as<T>();                    // (OC) or null
    const auto through_gelu = [&](cpu::Tile t) {
        if (!pre_gelu) return;
        for (int i = t.i; i < t.i + t.m; i++) {
            const size_t begin = size_t(i) * p.C + t.j;
            T* d = dx.c + begin;            // (t.n)
            const T* x = pre_gelu + begin;  // (t.n)
#pragma omp simd
            for (int j = 0; j < t.n; j++) d[j] *= cpu::gelu_grad(x[j]);
        }
    };
    // One team, no barrier between the three jobs: a thread that finds no tile left goes on to the next job.
    cpu::team(size_t(p.BT) * p.OC * p.C, [&] {
        bool ok = !dx.c || cpu::share_gemm(dx, through_gelu);
        ok = cpu::share_gemm(dw, cpu::no_epilogue) && ok;
        if (db) share_column_sums(db, dy, p.BT, p.OC, p.accumulate);
        return ok;
    });
}
}  // namespace

namespace cpu {
void linear_forward(const Linear& p, Stream) {
    with_real(p.y.dtype, [&]<class T>() { forward<T>(p); });
}

void linear_backward(const LinearGrad& p, Stream) {
    with_real(p.dy.dtype, [&]<class T>() { backward<T>(p); });
}
}  // namespace cpu
