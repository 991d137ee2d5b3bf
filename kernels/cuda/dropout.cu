// Dropout and the residual sum that follows it.
//
//   y = keep ? x / (1-p) : 0,   + residual where given;   p = 0 leaves y = x + residual
//
//   shapes     y, x, residual (B, T, C)    mask element t*C + c of batch row b
//   traffic    one read (two with the residual), one write; ten Philox rounds, about 100 instructions, per four
//              elements.   bound: memory in fp32; in bf16 about even with the instruction rate
//   limits     any size; y may be x or residual itself; 16-byte accesses where B = 1 or T*C is a multiple of the vector
//   order      none: element by element
#include "kernels/cuda/launch.h"
#include "kernels/dropout.cuh"
#include "kernels/elementwise.cuh"

#include <algorithm>

namespace {
template <class T>
struct Tensors {
    T* y;               // (B, row)
    const T* x;         // (B, row)
    const T* residual;  // (B, row) or null
};

// A thread keeps its elements of a row and walks over the rows of the batch, gridDim.y rows per stride.
template <class T>
__global__ void dropout_kernel(SIMT_PARAM Tensors<T> a, SIMT_PARAM device::DropoutStream parameter, size_t row, int B,
                               bool vectors) {
    constexpr int N = device::kVec<T>;
    const device::Share at = device::share_of<N>(row);
    if (at.count == 0) return;
    device::DropoutStream drop = parameter;
    drop.read_where();
    for (int b = int(blockIdx.y); b < B; b += int(gridDim.y)) {
        const size_t first = size_t(b) * row + at.first;
        float v[N];
        device::load_some(v, a.x + first, at.count, vectors);
        if (drop.on()) {
            SIMT_UNROLL
            for (int i = 0; i < N; i += 4) {
                const Philox4 words = drop.words(b, uint32_t((at.first + i) / 4));
                SIMT_UNROLL
                for (int k = 0; k < 4; k++) v[i + k] = drop.keeps(words.v[k]) ? v[i + k] * drop.scale : 0.0f;
            }
        }
        if (a.residual) {
            float r[N];
            device::load_some(r, a.residual + first, at.count, vectors);
            SIMT_UNROLL
            for (int i = 0; i < N; i++) v[i] += r[i];
        }
        device::store_some(a.y + first, v, at.count, vectors);
    }
}
}  // namespace

namespace cuda {
void dropout(const Dropout& a, Stream s) {
    const size_t row = size_t(a.T) * a.C, n = size_t(a.B) * row;  // elements of one sequence, of all
    const device::DropoutStream mask = device::dropout_stream(a.mask);
    if (n == 0) return;
    with_real(a.x.dtype, [&]<class T>() {
        constexpr int N = device::kVec<T>;
        const Tensors<T> t = {a.y.as<T>(), a.x.as<T>(), a.residual.as<T>()};
        const bool vectors = device::aligned16(t.y, t.x, t.residual) && (a.B == 1 || row % N == 0);
        const dim3 grid(device::element_blocks<N>(row), unsigned(std::min(a.B, 65535)));  // 65535: a grid's largest y
        cuda::launch(dropout_kernel<T>, grid, dim3(device::kElementThreads), 0, s, t, mask, row, a.B, vectors);
    });
}
}  // namespace cuda
