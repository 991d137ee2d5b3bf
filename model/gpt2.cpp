// The forward and backward pass of GPT-2, straight down the page.
#include "model/gpt2.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "common/rng.h"

namespace {
DropoutMask mask(const GPT2Config& c, const GPT2Batch& batch, int layer, DropoutKind kind, bool train) {
    return {.where = batch.where, .seed = batch.seed, .site = dropout_site(layer, kind), .p = train ? c.dropout : 0};
}

// y = residual + dropout(x w + b); without dropout the sum is part of the matrix product's epilogue.
void project(const Backend& k, Linear op, const GPT2Acts& a, const DropoutMask& m, const GPT2Batch& batch, Stream s) {
    if (m.p == 0) return k.linear_forward(op, s);
    const Buf y = op.y, residual = op.residual;
    op.y = a.branch;
    op.residual = {};
    k.linear_forward(op, s);
    k.dropout({.y = y, .x = a.branch, .residual = residual, .mask = m, .B = batch.B, .T = batch.T, .C = op.OC}, s);
}

// Gradient of a projection's output, from the gradient of the residual stream it was added to.
Buf branch_gradient(const Backend& k, const GPT2Acts& a, const DropoutMask& m, const GPT2Batch& batch, int C,
                    Stream s) {
    if (m.p == 0) return a.d_res;
    k.dropout({.y = a.d_branch, .x = a.d_res, .mask = m, .B = batch.B, .T = batch.T, .C = C}, s);
    return a.d_branch;
}

// The activations of a block, wherever they are kept.
BlockActs acts_of(const GPT2Acts& a, int layer) {
    BlockActs h = a.block[size_t(layer)];
    const auto shared = [&](auto... member) { ((h.*member = h.*member ? h.*member : a.shared.*member), ...); };
    shared(&BlockActs::ln1, &BlockActs::ln1_mean, &BlockActs::ln1_rstd, &BlockActs::qkv, &BlockActs::att,
           &BlockActs::lse, &BlockActs::res_att, &BlockActs::ln2, &BlockActs::ln2_mean, &BlockActs::ln2_rstd,
           &BlockActs::pre_gelu, &BlockActs::gelu);
    return h;
}
// (BT, C) the residual stream that a block begins with.
Buf input_of(const GPT2Acts& a, int layer) { return layer > 0 ? a.block[size_t(layer - 1)].res_mlp : a.emb; }
}  // namespace

size_t count_params(const GPT2Config& c) {
    GPT2Params p;
    size_t n = 0;
    visit(p, c, [&](const ParamInfo& info, Buf&) { n += info.count_saved(); });
    return n;
}

double flops_per_token(const GPT2Config& c) { return 6.0 * double(count_params(c)) + 12.0 * c.L * double(c.C) * c.T; }

namespace {
// Four normal numbers from one counter: Box and Muller 1958, twice.
std::array<double, 4> normal4(uint64_t key, uint32_t tensor, uint64_t counter) {
    const Philox4 r = philox(key, uint32_t(counter), uint32_t(counter >> 32), tensor, 0);
    std::array<double, 4> out{};
    for (int i = 0; i < 4; i += 2) {
        const double radius = std::sqrt(-2 * std::log(double(uniform_open0(r.v[i]))));
        const double angle = 2 * M_PI * double(uniform_open0(r.v[i + 1]));
        out[size_t(i)] = radius * std::cos(angle);
        out[size_t(i) + 1] = radius * std::sin(angle);
    }
    return out;
}

template <class T>
void fill(const Backend& k, const ParamInfo& info, Buf parameter, uint32_t tensor, uint64_t key, Stream s) {
    std::vector<T> piece(std::min(parameter.count, size_t(1) << 20));  // a large tensor is not held twice
    for (size_t first = 0; first < parameter.count; first += piece.size()) {
        const size_t n = std::min(piece.size(), parameter.count - first);
#pragma omp parallel for
        for (size_t group = 0; group < n; group += 4) {
            std::array<double, 4> z{};
            if (info.init.stddev > 0) z = normal4(key, tensor, (first + group) / 4);
            for (size_t i = group; i < std::min(group + 4, n); i++) {
                const double v = info.init.mean + info.init.stddev * z[i - group];
                piece[i] = first + i < info.count_saved() ? T(float(v)) : T(0);
            }
        }
        k.upload(parameter.slice(first, n).data, piece.data(), n * sizeof(T), s);
        k.synchronize(s);
    }
}
}  // namespace

void init_tensor(const Backend& k, const ParamInfo& info, Buf parameter, uint32_t tensor, uint64_t seed, Stream s) {
    const uint64_t key = stream_key(seed, RngStream::init);
    if (parameter.dtype == DType::f64) return fill<double>(k, info, parameter, tensor, key, s);
    fill<float>(k, info, parameter, tensor, key, s);
}

