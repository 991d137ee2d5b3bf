// GPT-2: learned positions, pre-LayerNorm, packed QKV, causal attention, tanh-GELU MLP of 4C, classifier tied to wte.
// visit() is the only list of parameters, visit_activations() the only list of activations; everything else calls them.
#pragma once
#include <initializer_list>

#include "model/architecture.h"

extern const Architecture gpt2;

struct BlockParams {
    Buf ln1w, ln1b;        // (C)
    Buf qkvw, qkvb;        // (C, 3C), (3C)
    Buf projw, projb;      // (C, C), (C)
    Buf ln2w, ln2b;        // (C)
    Buf fcw, fcb;          // (C, 4C), (4C)
    Buf fcprojw, fcprojb;  // (4C, C), (C)
};
struct GPT2Params {
    Buf wte;                         // (Vp, C)
    Buf wpe;                         // (T, C)
    std::vector<BlockParams> block;  // (L)
    Buf lnfw, lnfb;                  // (C)
};

// Calls f(layer, name, member, shape, init, split, rows on disk) for every parameter, in the order of the forward pass.
// The name is Hugging Face's inside the block; `layer` is -1 outside of blocks.
template <class F>
void visit(GPT2Params& p, const ModelConfig& c, F&& f) {
    const size_t C = size_t(c.C), T = size_t(c.T), V = size_t(c.V), Vp = size_t(c.Vp());
    const Init weight = Init::normal(0.02f), zeros = Init::zeros(), ones = Init::ones();
    const Init residual =
        Init::normal(0.02f / __builtin_sqrtf(2.0f * float(c.L)));  // GPT-2: 1/sqrt(number of residual layers)
    int layer = -1;
    const auto put = [&](const char* name, Buf& b, std::initializer_list<size_t> shape, Init init, Split split,
                         size_t saved = 0) { f(layer, name, b, shape, init, split, saved ? saved : *shape.begin()); };
    const auto bias = [&](const char* name, Buf& b, size_t n, Split split) {
        if (c.bias) put(name, b, {n}, zeros, split);
    };
    p.block.resize(size_t(c.L));
    put("wte.weight", p.wte, {Vp, C}, weight, Split::rows, V);
    put("wpe.weight", p.wpe, {T, C}, weight, Split::none);
    for (BlockParams& b : p.block) {
        layer++;
        put("ln_1.weight", b.ln1w, {C}, ones, Split::none);
        bias("ln_1.bias", b.ln1b, C, Split::none);
        put("attn.c_attn.weight", b.qkvw, {C, 3 * C}, weight, Split::columns);
        bias("attn.c_attn.bias", b.qkvb, 3 * C, Split::columns);
        put("attn.c_proj.weight", b.projw, {C, C}, residual, Split::rows);
        bias("attn.c_proj.bias", b.projb, C, Split::none);
        put("ln_2.weight", b.ln2w, {C}, ones, Split::none);
        bias("ln_2.bias", b.ln2b, C, Split::none);
        put("mlp.c_fc.weight", b.fcw, {C, 4 * C}, weight, Split::columns);
        bias("mlp.c_fc.bias", b.fcb, 4 * C, Split::columns);
        put("mlp.c_proj.weight", b.fcprojw, {4 * C, C}, residual, Split::rows);
        bias("mlp.c_proj.bias", b.fcprojb, C, Split::none);
    }
    layer = -1;
    put("ln_f.weight", p.lnfw, {C}, ones, Split::none);
    bias("ln_f.bias", p.lnfb, C, Split::none);
}

