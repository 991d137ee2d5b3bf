// The size checks of every op, once for every backend: checked() (ops.h) calls them before the backend's function.
#include "kernels/ops.h"

namespace {
void expect_size_if_given(const char* what, const Buf& b, size_t expected, const char* formula) {
    if (b) expect_size(what, b, expected, formula);
}

// A table of embeddings may have more rows than the op can reach.
void expect_table(const char* what, const Buf& table, size_t rows, int C, const char* formula) {
    CHECK_THAT(table.data && table.count % size_t(C) == 0 && table.count / size_t(C) >= rows,
               "{} holds {} elements, expected whole rows of C = {}, at least {} = {} of them", what, table.count, C,
               formula, rows);
}

void expect_mask(const char* what, const DropoutMask& mask) {
    if (mask.p > 0) expect_size(what, mask.where, 2, "2");
}
}  // namespace

void check(const Embedding& a) {
    const size_t BT = size_t(a.B) * a.T;
    expect_size("embedding.y", a.y, BT * a.C, "B*T*C");
    expect_size("embedding.tokens", a.tokens, BT, "B*T");
    expect_table("embedding.wte", a.wte, size_t(a.V), a.C, "V");
    expect_table("embedding.wpe", a.wpe, size_t(a.T), a.C, "T");
}
void check(const EmbeddingGrad& a) {
    const size_t BT = size_t(a.B) * a.T;
    expect_table("embedding.dwte", a.dwte, size_t(a.V), a.C, "V");
    expect_table("embedding.dwpe", a.dwpe, size_t(a.T), a.C, "T");
    expect_size("embedding.dy", a.dy, BT * a.C, "B*T*C");
    expect_size("embedding.tokens", a.tokens, BT, "B*T");
    expect_size_if_given("embedding.order", a.order, BT, "B*T");
}

void check(const LayerNorm& a) {
    const size_t BT = size_t(a.BT), C = size_t(a.C);
    expect_size("layernorm.y", a.y, BT * C, "BT*C");
    expect_size("layernorm.mean", a.mean, BT, "BT");
    expect_size("layernorm.rstd", a.rstd, BT, "BT");
    expect_size("layernorm.x", a.x, BT * C, "BT*C");
    expect_size("layernorm.w", a.w, C, "C");
    expect_size_if_given("layernorm.b", a.b, C, "C");
}
void check(const LayerNormGrad& a) {
    const size_t BT = size_t(a.BT), C = size_t(a.C);
    expect_size("layernorm.dx", a.dx, BT * C, "BT*C");
    expect_size("layernorm.dw", a.dw, C, "C");
    expect_size_if_given("layernorm.db", a.db, C, "C");
    expect_size_if_given("layernorm.dx_sum", a.dx_sum, C, "C");
    expect_size("layernorm.dy", a.dy, BT * C, "BT*C");
    expect_size("layernorm.x", a.x, BT * C, "BT*C");
    expect_size("layernorm.w", a.w, C, "C");
    expect_size("layernorm.mean", a.mean, BT, "BT");
    expect_size("layernorm.rstd", a.rstd, BT, "BT");
}

void check(const Linear& a) {
    CHECK_THAT(a.BT > 0 && a.C > 0 && a.OC > 0, "linear: BT = {}, C = {}, OC = {}", a.BT, a.C, a.OC);
    CHECK_THAT(!a.pre_gelu || !a.residual, "linear.pre_gelu and linear.residual are given together");
    const size_t out = size_t(a.BT) * a.OC;
    expect_size("linear.y", a.y, out, "BT*OC");
    expect_size_if_given("linear.pre_gelu", a.pre_gelu, out, "BT*OC");
    expect_size("linear.x", a.x, size_t(a.BT) * a.C, "BT*C");
    expect_size("linear.w", a.w, size_t(a.C) * a.OC, "C*OC");
    expect_size_if_given("linear.b", a.b, size_t(a.OC), "OC");
    expect_size_if_given("linear.residual", a.residual, out, "BT*OC");
}
void check(const LinearGrad& a) {
    CHECK_THAT(a.BT > 0 && a.C > 0 && a.OC > 0, "linear: BT = {}, C = {}, OC = {}", a.BT, a.C, a.OC);
    const size_t in = size_t(a.BT) * a.C;
    expect_size_if_given("linear.dx", a.dx, in, "BT*C");
    expect_size("linear.dw", a.dw, size_t(a.C) * a.OC, "C*OC");
    expect_size_if_given("linear.db", a.db, size_t(a.OC), "OC");
    expect_size("linear.dy", a.dy, size_t(a.BT) * a.OC, "BT*OC");
    expect_size("linear.x", a.x, in, "BT*C");
    expect_size("linear.w", a.w, size_t(a.C) * a.OC, "C*OC");
    expect_size_if_given("linear.pre_gelu", a.pre_gelu, in, "BT*C");
}

