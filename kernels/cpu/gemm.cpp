// Tile shapes, the oneDNN call for float, the plain loop for double.
#include "kernels/cpu/gemm.h"

#include <oneapi/dnnl/dnnl.h>

#include <span>

namespace {
int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Shape {
    int m, n;
};
// From large to small.  oneDNN's AVX-512 kernel computes 48 columns at a time, so widths are multiples of 48; on one
// core of a Zen 4 each of these is within 5 % of the whole product in one call.
constexpr Shape kShapes[] = {{256, 384}, {128, 384}, {128, 192}, {64, 192}};
// b_transposed: oneDNN reorders B for every tile, which does not pay for few rows (128 rows: 15 % slower), and below
// 128 columns with a long K oneDNN takes a slower kernel (35 %).
constexpr Shape kShapesTransposed[] = {{512, 384}, {256, 384}, {256, 192}};
constexpr int kManyTiles = 16;                 // from this many on uneven shares hardly matter
constexpr size_t kTileWork = size_t(1) << 21;  // multiplications, about 40 us; a call costs a few us
// From this K on no cache holds a tile's operands, and tiles of 64 rows read them too often (8 % slower).
constexpr int kDeep = 8192, kManyDeepTiles = 8;
}  // namespace

namespace cpu {
Tiling tiling(const Gemm<float>& g) {
    const size_t work = size_t(g.M) * g.N * g.K, many = g.K < kDeep ? kManyTiles : kManyDeepTiles;
    const std::span<const Shape> shapes = g.b_transposed ? std::span<const Shape>(kShapesTransposed) : kShapes;
    const auto count = [&](const Shape& s) { return size_t(ceil_div(g.M, s.m)) * ceil_div(g.N, s.n); };
    size_t k = 0;
    while (k + 1 < shapes.size() && count(shapes[k]) < many && count(shapes[k + 1]) * kTileWork <= work) k++;
    const int columns = ceil_div(g.N, shapes[k].n);
    int rows = ceil_div(g.M, shapes[k].m);
    const size_t n = count(shapes[k]);
    if (n % 2 == 1 && n < many && (n + columns) * kTileWork <= work) rows++;  // a small odd number leaves a thread idle
    const int m = ceil_div(ceil_div(g.M, rows), 8) * 8;
    return {m, shapes[k].n, ceil_div(g.M, m), columns};
}

bool gemm_tile(const Gemm<float>& g, Tile t) {
    const int lda = g.a_transposed ? g.M : g.K, ldb = g.b_transposed ? g.K : g.N;
    const float* a = g.a + (g.a_transposed ? size_t(t.i) : size_t(t.i) * g.K);
    const float* b = g.b + (g.b_transposed ? size_t(t.j) * g.K : size_t(t.j));
    float* c = g.c + size_t(t.i) * g.N + t.j;
    return dnnl_sgemm(g.a_transposed ? 'T' : 'N', g.b_transposed ? 'T' : 'N', t.m, t.n, g.K, 1.0f, a, lda, b, ldb,
                      g.accumulate ? 1.0f : 0.0f, c, g.N) == dnnl_success;
}

// One row at a time: nothing is shared with the float tiles, so that a wrong tile shows against the reference.
Tiling tiling(const Gemm<double>& g) { return {1, g.N, g.M, 1}; }

bool gemm_tile(const Gemm<double>& g, Tile t) {
    constexpr int kColumns = 256;  // of one pass: the sums stay in the first-level cache
    const double* a = g.a + (g.a_transposed ? size_t(t.i) : size_t(t.i) * g.K);
    const size_t step = g.a_transposed ? size_t(g.M) : 1;  // between a's elements (i, k) and (i, k+1)
    for (int begin = t.j; begin < t.j + t.n; begin += kColumns) {
        const int n = t.j + t.n - begin < kColumns ? t.j + t.n - begin : kColumns;
        double sum[kColumns] = {};
        if (g.b_transposed) {
            for (int j = 0; j < n; j++) {
                const double* b = g.b + size_t(begin + j) * g.K;  // (K)
                double s = 0;
#pragma omp simd reduction(+ : s)
                for (int k = 0; k < g.K; k++) s += a[k * step] * b[k];
                sum[j] = s;
            }
        } else {
            for (int k = 0; k < g.K; k++) {
                const double* b = g.b + size_t(k) * g.N + begin;  // (n)
                for (int j = 0; j < n; j++) sum[j] += a[k * step] * b[j];
            }
        }
        double* c = g.c + size_t(t.i) * g.N + begin;  // (n)
        for (int j = 0; j < n; j++) c[j] = g.accumulate ? c[j] + sum[j] : sum[j];
    }
    return true;
}
}  // namespace cpu
