// Causal self-attention with a streaming softmax: no T x T matrix in memory.
//
//   forward    s_ij = q_i . k_j / sqrt(HS), j <= i     p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij)
//              y_i = sum_j f_ij p_ij v_j               f_ij = 0 or 1/(1-p): dropout, 1 without it
//   backward   D_i = dy_i . y_i     t_ij = dy_i . v_j     ds_ij = p_ij (f_ij t_ij - D_i)
//              dv_j = sum_i f_ij p_ij dy_i     dk_j = sum_i ds_ij q_i / sqrt(HS)     dq_i = sum_j ds_ij k_j / sqrt(HS)
//
//   shapes     qkv, dqkv (B, T, 3, NH, HS)    y, dy (B, T, NH, HS)    lse, scratch (B, NH, T)
//   work       forward 4, backward 10 multiply-adds per pair (i, j) and column, 64 x 64 pairs at a time in L1 and L2;
//              on the diagonal each strip of kBlockRows rows ends where it meets the diagonal.   bound: compute
//   limits     any T, HS >= 1: rows are padded with zeros to whole vectors in the packed tiles
//   order      forward: key blocks ascending, running maximum and sum per row.  Tasks: (b, h, 256 queries).
//              backward: key blocks ascending, for each the query blocks ascending.  Tasks: (b, h).
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/mask.h"
#include "kernels/cpu/math.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/tile.h"

