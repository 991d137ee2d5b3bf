// Optimizer steps over the flat parameter buffer.
//
//   g = grad * clip;   d = decay[i/kDecayBlock] ? weight_decay : 0
//   adamw   m = b1 m + (1-b1) g     v = b2 v + (1-b2) g^2     p -= lr (m/c1 / (sqrt(v/c2) + eps) + d p)
//   adam    g += d p, then as adamw with d = 0
//   sgd     g += d p;   m = momentum m + g;   p -= lr m
//   lion    c = b1 m + (1-b1) g     m = b2 m + (1-b2) g       p -= lr (sign(c) + d p),  sign(0) = 0
//   copy    p rounded to bf16, where given
//
//   shapes     param, m, v, grad, copy (n)    decay (ceil(n/kDecayBlock))    rate = lr, c1 = 1-b1^t, c2 = 1-b2^t
//   traffic    adam 4 reads and 3 writes of 4 bytes an element, sgd and lion 3 and 2, the copy one write of 2: 30 bytes
//              for adamw with a copy, all by 16-byte accesses (a thread has eight elements).   bound: memory
//   limits     any n >= 1; the last block of decay may be partly filled; clip not finite: nothing is written
//   order      none: element by element, the CPU's operations in the CPU's order.  Each compiler chooses which products
//              it fuses into sums, so the last bits may differ from the CPU's
#include "kernels/cuda/launch.h"
#include "kernels/elementwise.cuh"

#include <cmath>

namespace {
struct Tensors {
    float *p, *m, *v;      // (n); v null where only one moment is kept
    bf16* copy;            // (n) or null
    const float* grad;     // (n)
    const uint8_t* decay;  // (ceil(n/kDecayBlock))
    const float* rate;     // (3)
    const float* clip;     // (1)
};
struct Constants {
    float beta1, beta2, eps, weight_decay, momentum;
};

template <OptimizerKind kind>
__global__ void optimizer_update_kernel(SIMT_PARAM Tensors a, SIMT_PARAM Constants f, size_t n, bool vectors) {
    constexpr bool decoupled = kind == OptimizerKind::adamw || kind == OptimizerKind::lion;
    constexpr bool keeps_v = n_moments(kind) > 1;
    const device::Quads at = device::quads_of(n);
    if (at.warp_first >= n) return;
    float p[2][4], m[2][4], v[2][4], g[2][4], d[2];
    device::load_quads(p, a.p, at, vectors);
    device::load_quads(m, a.m, at, vectors);
    if constexpr (keeps_v) device::load_quads(v, a.v, at, vectors);
    device::load_quads(g, a.grad, at, vectors);
    SIMT_UNROLL
    for (int q = 0; q < 2; q++) d[q] = at.count(q) && a.decay[at.at(q) / kDecayBlock] ? f.weight_decay : 0.0f;
    const float lr = a.rate[0], clip = a.clip[0];
    if (!std::isfinite(clip)) return;  // after the loads, which need not wait for clip

    SIMT_UNROLL
    for (int q = 0; q < 2; q++) {
        const float pull = decoupled ? 0.0f : d[q], shrink = decoupled ? lr * d[q] : 0.0f;
        const float keep1 = 1 - f.beta1, keep2 = 1 - f.beta2;
        SIMT_UNROLL
        for (int i = 0; i < 4; i++) g[q][i] = g[q][i] * clip + pull * p[q][i];
        if constexpr (kind == OptimizerKind::sgd) {
            SIMT_UNROLL
            for (int i = 0; i < 4; i++) {
                m[q][i] = f.momentum * m[q][i] + g[q][i];
                p[q][i] -= lr * m[q][i];
            }
        } else if constexpr (kind == OptimizerKind::lion) {
            SIMT_UNROLL
            for (int i = 0; i < 4; i++) {
                const float c = f.beta1 * m[q][i] + keep1 * g[q][i];
                m[q][i] = f.beta2 * m[q][i] + keep2 * g[q][i];
                p[q][i] -= shrink * p[q][i] + lr * (float(c > 0) - float(c < 0));
            }
        } else {
            static_assert(kind == OptimizerKind::adamw || kind == OptimizerKind::adam);
            const float rate = lr / a.rate[1], unbias = 1 / a.rate[2];
            SIMT_UNROLL
            for (int i = 0; i < 4; i++) {
                m[q][i] = f.beta1 * m[q][i] + keep1 * g[q][i];
                v[q][i] = f.beta2 * v[q][i] + keep2 * (g[q][i] * g[q][i]);
                p[q][i] -= shrink * p[q][i] + rate * m[q][i] / (sqrtf(v[q][i] * unbias) + f.eps);
            }
        }
    }
    if constexpr (keeps_v) device::store_quads(a.v, v, at, vectors);
    device::store_quads(a.m, m, at, vectors);
    device::store_quads(a.p, p, at, vectors);
    if (a.copy) device::store_quads(a.copy, p, at, vectors);
}

template <OptimizerKind kind>
void launch_update(const Tensors& t, const Constants& f, size_t n, Stream s) {
    const bool vectors = device::aligned16(t.p, t.m, t.v, t.copy, t.grad);
    cuda::launch(optimizer_update_kernel<kind>, dim3(device::element_blocks<8>(n)), dim3(device::kElementThreads), 0, s,
                 t, f, n, vectors);
}
}  // namespace

namespace cuda {
void optimizer_update(const OptimizerUpdate& a, Stream s) {
    const size_t n = a.param.count;
    if (n == 0) return;
    const Tensors t = {.p = a.param.as<float>(),
                       .m = a.m.as<float>(),
                       .v = n_moments(a.kind) > 1 ? a.v.as<float>() : nullptr,
                       .copy = a.copy.as<bf16>(),
                       .grad = a.grad.as<float>(),
                       .decay = a.decay.as<uint8_t>(),
                       .rate = a.rate.as<float>(),
                       .clip = a.clip.as<float>()};
    const Constants f = {a.beta1, a.beta2, a.eps, a.weight_decay, a.momentum};
    switch (a.kind) {
        case OptimizerKind::adamw:
            return launch_update<OptimizerKind::adamw>(t, f, n, s);
        case OptimizerKind::adam:
            return launch_update<OptimizerKind::adam>(t, f, n, s);
        case OptimizerKind::sgd:
            return launch_update<OptimizerKind::sgd>(t, f, n, s);
        case OptimizerKind::lion:
            return launch_update<OptimizerKind::lion>(t, f, n, s);
    }
}
}  // namespace cuda