struct BlockActs {
    Buf ln1;                 // (BT, C)
    Buf ln1_mean, ln1_rstd;  // (BT) stat
    Buf qkv;                 // (BT, 3, NH, HS)
    Buf att;                 // (BT, NH, HS)
    Buf lse;                 // (B, NH, T) stat
    Buf res_att;             // (BT, C)  residual stream after attention
    Buf ln2;                 // (BT, C)
    Buf ln2_mean, ln2_rstd;  // (BT) stat
    Buf pre_gelu, gelu;      // (BT, 4C)
    Buf res_mlp;             // (BT, C)  residual stream after the MLP
};
struct GPT2Acts {
    Buf emb;                       // (BT, C)
    std::vector<BlockActs> block;  // (L)  what every block keeps
    BlockActs shared;              // tensors that blocks use in turn
    Buf lnf;                       // (BT, C)
    Buf lnf_mean, lnf_rstd;        // (BT) stat
    Buf logits;                    // (BT, Vp)  becomes their gradient
    Buf loss;                      // (BT) stat
    Buf correct;                   // (BT) i32
    Buf branch;                    // (BT, C)  output of a projection before its dropout; absent without dropout
    // Backward: one set, used by every layer in turn; absent when only evaluating.
    Buf d_res;        // (BT, C)  gradient of the residual stream
    Buf d_branch;     // (BT, C)  gradient of a projection's output; absent without dropout
    Buf d_ln;         // (BT, C)
    Buf d_att;        // (BT, C)
    Buf d_qkv;        // (BT, 3C)
    Buf d_gelu;       // (BT, 4C)
    Buf att_scratch;  // (B, NH, T) stat
};

// Calls f(prefix, layer, name, member, elements, dtype) for every activation.  The prefix is "h." for a block's own,
// "shared." for those that blocks share, and "" outside of blocks, where `layer` is -1.
template <class F>
void visit_activations(GPT2Acts& a, const ModelConfig& c, const ActivationShape& z, F&& f) {
    const DType real = z.real, stat = real == DType::f64 ? DType::f64 : DType::f32;
    const size_t BT = size_t(z.B) * z.T, C = size_t(c.C), heads = size_t(z.B) * c.NH * z.T;
    const bool dropout = c.dropout > 0;
    const auto put = [&](const char* name, Buf& member, size_t n, DType t) { f("", -1, name, member, n, t); };
    // A tensor that blocks share at this level is visited once, after all blocks.
    const auto visit_block = [&](BlockActs& b, int layer) {
        const bool own = layer >= 0;
        const auto put = [&](const char* name, Buf& member, size_t n, DType t, Recompute level) {
            if ((z.recompute < level) == own) f(own ? "h." : "shared.", layer, name, member, n, t);
        };
        // clang-format off
        //  name       member      elements    dtype  shared from this level on
        put("ln1",      b.ln1,      BT * C,     real, Recompute::block);
        put("ln1_mean", b.ln1_mean, BT,         stat, Recompute::block);
        put("ln1_rstd", b.ln1_rstd, BT,         stat, Recompute::block);
        put("qkv",      b.qkv,      BT * 3 * C, real, Recompute::block);
        put("att",      b.att,      BT * C,     real, Recompute::block);
        put("lse",      b.lse,      heads,      stat, Recompute::block);
        put("res_att",  b.res_att,  BT * C,     real, Recompute::block);
        put("ln2",      b.ln2,      BT * C,     real, Recompute::block);
        put("ln2_mean", b.ln2_mean, BT,         stat, Recompute::block);
        put("ln2_rstd", b.ln2_rstd, BT,         stat, Recompute::block);
        put("pre_gelu", b.pre_gelu, BT * 4 * C, real, Recompute::block);
        put("gelu",     b.gelu,     BT * 4 * C, real, Recompute::gelu);
        // clang-format on
        if (own) f("h.", layer, "res_mlp", b.res_mlp, BT * C, real);
    };
    a.block.resize(size_t(c.L));
    put("emb", a.emb, BT * C, real);
    for (int l = 0; l < c.L; l++) visit_block(a.block[size_t(l)], l);
    visit_block(a.shared, -1);
    put("lnf", a.lnf, BT * C, real);
    put("lnf_mean", a.lnf_mean, BT, stat);
    put("lnf_rstd", a.lnf_rstd, BT, stat);
    put("logits", a.logits, BT * size_t(c.Vp()), real);
    put("loss", a.loss, BT, stat);
    put("correct", a.correct, BT, DType::i32);
    if (dropout) put("branch", a.branch, BT * C, real);
    if (!z.backward) return;
    put("d_res", a.d_res, BT * C, real);
    if (dropout) put("d_branch", a.d_branch, BT * C, real);
    put("d_ln", a.d_ln, BT * C, real);
    put("d_att", a.d_att, BT * C, real);
    put("d_qkv", a.d_qkv, BT * 3 * C, real);
    put("d_gelu", a.d_gelu, BT * 4 * C, real);
    put("att_scratch", a.att_scratch, heads, stat);
}
