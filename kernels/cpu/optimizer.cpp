// Optimizer steps over the flat parameter buffer, and the gradient norm.
//
//   g = grad * clip;   d = decay[i/kDecayBlock] ? weight_decay : 0
//   adamw   m = b1 m + (1-b1) g     v = b2 v + (1-b2) g^2     p -= lr (m/c1 / (sqrt(v/c2) + eps) + d p)
//   adam    g += d p, then as adamw with d = 0
//   sgd     g += d p;   m = momentum m + g;   p -= lr m
//   lion    c = b1 m + (1-b1) g     m = b2 m + (1-b2) g       p -= lr (sign(c) + d p),  sign(0) = 0
//   copy    p rounded to bf16, where given
//   norm    sqrt(sum grad^2)
//   clip    max_norm > 0 and norm > max_norm ? max_norm / norm : 1;  NaN where norm is not finite
//
//   shapes     param, m, v, grad, copy (n)    decay (ceil(n/kDecayBlock))    rate = lr, c1 = 1-b1^t, c2 = 1-b2^t
//   traffic    adam 4 reads and 3 writes per element, sgd and lion 3 and 2, norm 1 read.   bound: memory
//   limits     any n >= 1; the last block of decay may be partly filled; clip not finite: nothing is written.  In fp32
//              a norm from 2^64 on counts as infinite, because a chunk's sum of squares is kept in fp32
//   order      norm: SIMD lanes in double within chunks of kGradNormChunk, chunks ascending
#include "kernels/cpu/cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace {
constexpr size_t kTaskBlocks = 1024;  // decay blocks of one task

template <class T>
struct Pointers {
    T *p, *m, *v;          // (n)
    const T* g;            // (n)
    const uint8_t* decay;  // (ceil(n/kDecayBlock))
};
template <class T>
struct Factors {  // read once per call
    T lr, c1, c2, clip, beta1, beta2, eps, weight_decay, momentum;
};

// Elements [i, end) of one decay block; d is the block's weight decay.  `f` by value: its fields stay in registers.
template <OptimizerKind kind, class T>
void update_block(const Pointers<T>& a, const Factors<T> f, size_t i, size_t end, T d) {
    T *p = a.p, *m = a.m, *v = a.v;  // (n)
    const T* grad = a.g;             // (n)
    const T keep1 = 1 - f.beta1, keep2 = 1 - f.beta2, rate = f.lr / f.c1, unbias = 1 / f.c2;
    constexpr bool decoupled = kind == OptimizerKind::adamw || kind == OptimizerKind::lion;
    const T shrink = decoupled ? f.lr * d : T(0), pull = decoupled ? T(0) : d;
#pragma omp simd
    for (size_t k = i; k < end; k++) {
        const T g = grad[k] * f.clip + pull * p[k];
        if constexpr (kind == OptimizerKind::sgd) {
            m[k] = f.momentum * m[k] + g;
            p[k] -= f.lr * m[k];
        } else if constexpr (kind == OptimizerKind::lion) {
            const T c = f.beta1 * m[k] + keep1 * g;
            m[k] = f.beta2 * m[k] + keep2 * g;
            p[k] -= shrink * p[k] + f.lr * (T(c > 0) - T(c < 0));
        } else {
            static_assert(kind == OptimizerKind::adamw || kind == OptimizerKind::adam);
            m[k] = f.beta1 * m[k] + keep1 * g;
            v[k] = f.beta2 * v[k] + keep2 * (g * g);
            p[k] -= shrink * p[k] + rate * m[k] / (std::sqrt(v[k] * unbias) + f.eps);
        }
    }
}

template <OptimizerKind kind, class T>
void update(const Pointers<T>& a, const Factors<T>& f, size_t n) {
    const size_t blocks = (n + kDecayBlock - 1) / kDecayBlock;
#pragma omp parallel for schedule(static) if (n >= cpu::kParallelFrom)
    for (size_t task = 0; task < blocks; task += kTaskBlocks)
        for (size_t k = task; k < std::min(blocks, task + kTaskBlocks); k++) {
            const size_t i = k * kDecayBlock, end = std::min(n, i + kDecayBlock);
            update_block<kind>(a, f, i, end, a.decay[k] ? f.weight_decay : T(0));
        }
}

template <class T>
T sum_of_squares(const T* x, size_t n) {  // x (n), in double
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) sum += double(x[i]) * double(x[i]);
    return T(sum);
}
}  // namespace

namespace cpu {
void optimizer_update(const OptimizerUpdate& a, Stream) {
    const size_t n = a.param.count;
    with_real(a.param.dtype, [&]<class T>() {
        const Pointers<T> at = {a.param.as<T>(), a.m.as<T>(), a.v.as<T>(), a.grad.as<T>(), a.decay.as<uint8_t>()};
        const T* rate = a.rate.as<T>();  // (3)
        expect_dtype<bf16>({a.copy});
        if (!std::isfinite(a.clip.as<T>()[0])) return;
        const Factors<T> f = {rate[0],    rate[1],  rate[2],           a.clip.as<T>()[0], T(a.beta1),
                              T(a.beta2), T(a.eps), T(a.weight_decay), T(a.momentum)};
        switch (a.kind) {
            case OptimizerKind::adamw:
                update<OptimizerKind::adamw>(at, f, n);
                break;
            case OptimizerKind::adam:
                update<OptimizerKind::adam>(at, f, n);
                break;
            case OptimizerKind::sgd:
                update<OptimizerKind::sgd>(at, f, n);
                break;
            case OptimizerKind::lion:
                update<OptimizerKind::lion>(at, f, n);
                break;
        }
        if (a.copy) cast({.y = a.copy, .x = a.param}, nullptr);
    });
}

void grad_norm(const GradNorm& a, Stream) {
    const size_t n = a.grad.count, chunks = a.scratch.count;
    with_real(a.scratch.dtype, [&]<class T>() {
        T* partial = a.scratch.as<T>();  // (chunks)
        if (a.grad) {
            const T* grad = a.grad.as<T>();  // (n)
#pragma omp parallel for schedule(static) if (n >= kParallelFrom)
            for (size_t i = 0; i < chunks; i++)
                partial[i] =
                    sum_of_squares(grad + i * kGradNormChunk, std::min(kGradNormChunk, n - i * kGradNormChunk));
        }
        if (!a.norm) return;
        expect_dtype<T>({a.norm, a.clip});
        double sum = 0;
        for (size_t i = 0; i < chunks; i++) sum += double(partial[i]);
        const T norm = T(std::sqrt(sum));
        a.norm.as<T>()[0] = norm;
        const T factor = a.max_norm > 0 && norm > T(a.max_norm) ? T(a.max_norm) / norm : T(1);
        a.clip.as<T>()[0] = std::isfinite(norm) ? factor : std::numeric_limits<T>::quiet_NaN();
    });
}
}  // namespace cpu
