// GELU by itself (recomputed activations; the usual place is the epilogue of Linear).
//
//   forward    y = gelu(x)          backward   dx = dy gelu'(x)        formulas and limits in gelu_math.h
//   shapes     all (n)              traffic    forward 2n elements, backward 3n.   bound: memory
//   order      nothing is summed.  The pieces still have a fixed size: the compiler may round a loop's vector body and
//              its scalar tail differently, and the tail's place must not depend on the number of threads
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/gelu_math.h"

namespace {
constexpr size_t kPiece = 4096;  // elements

// f(begin, end) for each piece of [0, n).
template <class F>
void for_pieces(size_t n, F&& f) {
#pragma omp parallel for schedule(static) if (n >= cpu::kParallelFrom)
    for (size_t begin = 0; begin < n; begin += kPiece) f(begin, n - begin < kPiece ? n : begin + kPiece);
}
}  // namespace

namespace cpu {
void gelu_forward(const Gelu& p, Stream) {
    with_real(p.x.dtype, [&]<class T>() {
        T* y = p.y.as<T>();        // (n)
        const T* x = p.x.as<T>();  // (n)
        for_pieces(p.x.count, [=](size_t begin, size_t end) {
#pragma omp simd
            for (size_t i = begin; i < end; i++) y[i] = gelu(x[i]);
        });
    });
}

void gelu_backward(const GeluGrad& p, Stream) {
    with_real(p.x.dtype, [&]<class T>() {
        T* dx = p.dx.as<T>();        // (n)
        const T* dy = p.dy.as<T>();  // (n)
        const T* x = p.x.as<T>();    // (n)
        for_pieces(p.x.count, [=](size_t begin, size_t end) {
#pragma omp simd
            for (size_t i = begin; i < end; i++) dx[i] = dy[i] * gelu_grad(x[i]);
        });
    });
}
}  // namespace cpu
