// The small ops: add, cast, tree_sum, row_sum.
//
//   add        y[i] += x[i]                       shapes (n)
//   cast       y[i] = x[i] rounded                shapes (n)
//   tree_sum   y[i] = tree over p of x[p,i]       shapes y (n), x (parts, n)
//   row_sum    y[b] = sum_t x[b,t]                shapes y (B), x (B, T)
//
//   traffic    add 2 reads and 1 write per element; cast 1 and 1; tree_sum parts reads and 1 write, beyond 8 parts a
//              quarter more; row_sum 1 read.   bound: memory
//   limits     any size >= 1; 16-byte accesses of tree_sum need n % 4 == 0
//   order      tree_sum: the tree of ops.h, equal on every backend.  row_sum: in double; thread t takes t, t + 256, ...
//              ascending, then a fixed tree over the block
#include "kernels/cuda/launch.h"
#include "kernels/elementwise.cuh"

namespace {
using device::kElementThreads;

__global__ void add_kernel(float* y,        // (n)
                           const float* x,  // (n)
                           size_t n, bool vectors) {
    const device::Share at = device::share_of<4>(n);
    if (at.count == 0) return;
    float a[4], b[4];
    device::load_some(a, y + at.first, at.count, vectors);
    device::load_some(b, x + at.first, at.count, vectors);
    SIMT_UNROLL
    for (int i = 0; i < 4; i++) a[i] += b[i];
    device::store_some(y + at.first, a, at.count, vectors);
}

template <class To>
__global__ void cast_kernel(To* y,           // (n)
                            const float* x,  // (n)
                            size_t n, bool vectors) {
    const device::Quads at = device::quads_of(n);
    float v[2][4];
    device::load_quads(v, x, at, vectors);
    device::store_quads(y, v, at, vectors);
}

// The tree over `parts` vectors at x, x + step, ...; all of them are read before anything is added.
template <int parts>
__device__ __forceinline__ void tree(float (&sum)[4], const float* x, size_t step, int count, bool vectors) {
    float v[parts][4];
    SIMT_UNROLL
    for (int p = 0; p < parts; p++) device::load_some(v[p], x + p * step, count, vectors);
    SIMT_UNROLL
    for (int stride = 1; stride < parts; stride *= 2) {
        SIMT_UNROLL
        for (int p = 0; p < parts; p += 2 * stride) {
            SIMT_UNROLL
            for (int i = 0; i < 4; i++) v[p][i] += v[p + stride][i];
        }
    }
    SIMT_UNROLL
    for (int i = 0; i < 4; i++) sum[i] = v[0][i];
}

// Eight parts at a time fit registers; a sum of eight replaces the first of them.  A thread reads only what it wrote
// itself, so the passes need no barrier.
__global__ void tree_sum_kernel(float* y,  // (n)
                                float* x,  // (parts, n), destroyed
                                size_t n, size_t parts, bool vectors) {
    const device::Share at = device::share_of<4>(n);
    if (at.count == 0) return;
    float* mine = x + at.first;
    float sum[4];
    size_t step = n;
    SIMT_NO_UNROLL
    for (; parts > 8; parts /= 8, step *= 8) {
        SIMT_NO_UNROLL
        for (size_t p = 0; p < parts / 8; p++) {
            float* first = mine + 8 * p * step;
            tree<8>(sum, first, step, at.count, vectors);
            device::store_some(first, sum, at.count, vectors);
        }
    }
    switch (parts) {
        case 1:
            tree<1>(sum, mine, step, at.count, vectors);
            break;
        case 2:
            tree<2>(sum, mine, step, at.count, vectors);
            break;
        case 4:
            tree<4>(sum, mine, step, at.count, vectors);
            break;
        default:
            tree<8>(sum, mine, step, at.count, vectors);
            break;
    }
    device::store_some(y + at.first, sum, at.count, vectors);
}

__global__ void row_sum_kernel(float* y,        // (B)
                               const float* x,  // (B, T)
                               size_t T) {
    SIMT_SHARED(double, part, [kElementThreads / 32]);
    const float* row = x + blockIdx.x * T;  // (T)
    double sum = 0;
    for (size_t t = threadIdx.x; t < T; t += kElementThreads) sum += double(row[t]);
    sum = device::block_sum(sum, part);
    if (threadIdx.x == 0) y[blockIdx.x] = float(sum);
}
}  // namespace

namespace cuda {
void add(const Add& a, Stream s) {
    float* y = a.y.as<float>();        // (n)
    const float* x = a.x.as<float>();  // (n)
    const size_t n = a.y.count;
    if (n == 0) return;
    cuda::launch(add_kernel, dim3(device::element_blocks<4>(n)), dim3(kElementThreads), 0, s, y, x, n,
                 device::aligned16(y, x));
}

void row_sum(const RowSum& a, Stream s) {
    if (a.B == 0) return;
    cuda::launch(row_sum_kernel, dim3(unsigned(a.B)), dim3(kElementThreads), 0, s, a.y.as<float>(), a.x.as<float>(),
                 size_t(a.T));
}

void tree_sum(const TreeSum& a, Stream s) {
    float* y = a.y.as<float>();  // (n)
    float* x = a.x.as<float>();  // (parts, n)
    const size_t n = a.y.count;
    if (n == 0) return;
    const bool vectors = device::aligned16(y, x) && (a.parts == 1 || n % 4 == 0);
    cuda::launch(tree_sum_kernel, dim3(device::element_blocks<4>(n)), dim3(kElementThreads), 0, s, y, x, n,
                 size_t(a.parts), vectors);
}

void cast(const Cast& a, Stream s) {
    const float* x = a.x.as<float>();  // (n)
    const size_t n = a.x.count;
    if (n == 0) return;
    with_real(a.y.dtype, [&]<class To>() {
        To* y = a.y.as<To>();  // (n)
        cuda::launch(cast_kernel<To>, dim3(device::element_blocks<8>(n)), dim3(kElementThreads), 0, s, y, x, n,
                     device::aligned16(y, x));
    });
}
}  // namespace cuda
