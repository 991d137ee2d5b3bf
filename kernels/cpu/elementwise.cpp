// The small ones: y += x, and sums along rows.
//
//   add        y[i] += x[i]                 shapes (n)                   bound: memory
//   row_sum    y[b] = sum_t x[b,t]          shapes y (B), x (B, T)       order: t ascending, in double
#include "kernels/cpu/cpu.h"

namespace {
template <class T>
void add_range(T* y, const T* x, size_t n) {  // y, x (n)
#pragma omp parallel for simd schedule(static) if (n >= cpu::kParallelFrom)
    for (size_t i = 0; i < n; i++) y[i] += x[i];
}

template <class T>
void row_sums(T* y, const T* x, int B, size_t n) {  // y (B), x (B, n)
    for (int b = 0; b < B; b++) {
        double sum = 0;
        for (size_t t = 0; t < n; t++) sum += double(x[b * n + t]);
        y[b] = T(sum);
    }
}
}  // namespace

namespace cpu {
void add(const Add& a, Stream) {
    expect_size("add.y", a.y, a.x.count, "add.x");
    with_real(a.y.dtype, [&]<class T>() { add_range(a.y.as<T>(), a.x.as<T>(), a.y.count); });
}

void row_sum(const RowSum& a, Stream) {
    expect_size("row_sum.y", a.y, size_t(a.B), "B");
    expect_size("row_sum.x", a.x, size_t(a.B) * a.T, "B*T");
    with_real(a.x.dtype, [&]<class T>() { row_sums(a.y.as<T>(), a.x.as<T>(), a.B, size_t(a.T)); });
}
}  // namespace cpu