namespace {
using cpu::Mask;
using cpu::tile_matmul;
constexpr int kTile = 64;    // queries and keys of a tile
constexpr int kGroup = 256;  // queries of a forward task: they share each packed key block
constexpr size_t kWords = Mask::words_for(kTile);

// One head of one sequence; the elements of consecutive t lie `row` apart in qkv and `y_row` apart in y.
template <class Real>
struct Head {
    const Real *q, *k, *v;  // (T, HS)
    size_t row, y_row;
    int T, HS;
    int b, h;
    Real scale() const { return Real(1) / std::sqrt(Real(HS)); }
    size_t HSp() const { return cpu::padded<Real>(size_t(HS)); }
    size_t element(int i, int j) const { return (size_t(h) * T + i) * T + j; }  // of the dropout mask
};
template <class Real>
Head<Real> head_of(const Buf& qkv, int T, int NH, int HS, int b, int h) {
    const size_t C = size_t(NH) * HS, row = 3 * C;
    const Real* q = qkv.as<Real>() + size_t(b) * T * row + size_t(h) * HS;
    return {q, q + C, q + 2 * C, row, C, T, HS, b, h};
}

// to (n, ld) = from (n, HS) * scale, columns HS..ld zero.
template <class Real>
void pack(Real* to, size_t ld, const Real* from, size_t row, int n, int HS, Real scale) {
    for (int i = 0; i < n; i++) {
#pragma omp simd
        for (int c = 0; c < HS; c++) to[i * ld + c] = from[i * row + c] * scale;
        std::fill(to + i * ld + HS, to + (i + 1) * ld, Real(0));
    }
}
// to (HS, kTile) = from (n, HS) transposed, columns n..kTile zero.
template <class Real>
void pack_transposed(Real* to, const Real* from, size_t row, int n, int HS) {
    for (int c = 0; c < HS && n < kTile; c++) std::fill(to + c * kTile + n, to + (c + 1) * kTile, Real(0));
    for (int i = 0; i < n; i++)  // reads along rows: `to` fits L1, while rows of qkv share few of L1's sets
        for (int c = 0; c < HS; c++) to[c * kTile + i] = from[i * row + c];
}

// Columns of s to compute for row r of a tile, in whole vectors: on the diagonal to the end of its strip, else all.
template <class Real>
int reach(int r, bool diagonal) {
    if (!diagonal) return kTile;
    const int strip_end = (r / cpu::kBlockRows + 1) * cpu::kBlockRows;
    return std::min(kTile, (strip_end + cpu::kLanes<Real> - 1) / cpu::kLanes<Real> * cpu::kLanes<Real>);
}

// s (M, kTile) = a (M, HS) b (HS, kTile), as far as each row reaches.
template <class Real>
void scores(Real* s, const Real* a, size_t lda, const Real* b, int M, int HS, bool diagonal) {
    const int step = diagonal ? cpu::kBlockRows : kTile;
    for (int m = 0; m < M; m += step)
        tile_matmul(s + m * kTile, kTile, {a + m * lda, lda, 1}, b, kTile,
                    {std::min(step, M - m), reach<Real>(m, diagonal), HS}, false);
}
// c (M, N) += s (M, K) b (K, N): on the diagonal only the columns of s up to each strip's end.
template <class Real>
void add_rows(Real* c, const Real* s, const Real* b, size_t N, int M, int K, bool diagonal) {
    const int step = diagonal ? cpu::kBlockRows : kTile;
    for (int m = 0; m < M; m += step)
        tile_matmul(c + m * N, N, {s + m * kTile, kTile, 1}, b, N,
                    {std::min(step, M - m), int(N), diagonal ? std::min(K, m + step) : K}, true);
}
// c (M, N) += s^T (M, K) b (K, N) with s (K, kTile): on the diagonal only the rows of s from each strip's start.
template <class Real>
void add_columns(Real* c, const Real* s, const Real* b, size_t N, int M, int K, bool diagonal) {
    const int step = diagonal ? cpu::kBlockRows : kTile;
    for (int m = 0; m < M; m += step) {
        const int k = diagonal ? m : 0;
        tile_matmul(c + m * N, N, {s + k * kTile + m, 1, kTile}, b + k * N, N, {std::min(step, M - m), int(N), K - k},
                    true);
    }
}

template <class Real>
void drop(Real* p, const uint32_t* word, int n, const Mask& mask) {  // p (n)
    const Real scale = Real(mask.scale);
#pragma omp simd
    for (int j = 0; j < n; j++) p[j] = word[j] < mask.below ? p[j] * scale : Real(0);
}

// State of a forward task's queries while the task walks the key blocks.
template <class Real>
struct Running {
    Real* o;      // (M, HSp)  sum of exp(s - m) v
    Real *m, *l;  // (M)       largest score, sum of exp(s - m)
};

// Turns the scores s (M, kTile) of queries i.. and keys j.. into weights, and rescales the sums so far.
template <class Real>
void softmax_tile(Real* s, Running<Real> at, const Head<Real>& head, int M, int i, int j, const Mask& mask) {
    const bool diagonal = i == j;
    uint32_t words[kWords];
    for (int r = 0; r < M; r++) {
        Real* row = s + r * kTile;  // (kTile)
        const int n = diagonal ? r + 1 : kTile, end = reach<Real>(r, diagonal);
        std::fill(row + n, row + end, -std::numeric_limits<Real>::infinity());
        const Real m = cpu::largest(row, size_t(end), at.m[r]);
        Real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int k = 0; k < end; k++) {
            row[k] = cpu::fast_exp(row[k] - m);
            sum += row[k];
        }
        const Real keep = cpu::fast_exp(at.m[r] - m);  // 0 for the first block
        at.m[r] = m;
        at.l[r] = at.l[r] * keep + sum;
        Real* o = at.o + r * head.HSp();  // (HSp)
#pragma omp simd
        for (size_t c = 0; c < head.HSp(); c++) o[c] *= keep;
        if (mask.on) drop(row, mask.fill(words, head.b, head.element(i + r, j), size_t(n)), n, mask);
    }
}

