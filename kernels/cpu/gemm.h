// Matrix products of the CPU backend, and why their bits do not depend on the number of threads.
//
// The output is cut into tiles by shape alone (tiling()).  A tile is one call of gemm_tile(), on one thread: for
// float a single-threaded oneDNN sgemm over the whole K, for double a plain loop (the reference).  Threads share the
// tiles out among themselves; no tile depends on the thread that computes it.  K is never split.
//
// oneDNN's own threading is never used: it splits K or the output by the number of threads, which changes the sums.
//
//     team(work, [&] {                                       // all threads run this
//         bool ok = share_gemm(one, [](Tile t) { ... });     // the epilogue follows each tile while it is in cache
//         return share_gemm(another, no_epilogue) && ok;     // no barrier between the two
//     });
#pragma once
#include <omp.h>

#include <atomic>
#include <cstddef>

#include "common/error.h"

namespace cpu {
template <class T>
struct Gemm {    // c = a b, or c += a b when accumulate; row-major without gaps
    T* c;        // (M, N)  out
    const T* a;  // (M, K), or (K, M) when a_transposed
    const T* b;  // (K, N), or (N, K) when b_transposed
    int M, N, K;
    bool a_transposed = false, b_transposed = false, accumulate = false;
};

struct Tile {  // rows [i, i+m) and columns [j, j+n) of the output
    int i, j, m, n;
};
struct Tiling {  // tiles of m x n, smaller at the lower and right edge; rows x columns of them
    int m, n, rows, columns;
};
Tiling tiling(const Gemm<float>&);
Tiling tiling(const Gemm<double>&);

// One tile on the calling thread.  False: the library refused.
bool gemm_tile(const Gemm<float>&, Tile);
bool gemm_tile(const Gemm<double>&, Tile);

// While a OneThread lives, libraries called from its thread see one OpenMP thread.  Parallel regions need it too: a
// region of one thread does not count as parallel, and a library would open a team of its own.
class OneThread {
  public:
    OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
    ~OneThread() { omp_set_num_threads(before_); }
    OneThread(const OneThread&) = delete;
    OneThread& operator=(const OneThread&) = delete;

  private:
    int before_;
};

// To be called by every thread of a team: computes this thread's tiles, each followed by epilogue(tile).
template <class T, class F>
bool share_gemm(const Gemm<T>& g, F&& epilogue) {
    const OneThread only;
    const Tiling s = tiling(g);
    const bool down = g.M < g.N;  // successive tiles share a part of the longer operand, so that it is read once
    bool ok = true;
#pragma omp for schedule(dynamic, 1) nowait
    for (int k = 0; k < s.rows * s.columns; k++) {
        const int i = (down ? k % s.rows : k / s.columns) * s.m, j = (down ? k / s.rows : k % s.columns) * s.n;
        const Tile tile{i, j, s.m < g.M - i ? s.m : g.M - i, s.n < g.N - j ? s.n : g.N - j};
        ok = gemm_tile(g, tile) && ok;
        epilogue(tile);
    }
    return ok;
}
constexpr auto no_epilogue = [](Tile) {};

// Runs body() -> bool on a team, or on the calling thread alone when there are fewer than 2^18 multiplications to do.
template <class F>
void team(size_t multiplications, F&& body) {
    std::atomic<bool> ok{true};
#pragma omp parallel if (multiplications >= size_t(1) << 18)
    if (!body()) ok = false;
    CHECK_THAT(ok, "oneDNN refused a matrix product (out of memory?)");
}

// The product alone.
template <class T>
void gemm(const Gemm<T>& g) {
    team(size_t(g.M) * g.N * g.K, [&] { return share_gemm(g, no_epilogue); });
}
}  // namespace cpu