// One op per statement: outputs, inputs, sizes.  Hand-aligned, because this is the page that people come to read.
// clang-format off
namespace {
// A block up to the input of its last projection: what the backward pass needs of it.
void block_forward(const Backend& k, const GPT2Config& c, const BlockParams& w, GPT2Acts& a, int l, const GPT2Batch& batch,
                   bool train, Stream s) {
    const int B = batch.B, T = batch.T, BT = B * T, C = c.C, NH = c.NH, HS = c.HS();
    const BlockActs h = acts_of(a, l);
    const Buf x = input_of(a, l);  // (BT, C)
    k.layernorm_forward({.y = h.ln1, .mean = h.ln1_mean, .rstd = h.ln1_rstd,
                         .x = x, .w = w.ln1w, .b = w.ln1b, .BT = BT, .C = C}, s);
    k.linear_forward({.y = h.qkv, .x = h.ln1, .w = w.qkvw, .b = w.qkvb, .BT = BT, .C = C, .OC = 3 * C}, s);
    k.attention_forward({.y = h.att, .lse = h.lse, .qkv = h.qkv,
                         .dropout = mask(c, batch, l, DropoutKind::attention, train),
                         .B = B, .T = T, .NH = NH, .HS = HS}, s);
    project(k, {.y = h.res_att, .x = h.att, .w = w.projw, .b = w.projb, .residual = x,
                .BT = BT, .C = C, .OC = C},
            a, mask(c, batch, l, DropoutKind::attention_residual, train), batch, s);
    k.layernorm_forward({.y = h.ln2, .mean = h.ln2_mean, .rstd = h.ln2_rstd,
                         .x = h.res_att, .w = w.ln2w, .b = w.ln2b, .BT = BT, .C = C}, s);
    k.linear_forward({.y = h.gelu, .pre_gelu = h.pre_gelu, .x = h.ln2, .w = w.fcw, .b = w.fcb,
                      .BT = BT, .C = C, .OC = 4 * C, .fuse_gelu = a.recompute != Recompute::gelu}, s);
}

// Brings back what the block did not keep.  The last block's is still there.
void recompute(const Backend& k, const GPT2Config& c, const BlockParams& w, GPT2Acts& a, int l, const GPT2Batch& batch,
               Stream s) {
    if (l == c.L - 1) return;
    const BlockActs h = acts_of(a, l);
    if (a.recompute == Recompute::gelu) k.gelu_forward({.y = h.gelu, .x = h.pre_gelu}, s);
    if (a.recompute == Recompute::block) block_forward(k, c, w, a, l, batch, true, s);
}
}  // namespace

void gpt2_logits(const Backend& k, const GPT2Config& c, const GPT2Params& p, GPT2Acts& a, const GPT2Batch& batch,
                 bool train, Stream s) {
    const int B = batch.B, T = batch.T, BT = B * T, C = c.C;
    k.embedding_forward({.y = a.emb, .tokens = batch.inputs, .wte = p.wte, .wpe = p.wpe,
                         .B = B, .T = T, .C = C, .V = c.V}, s);
    if (const DropoutMask m = mask(c, batch, 0, DropoutKind::embedding, train); m.p > 0)
        k.dropout({.y = a.emb, .x = a.emb, .mask = m, .B = B, .T = T, .C = C}, s);
    for (int l = 0; l < c.L; l++) {
        const BlockParams& w = p.block[size_t(l)];
        const BlockActs h = acts_of(a, l);
        block_forward(k, c, w, a, l, batch, train, s);
        project(k, {.y = h.res_mlp, .x = h.gelu, .w = w.fcprojw, .b = w.fcprojb, .residual = h.res_att,
                    .BT = BT, .C = 4 * C, .OC = C},
                a, mask(c, batch, l, DropoutKind::mlp_residual, train), batch, s);
    }
    k.layernorm_forward({.y = a.lnf, .mean = a.lnf_mean, .rstd = a.lnf_rstd,
                         .x = input_of(a, c.L), .w = p.lnfw, .b = p.lnfb, .BT = BT, .C = C}, s);
    k.linear_forward({.y = a.logits, .x = a.lnf, .w = p.wte, .BT = BT, .C = C, .OC = c.Vp(), .w_transposed = true}, s);
}

void gpt2_forward(const Backend& k, const GPT2Config& c, const GPT2Params& p, GPT2Acts& a, const GPT2Batch& batch,
                  bool train, float grad_scale, Stream s) {
    gpt2_logits(k, c, p, a, batch, train, s);
    k.cross_entropy({.loss = a.loss, .correct = a.correct, .logits = a.logits, .targets = batch.targets,
                     .BT = batch.B * batch.T, .V = c.V, .Vp = c.Vp(), .grad_scale = grad_scale}, s);
}