// Queries [i0, i0 + M) of one head.
template <class Real>
void forward_group(const Attention& a, const Head<Real>& head, int i0, int M, const Mask& mask) {
    const int HS = head.HS;
    const size_t HSp = head.HSp();
    Real* q = cpu::scratch<Real>(2 * kGroup * HSp + 2 * kTile * HSp + kTile * kTile + 2 * kGroup);  // (M, HSp) scaled
    Real* o = q + kGroup * HSp;                                                                     // (M, HSp)
    Real* kt = o + kGroup * HSp;                                                                    // (HS, kTile)
    Real* v = kt + kTile * HSp;                                                                     // (kTile, HSp)
    Real* s = v + kTile * HSp;                                                                      // (kTile, kTile)
    Real *m = s + kTile * kTile, *l = m + kGroup;                                                   // (M)
    pack(q, HSp, head.q + i0 * head.row, head.row, M, HS, head.scale());
    std::fill(o, o + M * HSp, Real(0));
    std::fill(m, m + M, -std::numeric_limits<Real>::infinity());
    std::fill(l, l + M, Real(0));
    for (int j = 0; j < i0 + M; j += kTile) {
        const int n = std::min(kTile, head.T - j);  // keys; fewer than kTile only on the diagonal
        pack_transposed(kt, head.k + j * head.row, head.row, n, HS);
        pack(v, HSp, head.v + j * head.row, head.row, n, HS, Real(1));
        for (int r = std::max(0, j - i0); r < M; r += kTile) {
            const int rows = std::min(kTile, M - r);
            const bool diagonal = i0 + r == j;
            scores(s, q + r * HSp, HSp, kt, rows, HS, diagonal);
            softmax_tile(s, {o + r * HSp, m + r, l + r}, head, rows, i0 + r, j, mask);
            add_rows(o + r * HSp, s, v, HSp, rows, n, diagonal);
        }
    }
    Real* y = a.y.as<Real>() + (size_t(head.b) * head.T + i0) * head.y_row + size_t(head.h) * HS;  // (M, HS)
    Real* lse = a.lse.as<Real>() + (size_t(head.b) * a.NH + head.h) * head.T + i0;                 // (M)
    for (int r = 0; r < M; r++) {
        lse[r] = m[r] + std::log(l[r]);
        const Real scale = 1 / l[r];
#pragma omp simd
        for (int c = 0; c < HS; c++) y[r * head.y_row + c] = o[r * HSp + c] * scale;
    }
}

// Turns scores s and products t = dy . v of one tile into f p and ds, zero above the diagonal where these are read.
template <class Real>
void gradient_tile(Real* s, Real* t, const Real* lse, const Real* D, const Head<Real>& head, int M, int i, int j,
                   const Mask& mask) {
    const bool diagonal = i == j;
    uint32_t words[kWords];
    Real factor[kTile];
    std::fill(factor, factor + kTile, Real(1));
    for (int r = 0; r < M; r++) {
        Real *p = s + r * kTile, *ds = t + r * kTile;  // (kTile)
        const int n = diagonal ? r + 1 : kTile, end = reach<Real>(r, diagonal);
        if (mask.on) {
            std::fill(factor, factor + n, Real(1));
            drop(factor, mask.fill(words, head.b, head.element(i + r, j), size_t(n)), n, mask);
        }
        std::fill(p + n, p + end, -std::numeric_limits<Real>::infinity());
        std::fill(ds + n, ds + end, Real(0));
#pragma omp simd
        for (int k = 0; k < end; k++) {
            const Real e = cpu::fast_exp(p[k] - lse[r]);
            ds[k] = e * (ds[k] * factor[k] - D[r]);
            p[k] = e * factor[k];
        }
    }
}

// The tiles of a backward task.
template <class Real>
struct Tiles {
    Real *k, *kt, *vt;  // (kTile, HSp), (HS, kTile), (HS, kTile)   of a key block
    Real *dk, *dv;      // (kTile, HSp)
    Real *q, *dy;       // (kTile, HSp)    of a query block; q scaled
    Real *s, *t;        // (kTile, kTile)
    Real* dq;           // (T, HSp)
    static size_t size(size_t T, size_t HSp) { return 7 * kTile * HSp + 2 * kTile * kTile + T * HSp; }
    Tiles(Real* at, size_t HSp) {
        for (Real** tile : {&k, &kt, &vt, &dk, &dv, &q, &dy}) *tile = at, at += kTile * HSp;
        for (Real** tile : {&s, &t}) *tile = at, at += kTile * kTile;
        dq = at;
    }
};

// Adds the gradients that queries [i, i + M) and keys [j, j + n) give each other: to dv and dk of the block, and to dq.
template <class Real>
void backward_tile(const Tiles<Real>& w, const Head<Real>& head, const Real* dy, const Real* lse, const Real* D, int i,
                   int j, const Mask& mask) {
    const int M = std::min(kTile, head.T - i), n = std::min(kTile, head.T - j), HS = head.HS;
    const size_t HSp = head.HSp();
    const bool diagonal = i == j;
    pack(w.q, HSp, head.q + i * head.row, head.row, M, HS, head.scale());
    pack(w.dy, HSp, dy + i * head.y_row, head.y_row, M, HS, Real(1));
    scores(w.s, w.q, HSp, w.kt, M, HS, diagonal);
    scores(w.t, w.dy, HSp, w.vt, M, HS, diagonal);
    gradient_tile(w.s, w.t, lse + i, D + i, head, M, i, j, mask);
    add_columns(w.dv, w.s, w.dy, HSp, n, M, diagonal);
    add_columns(w.dk, w.t, w.q, HSp, n, M, diagonal);
    add_rows(w.dq + i * HSp, w.t, w.k, HSp, M, n, diagonal);
}

