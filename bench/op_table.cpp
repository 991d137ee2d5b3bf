#include "bench/op_table.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "common/token_order.h"

using bench::Bench;
using bench::shape_of;

namespace {
using Ops = std::vector<TimedOp>;

// Token numbers as in text: the most frequent ones far ahead (Zipf).
std::vector<int32_t> some_tokens(const StepShape& z) {
    std::mt19937 gen(2);
    std::uniform_real_distribution<double> u(0, 1);
    std::vector<int32_t> v(static_cast<size_t>(z.BT()));
    for (int32_t& t : v) t = std::min(int32_t(std::pow(double(z.model.V), u(gen))) - 1, z.model.V - 1);
    return v;
}

// Calls add(suffix, accumulate, calls) for the gradients that are written and for those that are added, where a step
// has such.
template <class F>
void for_both_gradients(const StepShape& z, int per_micro_batch, F&& add) {
    add("", false, per_micro_batch * (z.n_micro - z.n_accumulating));
    if (z.n_accumulating > 0) add(", +=", true, per_micro_batch * z.n_accumulating);
}

// A gradient of a parameter is written, or read and written.
double gradient_bytes(double n, bool accumulate) { return n * (accumulate ? 8 : 4); }

DropoutMask mask(Bench& b, float p) {
    return p > 0 ? DropoutMask{.where = b.zeros(2, DType::u32), .seed = 1, .site = 1, .p = p} : DropoutMask{};
}

// clang-format off
// One op per paragraph: its operands, then what a call moves and computes.
void add_embedding(Ops& all, const StepShape& z) {
    const int C = z.model.C, T = z.model.T, V = z.model.V;
    const size_t A = size_t(z.BT()) * C, W = size_t(z.model.Vp()) * C, P = size_t(T) * C;
    const std::string shape = shape_of({size_t(z.BT()), size_t(C)});
    all.push_back({"embedding forward", "embedding", z.n_micro, [=](Bench& b) {
        const Embedding e{.y = b.real(A), .tokens = b.copy_of(some_tokens(z)), .wte = b.real(W, 0.02),
                          .wpe = b.real(P, 0.02), .B = z.B, .T = T, .C = C, .V = V};
        return OpRow{shape, b.real_bytes(double(2 * A + P)) + 4.0 * z.BT(), 0,
                     [=, &b] { b.k().embedding_forward(e, b.stream()); }};
    }});
    for_both_gradients(z, 1, [&](const char* suffix, bool accumulate, int calls) {
        all.push_back({fmt::format("embedding backward{}", suffix), "embedding", calls, [=](Bench& b) {
            const std::vector<int32_t> tokens = some_tokens(z);
            std::vector<int32_t> order(tokens.size()), distinct = tokens;
            sort_rows_by_token(tokens.data(), order.data(), tokens.size(), V);
            std::sort(distinct.begin(), distinct.end());
            const double n_rows = double(std::unique(distinct.begin(), distinct.end()) - distinct.begin());
            const EmbeddingGrad e{.dwte = b.stat(W), .dwpe = b.stat(P), .dy = b.real(A, 0.01),
                                  .tokens = b.copy_of(tokens), .order = b.copy_of(order), .B = z.B, .T = T, .C = C,
                                  .V = V, .accumulate = accumulate};
            return OpRow{shape,
                         b.real_bytes(2.0 * double(A)) + 8.0 * n_rows * C + gradient_bytes(double(P), accumulate) +
                             8.0 * z.BT(), 0,
                         [=, &b] { b.k().embedding_backward(e, b.stream()); }};
        }});
    });
}

void add_layernorm(Ops& all, const StepShape& z) {
    const size_t BT = size_t(z.BT()), C = size_t(z.model.C), A = BT * C;
    const int BTi = z.BT(), Ci = z.model.C, per_block = 2 * z.model.L;
    const bool bias = z.model.bias, sums = bias && z.model.dropout == 0;  // the gradient of the projection before it
    all.push_back({"layernorm forward", "layernorm", (per_block + 1) * z.n_micro, [=](Bench& b) {
        LayerNorm n{.y = b.real(A), .mean = b.stat(BT), .rstd = b.stat(BT), .x = b.real(A), .w = b.real(C),
                    .BT = BTi, .C = Ci};
        if (bias) n.b = b.real(C);
        return OpRow{shape_of({BT, C}), b.real_bytes(double(2 * A)) + 8.0 * double(BT), 0,
                     [=, &b] { b.k().layernorm_forward(n, b.stream()); }};
    }});
    for (const bool last : {false, true})  // the last one's gradient begins the residual stream's
        for_both_gradients(z, last ? 1 : per_block, [&](const char* suffix, bool accumulate, int calls) {
            const std::string name = fmt::format("{}layernorm backward{}", last ? "last " : "", suffix);
            all.push_back({name, "layernorm", calls, [=](Bench& b) {
                LayerNormGrad n{.dx = b.real(A, 0.01), .dw = b.stat(C), .dy = b.real(A, 0.01), .x = b.real(A),
                                .w = b.real(C), .mean = b.stat(BT, 0.01), .rstd = b.stat(BT), .BT = BTi, .C = Ci,
                                .overwrite_dx = last, .accumulate = accumulate};
                if (bias) n.db = b.stat(C);
                if (sums) n.dx_sum = b.stat(C);
                return OpRow{shape_of({BT, C}), b.real_bytes(double((last ? 3 : 4) * A)) + 8.0 * double(BT), 0,
                             [=, &b] { b.k().layernorm_backward(n, b.stream()); }};
            }});
        });
}

struct Layer {
    const char* name;
    int C, OC, per_micro_batch;
    bool gelu_after = false, gelu_before = false, residual = false, head = false;
};

void add_linear(Ops& all, const StepShape& z, const Layer& l) {
    const size_t BT = size_t(z.BT()), X = BT * l.C, Y = BT * l.OC, W = size_t(l.C) * l.OC, OC = size_t(l.OC);
    const int BTi = z.BT();
    const double flop = 2.0 * double(X) * l.OC;
    const std::string shape = shape_of({BT, size_t(l.C), OC}), part = l.head ? "head" : "layer products";
    const bool bias = z.model.bias && !l.head;
    all.push_back({fmt::format("{} forward", l.name), part, l.per_micro_batch * z.n_micro, [=](Bench& b) {
        Linear o{.y = b.real(Y), .x = b.real(X), .w = b.real(W, 0.02), .BT = BTi, .C = l.C, .OC = l.OC,
                 .w_transposed = l.head};
        if (bias) o.b = b.real(OC, 0.02);
        if (l.gelu_after) o.pre_gelu = b.real(Y);
        if (l.residual) o.residual = b.real(Y);
        return OpRow{shape, b.real_bytes(double(X + W + Y * (l.gelu_after || l.residual ? 2 : 1))), flop,
                     [=, &b] { b.k().linear_forward(o, b.stream()); }};
    }});
    const auto gradient = [&](const std::string& name, int calls, bool accumulate, bool whole) {
        all.push_back({name, part, calls, [=](Bench& b) {
            LinearGrad o{.dw = b.stat(W), .dy = b.real(Y, 0.01), .x = b.real(X), .w = b.real(W, 0.02), .BT = BTi,
                         .C = l.C, .OC = l.OC, .w_transposed = l.head, .accumulate = accumulate};
            if (bias && !l.residual) o.db = b.stat(OC);  // with it the LayerNorm's backward takes the sums along
            if (whole) o.dx = b.real(X);
            if (whole && l.gelu_before) o.pre_gelu = b.real(X);
            const double weights = b.real_bytes(double(X + Y)) + gradient_bytes(double(W), accumulate);
            const double inputs = b.real_bytes(double(Y + W + X * (l.gelu_before ? 2 : 1)));
            return OpRow{shape, weights + (whole ? inputs : 0), whole ? 2 * flop : flop,
                         [=, &b] { b.k().linear_backward(o, b.stream()); }};
        }});
    };
    for_both_gradients(z, l.per_micro_batch, [&](const char* suffix, bool accumulate, int calls) {
        gradient(fmt::format("{} backward{}", l.name, suffix), calls, accumulate, true);
    });
    gradient(fmt::format("{} backward, dw alone", l.name), 0, false, false);
}

void add_gelu(Ops& all, const StepShape& z) {
    const size_t n = size_t(z.BT()) * z.model.C * 4;
    all.push_back({"gelu forward", "other", 0, [=](Bench& b) {
        const Gelu g{.y = b.real(n), .x = b.real(n)};
        return OpRow{shape_of({n}), b.real_bytes(double(2 * n)), 0, [=, &b] { b.k().gelu_forward(g, b.stream()); }};
    }});
    all.push_back({"gelu backward", "other", 0, [=](Bench& b) {
        const GeluGrad g{.dx = b.real(n), .dy = b.real(n, 0.01), .x = b.real(n)};
        return OpRow{shape_of({n}), b.real_bytes(double(3 * n)), 0, [=, &b] { b.k().gelu_backward(g, b.stream()); }};
    }});
}

void add_attention(Ops& all, const StepShape& z) {
    const int T = z.model.T, NH = z.model.NH, HS = z.model.HS(), B = z.B;
    const size_t A = size_t(z.BT()) * z.model.C, stats = size_t(z.BT()) * NH;
    const double flop = 2.0 * double(A) * T;  // two products of 2 A T, half of each in the future
    const std::string shape = shape_of({size_t(B), size_t(T), size_t(NH), size_t(HS)});
    const float p = z.model.dropout;
    const int calls = z.model.L * z.n_micro;
    const auto forward = [=](Bench& b) {
        return Attention{.y = b.real(A), .lse = b.stat(stats), .qkv = b.real(3 * A), .dropout = mask(b, p), .B = B,
                         .T = T, .NH = NH, .HS = HS};
    };
    all.push_back({"attention forward", "attention", calls, [=](Bench& b) {
        const Attention a = forward(b);
        return OpRow{shape, b.real_bytes(double(4 * A)) + 4.0 * double(stats), flop,
                     [=, &b] { b.k().attention_forward(a, b.stream()); }};
    }});
    all.push_back({"attention backward", "attention", calls, [=](Bench& b) {
        const Attention a = forward(b);
        b.k().attention_forward(a, b.stream());  // the gradient needs a matching y and lse
        const AttentionGrad g{.dqkv = b.real(3 * A), .dy = b.real(A, 0.01), .qkv = a.qkv, .y = a.y, .lse = a.lse,
                              .scratch = b.stat(stats), .dropout = a.dropout, .B = B, .T = T, .NH = NH, .HS = HS};
        return OpRow{shape, b.real_bytes(double(8 * A)) + 12.0 * double(stats), 2.5 * flop,
                     [=, &b] { b.k().attention_backward(g, b.stream()); }};
    }});
}

void add_loss(Ops& all, const StepShape& z) {
    const size_t BT = size_t(z.BT()), Vp = size_t(z.model.Vp()), n = BT * Vp;
    all.push_back({"cross-entropy", "loss", z.n_micro, [=](Bench& b) {
        const CrossEntropy c{.loss = b.stat(BT), .correct = b.zeros(BT, DType::i32), .logits = b.real(n),
                             .targets = b.copy_of(some_tokens(z)), .BT = z.BT(), .V = z.model.V, .Vp = z.model.Vp(),
                             .grad_scale = 1.0f / float(z.BT())};
        return OpRow{shape_of({BT, Vp}), b.real_bytes(double(2 * n)), 0,
                     [=, &b] { b.k().cross_entropy(c, b.stream()); }};
    }});
    all.push_back({"row sum", "loss", z.n_micro, [=](Bench& b) {
        const RowSum r{.y = b.stat(size_t(z.B)), .x = b.stat(BT), .B = z.B, .T = z.model.T};
        return OpRow{shape_of({size_t(z.B), size_t(z.model.T)}), 4.0 * double(BT), 0,
                     [=, &b] { b.k().row_sum(r, b.stream()); }};
    }});
}

// Where a model has dropout, its projections are not added to the residual stream by the matrix product but here.
void add_dropout(Ops& all, const StepShape& z) {
    const int C = z.model.C, T = z.model.T, B = z.B;
    const size_t BT = size_t(z.BT()), A = BT * C;
    const float p = z.model.dropout > 0 ? z.model.dropout : 0.1f;
    const int calls = z.model.dropout > 0 ? z.n_micro : 0;
    for (const bool residual : {true, false}) {
        const int per_micro_batch = residual ? 2 * z.model.L : 2 * z.model.L + 2;
        all.push_back({residual ? "dropout + residual" : "dropout", "other", calls * per_micro_batch, [=](Bench& b) {
            Dropout d{.y = b.real(A), .x = b.real(A), .mask = mask(b, p), .B = B, .T = T, .C = C};
            if (residual) d.residual = b.real(A);
            return OpRow{shape_of({BT, size_t(C)}), b.real_bytes(double(A) * (residual ? 3 : 2)), 0,
                         [=, &b] { b.k().dropout(d, b.stream()); }};
        }});
    }
}

// Over all parameters as one buffer.
void add_optimizer(Ops& all, const StepShape& z) {
    size_t n = 0;
    for (const ParamInfo& p : z.model.architecture->params(z.model))  // as in their arena
        n += (p.count() + kDecayBlock - 1) / kDecayBlock * kDecayBlock;
    const double N = double(n);
    const std::string shape = shape_of({n});
    all.push_back({"gradient norm", "optimizer", 1, [=](Bench& b) {
        const GradNorm g{.norm = b.stat(1), .clip = b.stat(1), .grad = b.stat(n), .scratch = b.stat(grad_norm_scratch(n)),
                         .max_norm = 1};
        return OpRow{shape, 4 * N, 0, [=, &b] { b.k().grad_norm(g, b.stream()); }};
    }});
    const bool sgd = z.optimizer == OptimizerKind::sgd;
    const char* name = sgd ? "sgd" : z.optimizer == OptimizerKind::adam ? "adam" : "adamw";
    all.push_back({name, "optimizer", 1, [=, kind = z.optimizer](Bench& b) {
        OptimizerUpdate u{.param = b.stat(n, 0.02), .m = b.stat(n, 1e-3), .grad = b.stat(n, 1e-3),
                          .decay = b.zeros(n / kDecayBlock, DType::u8),
                          .rate = b.copy_of(std::vector<float>{1e-4f, 0.1f, 0.05f}),
                          .clip = b.copy_of(std::vector<float>{1}), .kind = kind, .weight_decay = 0.1f};
        if (!sgd) u.v = b.zeros(n, DType::f32);
        if (b.real_type() == DType::bf16) u.copy = b.real(n);
        return OpRow{shape, N * ((sgd ? 20 : 28) + (b.real_type() == DType::bf16 ? 2 : 0)), 0,
                     [=, &b] { b.k().optimizer_update(u, b.stream()); }};
    }});
    all.push_back({"add", "other", z.n_folds, [=](Bench& b) {
        const Add a{.y = b.stat(n), .x = b.stat(n, 1e-3)};
        return OpRow{shape, 12 * N, 0, [=, &b] { b.k().add(a, b.stream()); }};
    }});
    all.push_back({"tree sum of 2", "other", 0, [=](Bench& b) {
        const Buf x = b.stat(2 * n);
        const TreeSum t{.y = x.slice(0, n), .x = x, .parts = 2};
        return OpRow{shape, 12 * N, 0, [=, &b] { b.k().tree_sum(t, b.stream()); }};
    }});
    all.push_back({"cast", "other", 0, [=](Bench& b) {
        const Cast c{.y = b.real(n), .x = b.stat(n)};
        return OpRow{shape, 4 * N + b.real_bytes(N), 0, [=, &b] { b.k().cast(c, b.stream()); }};
    }});
    all.push_back({"hash", "other", 0, [=](Bench& b) {
        const Hash h{.y = b.zeros(2, DType::u32), .x = b.stat(n)};
        return OpRow{shape, 4 * N, 0, [=, &b] { b.k().hash(h, b.stream()); }};
    }});
}
// clang-format on
}  // namespace

std::vector<TimedOp> step_ops(const StepShape& z) {
    Ops all;
    const int C = z.model.C, L = z.model.L;
    const bool fused = z.model.dropout == 0;  // the residual stream is added by the matrix product
    add_embedding(all, z);
    add_layernorm(all, z);
    add_linear(all, z, {.name = "qkv", .C = C, .OC = 3 * C, .per_micro_batch = L});
    add_attention(all, z);
    add_linear(all, z, {.name = "attention proj", .C = C, .OC = C, .per_micro_batch = L, .residual = fused});
    add_linear(all, z, {.name = "fc", .C = C, .OC = 4 * C, .per_micro_batch = L, .gelu_after = true});
    add_linear(all, z,
               {.name = "mlp proj", .C = 4 * C, .OC = C, .per_micro_batch = L, .gelu_before = true, .residual = fused});
    add_linear(all, z, {.name = "head", .C = C, .OC = z.model.Vp(), .per_micro_batch = 1, .head = true});
    add_loss(all, z);
    add_dropout(all, z);
    add_gelu(all, z);
    add_optimizer(all, z);
    return all;
}
