// GELU by itself (recomputed activations; the usual place is the epilogue of Linear).
//
//   forward    y = 0.5 x (1 + tanh u) = x s        u = sqrt(2/pi) (x + 0.044715 x^3),  s = 1 / (1 + exp(-2u))
//   backward   dx = dy (s + x 2 s (1-s) u')        u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2),  1-s = exp(-2u) s
//
//   shapes     all (n)
//   traffic    forward 2n elements, backward 3n; about 20 and 30 instructions per element.   bound: memory
//   limits     any n; y may be x, dx may be dy.  NaN stays NaN
//   order      nothing is summed
//   error      the logistic form has no cancellation on the negative side, where 1 + tanh u loses all digits.  expf is
//              off by at most 2 units in the last place, __fdividef by 2 for divisors below 2^126: here they end at
//              exp(80) = 2^115
#include "kernels/cuda/launch.h"
#include "kernels/elementwise.cuh"

namespace {
constexpr float k2 = float(2 * 0.79788456080286535588), kCube = 0.044715f;

struct Logistic {
    float s, r;  // s, and 1 - s without cancellation
};
// Infinite values of u are harmless: u = -inf gives s = 1, and u above 80 counts as 80.
__device__ __forceinline__ Logistic logistic(float x) {
    const float u = -k2 * (x + kCube * x * x * x);  // -2u
    const float e = expf(fminf(u, 80.0f));
    const float s = __fdividef(1.0f, 1.0f + e);
    return {s, e * s};
}

// fminf takes 80 for a NaN, so the NaN of the result comes from the factor x.
__device__ __forceinline__ float gelu(float x) { return x * logistic(x).s; }

// Beyond |x| = 30 the derivative is 0 or 1 to the last bit, so x is clamped there and x^2 does not overflow.
__device__ __forceinline__ float gelu_grad(float x) {
    x = x > 30.0f ? 30.0f : x;
    x = x < -30.0f ? -30.0f : x;
    const Logistic g = logistic(x);
    return g.s + x * g.s * g.r * k2 * (1.0f + 3.0f * kCube * x * x);
}

template <class T>
__global__ void gelu_forward_kernel(T* y,        // (n)
                                    const T* x,  // (n)
                                    size_t n, bool vectors) {
    constexpr int N = device::kVec<T>;
    const device::Share at = device::share_of<N>(n);
    if (at.count == 0) return;
    float v[N];
    device::load_some(v, x + at.first, at.count, vectors);
    SIMT_UNROLL
    for (int i = 0; i < N; i++) v[i] = gelu(v[i]);
    device::store_some(y + at.first, v, at.count, vectors);
}

template <class T>
__global__ void gelu_backward_kernel(T* dx,        // (n)
                                     const T* dy,  // (n)
                                     const T* x,   // (n)
                                     size_t n, bool vectors) {
    constexpr int N = device::kVec<T>;
    const device::Share at = device::share_of<N>(n);
    if (at.count == 0) return;
    float v[N], d[N];
    device::load_some(v, x + at.first, at.count, vectors);
    device::load_some(d, dy + at.first, at.count, vectors);
    SIMT_UNROLL
    for (int i = 0; i < N; i++) d[i] *= gelu_grad(v[i]);
    device::store_some(dx + at.first, d, at.count, vectors);
}
}  // namespace

namespace cuda {
void gelu_forward(const Gelu& a, Stream s) {
    const size_t n = a.x.count;
    if (n == 0) return;
    with_real(a.x.dtype, [&]<class T>() {
        T* y = a.y.as<T>();        // (n)
        const T* x = a.x.as<T>();  // (n)
        cuda::launch(gelu_forward_kernel<T>, dim3(device::element_blocks<device::kVec<T>>(n)),
                     dim3(device::kElementThreads), 0, s, y, x, n, device::aligned16(y, x));
    });
}

void gelu_backward(const GeluGrad& a, Stream s) {
    const size_t n = a.x.count;
    if (n == 0) return;
    with_real(a.x.dtype, [&]<class T>() {
        T* dx = a.dx.as<T>();        // (n)
        const T* dy = a.dy.as<T>();  // (n)
        const T* x = a.x.as<T>();    // (n)
        cuda::launch(gelu_backward_kernel<T>, dim3(device::element_blocks<device::kVec<T>>(n)),
                     dim3(device::kElementThreads), 0, s, dx, dy, x, n, device::aligned16(dx, dy, x));
    });
}
}  // namespace cuda