template <class Real>
void backward_head(const AttentionGrad& a, const Head<Real>& head, const Mask& mask) {
    const int T = head.T, HS = head.HS;
    const size_t HSp = head.HSp(), at = size_t(head.b) * T * head.y_row + size_t(head.h) * HS;
    const Real *dy = a.dy.as<Real>() + at, *y = a.y.as<Real>() + at;  // (T, HS)
    const size_t stats = (size_t(head.b) * a.NH + head.h) * T;
    const Real* lse = a.lse.as<Real>() + stats;                                          // (T)
    Real* D = a.scratch.as<Real>() + stats;                                              // (T)
    Real* dq = a.dqkv.as<Real>() + size_t(head.b) * T * head.row + size_t(head.h) * HS;  // (T, HS)
    Real *dk = dq + head.y_row, *dv = dk + head.y_row;                                   // (T, HS)
    for (int i = 0; i < T; i++) {
        Real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < HS; c++) sum += dy[i * head.y_row + c] * y[i * head.y_row + c];
        D[i] = sum;
    }
    const Tiles<Real> w(cpu::scratch<Real>(Tiles<Real>::size(size_t(T), HSp)), HSp);
    const auto store = [&](Real* to, const Real* from, int n, Real scale) {  // to (n, HS) = from (n, HSp) * scale
        for (int i = 0; i < n; i++)
#pragma omp simd
            for (int c = 0; c < HS; c++) to[i * head.row + c] = from[i * HSp + c] * scale;
    };
    std::fill(w.dq, w.dq + T * HSp, Real(0));
    for (int j = 0; j < T; j += kTile) {
        const int n = std::min(kTile, T - j);
        pack(w.k, HSp, head.k + j * head.row, head.row, n, HS, Real(1));
        pack_transposed(w.kt, head.k + j * head.row, head.row, n, HS);
        pack_transposed(w.vt, head.v + j * head.row, head.row, n, HS);
        std::fill(w.dk, w.dv + kTile * HSp, Real(0));
        for (int i = j; i < T; i += kTile) backward_tile(w, head, dy, lse, D, i, j, mask);
        store(dk + j * head.row, w.dk, n, Real(1));
        store(dv + j * head.row, w.dv, n, Real(1));
    }
    store(dq, w.dq, T, head.scale());
}
}  // namespace

namespace cpu {
void attention_forward(const Attention& a, Stream) {
    const Mask mask(a.dropout);
    with_real(a.qkv.dtype, [&]<class Real>() {
        expect_dtype<Real>({a.y, a.lse});
        const int groups = (a.T + kGroup - 1) / kGroup;
        FirstError error;  // out of memory for scratch
#pragma omp parallel for collapse(3) schedule(dynamic)
        for (int g = groups - 1; g >= 0; g--)  // the longest first
            for (int b = 0; b < a.B; b++)
                for (int h = 0; h < a.NH; h++)
                    error.run([&] {
                        forward_group(a, head_of<Real>(a.qkv, a.T, a.NH, a.HS, b, h), g * kGroup,
                                      std::min(kGroup, a.T - g * kGroup), mask);
                    });
        error.rethrow();
    });
}

void attention_backward(const AttentionGrad& a, Stream) {
    const Mask mask(a.dropout);
    with_real(a.qkv.dtype, [&]<class Real>() {
        expect_dtype<Real>({a.dqkv, a.dy, a.y, a.lse, a.scratch});
        FirstError error;  // out of memory for scratch
#pragma omp parallel for collapse(2) schedule(dynamic)
        for (int b = 0; b < a.B; b++)
            for (int h = 0; h < a.NH; h++)
                error.run([&] { backward_head(a, head_of<Real>(a.qkv, a.T, a.NH, a.HS, b, h), mask); });
        error.rethrow();
    });
}
}  // namespace cpu
