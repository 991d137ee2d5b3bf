// A small matrix product on packed tiles that fit the caches: the inner loop of attention.
//
//   c (M, N) = a (M, K) b (K, N),  or  c += a b        a is stored either way round: no product needs a transpose
//
//   limits     N a multiple of kLanes: callers pad rows of b and c with zeros;  any M, K >= 1
//   order      each element of c is one chain of fused multiply-adds, k ascending, whatever M and N are
//
// gcc's vector types keep the R x C block of sums in registers, which its loop vectoriser does not.
#pragma once
#include <cstddef>

namespace cpu {
#ifdef __AVX512F__
constexpr int kVectorBytes = 64, kBlockRows = 8;  // 16 sums, 2 of b, 1 of a: 19 of 32 registers
#else
constexpr int kVectorBytes = 32, kBlockRows = 4;  // 8 sums, 2 of b, 1 of a: 11 of 16 registers
#endif
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

// Element (m, k) is p[m * row + k * column].
template <class T>
struct Strided {
    const T* p;
    size_t row, column;
};
struct Extent {
    int M, N, K;
};

// R rows and C vectors of columns.
template <int R, int C, class T>
void block_matmul(T* c, size_t ldc, Strided<T> a, const T* b, size_t ldb, int K, bool accumulate) {
    typedef T V __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
    V sum[R][C];
#pragma GCC unroll 8  // every loop over r and n: an index left at run time would put the sums in memory
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int n = 0; n < C; n++) sum[r][n] = accumulate ? *reinterpret_cast<V*>(c + r * ldc + n * kLanes<T>) : V{};
    for (int k = 0; k < K; k++, b += ldb, a.p += a.column) {
        V right[C];
#pragma GCC unroll 2
        for (int n = 0; n < C; n++) right[n] = *reinterpret_cast<const V*>(b + n * kLanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int n = 0; n < C; n++) sum[r][n] += a.p[r * a.row] * right[n];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int n = 0; n < C; n++) *reinterpret_cast<V*>(c + r * ldc + n * kLanes<T>) = sum[r][n];
}

// C vectors of columns, all rows.
template <int C, class T>
void panel_matmul(T* c, size_t ldc, Strided<T> a, const T* b, size_t ldb, Extent e, bool accumulate) {
    int m = 0;
    const auto rows = [&]<int R>() {
        for (; m + R <= e.M; m += R)
            block_matmul<R, C>(c + m * ldc, ldc, {a.p + m * a.row, a.row, a.column}, b, ldb, e.K, accumulate);
    };
    rows.template operator()<kBlockRows>();
    if constexpr (kBlockRows > 4) rows.template operator()<4>();
    rows.template operator()<2>();
    rows.template operator()<1>();
}

template <class T>
void tile_matmul(T* c, size_t ldc, Strided<T> a, const T* b, size_t ldb, Extent e, bool accumulate) {
    int n = 0;
    for (; n + 2 * kLanes<T> <= e.N; n += 2 * kLanes<T>) panel_matmul<2>(c + n, ldc, a, b + n, ldb, e, accumulate);
    if (n < e.N) panel_matmul<1>(c + n, ldc, a, b + n, ldb, e, accumulate);
}
}  // namespace cpu