void check(const Gelu& a) {
    expect_size("gelu.y", a.y, a.x.count, "n");
    expect_size("gelu.x", a.x, a.y.count, "n");
}
void check(const GeluGrad& a) {
    expect_size("gelu.dx", a.dx, a.x.count, "n");
    expect_size("gelu.dy", a.dy, a.x.count, "n");
    expect_size("gelu.x", a.x, a.dx.count, "n");
}

void check(const Attention& a) {
    const size_t BT = size_t(a.B) * a.T, C = size_t(a.NH) * a.HS;
    expect_size("attention.y", a.y, BT * C, "B*T*NH*HS");
    expect_size("attention.lse", a.lse, BT * a.NH, "B*NH*T");
    expect_size("attention.qkv", a.qkv, BT * 3 * C, "B*T*3*NH*HS");
    expect_mask("attention.dropout.where", a.dropout);
}
void check(const AttentionGrad& a) {
    const size_t BT = size_t(a.B) * a.T, C = size_t(a.NH) * a.HS;
    expect_size("attention.dqkv", a.dqkv, BT * 3 * C, "B*T*3*NH*HS");
    expect_size("attention.dy", a.dy, BT * C, "B*T*NH*HS");
    expect_size("attention.qkv", a.qkv, BT * 3 * C, "B*T*3*NH*HS");
    expect_size("attention.y", a.y, BT * C, "B*T*NH*HS");
    expect_size("attention.lse", a.lse, BT * a.NH, "B*NH*T");
    expect_size("attention.scratch", a.scratch, BT * a.NH, "B*NH*T");
    expect_mask("attention.dropout.where", a.dropout);
}

void check(const Dropout& a) {
    const size_t n = size_t(a.B) * a.T * a.C;
    expect_size("dropout.y", a.y, n, "B*T*C");
    expect_size("dropout.x", a.x, n, "B*T*C");
    expect_size_if_given("dropout.residual", a.residual, n, "B*T*C");
    expect_mask("dropout.mask.where", a.mask);
}

void check(const CrossEntropy& a) {
    const size_t BT = size_t(a.BT);
    expect_size("cross_entropy.loss", a.loss, BT, "BT");
    expect_size_if_given("cross_entropy.correct", a.correct, BT, "BT");
    expect_size("cross_entropy.logits", a.logits, BT * a.Vp, "BT*Vp");
    expect_size("cross_entropy.targets", a.targets, BT, "BT");
    CHECK_THAT(a.V >= 1 && a.V <= a.Vp, "cross_entropy: V = {}, expected 1 <= V <= Vp = {}", a.V, a.Vp);
}
void check(const RowSum& a) {
    expect_size("row_sum.y", a.y, size_t(a.B), "B");
    expect_size("row_sum.x", a.x, size_t(a.B) * a.T, "B*T");
}

void check(const Add& a) {
    expect_size("add.y", a.y, a.x.count, "add.x");
    expect_size("add.x", a.x, a.y.count, "add.y");
}
void check(const TreeSum& a) {
    CHECK_THAT(a.parts >= 1 && (a.parts & (a.parts - 1)) == 0, "tree_sum of {} parts; needs a power of two", a.parts);
    expect_size("tree_sum.x", a.x, size_t(a.parts) * a.y.count, "parts*n");
    expect_size("tree_sum.y", a.y, a.x.count / size_t(a.parts), "n");
}
void check(const Cast& a) {
    expect_size("cast.y", a.y, a.x.count, "cast.x");
    expect_size("cast.x", a.x, a.y.count, "cast.y");
}
void check(const Hash& a) {
    expect_size("hash.y", a.y, 2, "2");
    CHECK_THAT(a.x.n_bytes() % 4 == 0, "hash.x holds {} bytes, expected a multiple of 4", a.x.n_bytes());
}

void check(const OptimizerUpdate& a) {
    const size_t n = a.param.count;
    expect_size("optimizer.param", a.param, n, "n");
    expect_size("optimizer.grad", a.grad, n, "n");
    expect_size("optimizer.m", a.m, n, "n");
    if (n_moments(a.kind) > 1) expect_size("optimizer.v", a.v, n, "n");
    expect_size("optimizer.decay", a.decay, (n + kDecayBlock - 1) / kDecayBlock, "ceil(n/64)");
    expect_size("optimizer.rate", a.rate, 3, "3");
    expect_size("optimizer.clip", a.clip, 1, "1");
    expect_size_if_given("optimizer.copy", a.copy, n, "n");
}
void check(const GradNorm& a) {
    const size_t n = a.grad.count;
    CHECK_THAT(bool(a.norm) == bool(a.clip) && (a.norm || a.grad), "grad_norm needs norm and clip, or grad, or all");
    if (a.norm) expect_size("grad_norm.norm", a.norm, 1, "1");
    if (a.norm) expect_size("grad_norm.clip", a.clip, 1, "1");
    if (!a.grad) return;
    expect_size("grad_norm.grad", a.grad, n, "n");
    expect_size("grad_norm.scratch", a.scratch, grad_norm_scratch(n), "ceil(n/65536)");
}