void gpt2_backward(const Backend& k, const GPT2Config& c, const GPT2Params& p, GPT2Acts& a, GPT2Params& g,
                   const GPT2Batch& batch, bool accumulate, Stream s) {
    const int B = batch.B, T = batch.T, BT = B * T, C = c.C, NH = c.NH, HS = c.HS();
    const bool acc = accumulate;
    k.linear_backward({.dx = a.d_ln, .dw = g.wte, .dy = a.logits, .x = a.lnf, .w = p.wte,
                       .BT = BT, .C = C, .OC = c.Vp(), .w_transposed = true, .accumulate = acc}, s);
    // Without dropout a projection's output gradient is the residual stream's, and its bias gradient the column sums
    // that the LayerNorm's backward takes along as it writes it.
    const bool dropout = c.dropout > 0;
    const auto sums = [&](Buf bias) { return dropout ? Buf() : bias; };  // (C) of the LayerNorm
    const auto own = [&](Buf bias) { return dropout ? bias : Buf(); };   // (C) of the projection
    k.layernorm_backward({.dx = a.d_res, .dw = g.lnfw, .db = g.lnfb, .dx_sum = sums(g.block.back().fcprojb),
                          .dy = a.d_ln, .x = input_of(a, c.L), .w = p.lnfw, .mean = a.lnf_mean, .rstd = a.lnf_rstd,
                          .BT = BT, .C = C, .overwrite_dx = true, .accumulate = acc}, s);
    for (int l = c.L - 1; l >= 0; l--) {
        const BlockParams& w = p.block[size_t(l)];
        BlockParams& dw = g.block[size_t(l)];
        const BlockActs h = acts_of(a, l);
        recompute(k, c, w, a, l, batch, s);

        Buf dy = branch_gradient(k, a, mask(c, batch, l, DropoutKind::mlp_residual, true), batch, C, s);
        k.linear_backward({.dx = a.d_gelu, .dw = dw.fcprojw, .db = own(dw.fcprojb),
                           .dy = dy, .x = h.gelu, .w = w.fcprojw, .pre_gelu = h.pre_gelu,
                           .BT = BT, .C = 4 * C, .OC = C, .accumulate = acc}, s);
        k.linear_backward({.dx = a.d_ln, .dw = dw.fcw, .db = dw.fcb, .dy = a.d_gelu, .x = h.ln2, .w = w.fcw,
                           .BT = BT, .C = C, .OC = 4 * C, .accumulate = acc}, s);
        k.layernorm_backward({.dx = a.d_res, .dw = dw.ln2w, .db = dw.ln2b, .dx_sum = sums(dw.projb), .dy = a.d_ln,
                              .x = h.res_att, .w = w.ln2w, .mean = h.ln2_mean, .rstd = h.ln2_rstd,
                              .BT = BT, .C = C, .accumulate = acc}, s);

        dy = branch_gradient(k, a, mask(c, batch, l, DropoutKind::attention_residual, true), batch, C, s);
        k.linear_backward({.dx = a.d_att, .dw = dw.projw, .db = own(dw.projb), .dy = dy, .x = h.att, .w = w.projw,
                           .BT = BT, .C = C, .OC = C, .accumulate = acc}, s);
        k.attention_backward({.dqkv = a.d_qkv, .dy = a.d_att, .qkv = h.qkv, .y = h.att, .lse = h.lse,
                              .scratch = a.att_scratch,
                              .dropout = mask(c, batch, l, DropoutKind::attention, true),
                              .B = B, .T = T, .NH = NH, .HS = HS}, s);
        k.linear_backward({.dx = a.d_ln, .dw = dw.qkvw, .db = dw.qkvb, .dy = a.d_qkv, .x = h.ln1, .w = w.qkvw,
                           .BT = BT, .C = C, .OC = 3 * C, .accumulate = acc}, s);
        const Buf below = l > 0 ? g.block[size_t(l - 1)].fcprojb : Buf();  // (C) bias of what made this block's input
        k.layernorm_backward({.dx = a.d_res, .dw = dw.ln1w, .db = dw.ln1b, .dx_sum = sums(below), .dy = a.d_ln,
                              .x = input_of(a, l), .w = w.ln1w, .mean = h.ln1_mean, .rstd = h.ln1_rstd,
                              .BT = BT, .C = C, .accumulate = acc}, s);
    }
    if (const DropoutMask m = mask(c, batch, 0, DropoutKind::embedding, true); m.p > 0)
        k.dropout({.y = a.d_res, .x = a.d_res, .mask = m, .B = B, .T = T, .C = C}, s);
    k.embedding_backward({.dwte = g.wte, .dwpe = g.wpe, .dy = a.d_res, .tokens = batch.inputs, .order = batch.order,
                          .B = B, .T = T, .C = C, .V = c.V, .accumulate = acc}, s);
}
// clang-format on
