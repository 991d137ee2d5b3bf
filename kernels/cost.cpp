#include "kernels/cost.h"

#include <algorithm>
#include <initializer_list>

namespace {
// Of buffers that are read or written once; an absent one has none.
double bytes(std::initializer_list<Buf> all) {
    double n = 0;
    for (const Buf& b : all) n += double(b.n_bytes());
    return n;
}
// Of gradients of parameters: written, or read and written.
double gradient_bytes(double n_bytes, bool accumulate) { return n_bytes * (accumulate ? 2 : 1); }
}  // namespace

Cost cost(const Embedding& a) {  // a row of wte per token, and a row of wpe per place
    const double row = double(a.C) * double(dtype_bytes(a.y.dtype));
    return {.n_bytes = bytes({a.y, a.tokens}) + double(a.y.n_bytes()) + a.T * row};
}
Cost cost(const EmbeddingGrad& a, size_t n_different) {  // two passes over dy: one for dwte, one for dwpe
    const double row = double(a.C) * double(dtype_bytes(a.dwte.dtype));
    return {.n_bytes = bytes({a.dy, a.dy}) + 2 * row * double(n_different) + gradient_bytes(a.T * row, a.accumulate) +
                       2 * double(a.tokens.n_bytes()),
            .launches = 3};
}
Cost cost(const EmbeddingGrad& a) { return cost(a, std::min(a.tokens.count, size_t(a.V))); }

Cost cost(const LayerNorm& a) { return {.n_bytes = bytes({a.y, a.mean, a.rstd, a.x})}; }
Cost cost(const LayerNormGrad& a) {
    const double dx = bytes({a.dx}) * (a.overwrite_dx ? 1 : 2);
    return {.n_bytes = dx + bytes({a.dy, a.x, a.mean, a.rstd}), .launches = 2};
}

Cost cost(const Linear& a) {
    return {.n_bytes = bytes({a.y, a.pre_gelu, a.x, a.w, a.residual}), .flop = 2.0 * a.BT * a.C * a.OC};
}
Cost cost(const LinearGrad& a) {
    const double flop = 2.0 * a.BT * a.C * a.OC;
    Cost c = {.n_bytes = bytes({a.x, a.dy}) + gradient_bytes(bytes({a.dw}), a.accumulate), .flop = flop};
    if (a.dx) c.n_bytes += bytes({a.dx, a.dy, a.w, a.pre_gelu}), c.flop += flop, c.launches++;
    if (a.db) c.launches += 2;
    return c;
}

Cost cost(const Gelu& a) { return {.n_bytes = bytes({a.y, a.x})}; }
Cost cost(const GeluGrad& a) { return {.n_bytes = bytes({a.dx, a.dy, a.x})}; }

Cost cost(const Attention& a) {  // two products of 2 BT C T, half of each in the future
    return {.n_bytes = bytes({a.y, a.lse, a.qkv}), .flop = 2.0 * double(a.y.count) * a.T};
}
Cost cost(const AttentionGrad& a) {  // five products
    return {.n_bytes = bytes({a.dqkv, a.dy, a.qkv, a.y, a.lse, a.scratch, a.scratch}),
            .flop = 5.0 * double(a.y.count) * a.T,
            .launches = 3};
}

Cost cost(const Dropout& a) { return {.n_bytes = bytes({a.y, a.x, a.residual})}; }

Cost cost(const CrossEntropy& a) { return {.n_bytes = bytes({a.logits}) * (a.grad_scale != 0 ? 2 : 1)}; }
Cost cost(const RowSum& a) { return {.n_bytes = bytes({a.x})}; }

Cost cost(const Add& a) { return {.n_bytes = bytes({a.y, a.y, a.x})}; }
Cost cost(const TreeSum& a) { return {.n_bytes = bytes({a.y, a.x})}; }
Cost cost(const Cast& a) { return {.n_bytes = bytes({a.y, a.x})}; }
Cost cost(const Hash& a) { return {.n_bytes = bytes({a.x}), .launches = 2}; }

Cost cost(const OptimizerUpdate& a) {
    return {.n_bytes = bytes({a.param, a.param, a.copy, a.m, a.m, a.v, a.v, a.grad})};
}
Cost cost(const GradNorm& a) {
    return {.n_bytes = a.grad ? bytes({a.grad}) : 0, .launches = int(bool(a.grad)) + int(bool(a.norm))};
}

Cost cost(const AnyOp& op) {
    return std::visit([](const auto& one) { return cost(one); }, op);
}
