// GPT-2: learned positions, pre-LayerNorm, packed QKV, causal attention, tanh-GELU MLP of 4C, classifier tied to wte.
// visit() is the only list of parameters, visit_activations() the only list of activations; everything else calls them.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/config_words.h"
#include "kernels/ops.h"

struct GPT2Config {
    int L = 0, NH = 0, C = 0, T = 0, V = 0;  // layers, heads, width, context length, vocabulary
    bool bias = true;                        // false: no biases in Linear and LayerNorm
    float dropout = 0;
    int Vp() const { return (V + 127) / 128 * 128; }
    int HS() const { return C / NH; }
    bool operator==(const GPT2Config&) const = default;
};

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

struct Init {
    float mean, stddev;
    static Init normal(float s) { return {0, s}; }
    static Init zeros() { return {0, 0}; }
    static Init ones() { return {1, 0}; }
};
// The axis that tensor parallelism (not built yet) divides; it stands here so that the list stays the only one.
enum class Split : uint8_t { none, rows, columns };

struct ParamInfo {
    std::string name;           // Hugging Face GPT-2 name
    std::vector<size_t> shape;  // in memory
    size_t n_rows_saved;        // rows on disk: V of Vp for wte, else shape[0]
    Init init;
    bool decay;  // AdamW decays tensors of two dimensions
    Split split;
    size_t count() const {
        size_t n = 1;
        for (size_t s : shape) n *= s;
        return n;
    }
    size_t count_saved() const { return count() / shape[0] * n_rows_saved; }
};

// Calls f(const ParamInfo&, Buf& member) for every parameter, in the order of the forward pass.
template <class F>
void visit(GPT2Params& p, const GPT2Config& c, F&& f) {
    const size_t C = size_t(c.C), T = size_t(c.T), V = size_t(c.V), Vp = size_t(c.Vp());
    const Init weight = Init::normal(0.02f), zeros = Init::zeros(), ones = Init::ones();
    const Init residual =
        Init::normal(0.02f / __builtin_sqrtf(2.0f * float(c.L)));  // GPT-2: 1/sqrt(number of residual layers)
    const auto put = [&](std::string name, Buf& b, std::vector<size_t> shape, Init init, Split split,
                         size_t saved = 0) {
        const bool decay = shape.size() >= 2;
        f(ParamInfo{std::move(name), shape, saved ? saved : shape[0], init, decay, split}, b);
    };
    const auto bias = [&](std::string name, Buf& b, size_t n, Split split) {
        if (c.bias) put(std::move(name), b, {n}, zeros, split);
    };
    p.block.resize(size_t(c.L));
    put("wte.weight", p.wte, {Vp, C}, weight, Split::rows, V);
    put("wpe.weight", p.wpe, {T, C}, weight, Split::none);
    for (int l = 0; l < c.L; l++) {
        BlockParams& b = p.block[size_t(l)];
        const std::string h = "h." + std::to_string(l) + ".";
        put(h + "ln_1.weight", b.ln1w, {C}, ones, Split::none);
        bias(h + "ln_1.bias", b.ln1b, C, Split::none);
        put(h + "attn.c_attn.weight", b.qkvw, {C, 3 * C}, weight, Split::columns);
        bias(h + "attn.c_attn.bias", b.qkvb, 3 * C, Split::columns);
        put(h + "attn.c_proj.weight", b.projw, {C, C}, residual, Split::rows);
        bias(h + "attn.c_proj.bias", b.projb, C, Split::none);
        put(h + "ln_2.weight", b.ln2w, {C}, ones, Split::none);
        bias(h + "ln_2.bias", b.ln2b, C, Split::none);
        put(h + "mlp.c_fc.weight", b.fcw, {C, 4 * C}, weight, Split::columns);
        bias(h + "mlp.c_fc.bias", b.fcb, 4 * C, Split::columns);
        put(h + "mlp.c_proj.weight", b.fcprojw, {4 * C, C}, residual, Split::rows);
        bias(h + "mlp.c_proj.bias", b.fcprojb, C, Split::none);
    }
    put("ln_f.weight", p.lnfw, {C}, ones, Split::none);
    bias("ln_f.bias", p.lnfb, C, Split::none);
}

// Parameters without the rows that only pad the vocabulary.
size_t count_params(const GPT2Config& c);

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
    Recompute recompute = Recompute::none;
    Buf emb;                       // (BT, C)
    std::vector<BlockActs> block;  // (L)  what every block keeps
    BlockActs shared;              // what blocks use in turn
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

// Calls f(name, member, elements, dtype) for every activation of a batch of B x T.
template <class F>
void visit_activations(GPT2Acts& a, const GPT2Config& c, int B, int T, DType real, Recompute recompute, bool backward,
                       F&& f) {
    const DType stat = real == DType::f64 ? DType::f64 : DType::f32;
    const size_t BT = size_t(B) * T, C = size_t(c.C), heads = size_t(B) * c.NH * T;
    const bool dropout = c.dropout > 0;
    a.recompute = recompute;
    a.block.resize(size_t(c.L));
    f("emb", a.emb, BT * C, real);
    // Those that `shared` keep the level's blocks from keeping are visited once, after them.
    const auto visit_block = [&](BlockActs& b, const std::string& h, bool own) {
        const auto put = [&](const char* name, Buf& member, size_t n, DType t, Recompute level) {
            if ((recompute < level) == own) f(h + name, member, n, t);
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
        if (own) f(h + "res_mlp", b.res_mlp, BT * C, real);
    };
    for (int l = 0; l < c.L; l++) visit_block(a.block[size_t(l)], "h." + std::to_string(l) + ".", true);
    visit_block(a.shared, "shared.", false);
    f("lnf", a.lnf, BT * C, real);
    f("lnf_mean", a.lnf_mean, BT, stat);
    f("lnf_rstd", a.lnf_rstd, BT, stat);
    f("logits", a.logits, BT * size_t(c.Vp()), real);
    f("loss", a.loss, BT, stat);
    f("correct", a.correct, BT, DType::i32);
    if (dropout) f("branch", a.branch, BT * C, real);
    if (!backward) return;
    f("d_res", a.d_res, BT * C, real);
    if (dropout) f("d_branch", a.d_branch, BT * C, real);
    f("d_ln", a.d_ln, BT * C, real);
    f("d_att", a.d_att, BT * C, real);
    f("d_qkv", a.d_qkv, BT * 3 * C, real);
    f("d_gelu", a.d_gelu, BT * 4 * C, real);
    f("att_scratch", a.att_scratch, heads, stat);
}

// One micro-batch and where its dropout masks come from.
struct GPT2Batch {
    Buf inputs, targets;  // (B, T) i32
    Buf order;            // (B*T) i32: see EmbeddingGrad
    int B = 0, T = 0;     // T may be shorter than the context length
    Buf where;            // (2) u32: step and place of sequence 0, for dropout
    uint64_t seed = 0;
};

// Everything up to the logits.  `train` switches the config's dropout on.
void gpt2_logits(const Backend& k, const GPT2Config& c, const GPT2Params& p, GPT2Acts& a, const GPT2Batch& batch,
                 bool train, Stream s);
// Logits, then per-token loss and correct.  With grad_scale != 0 the logits become their gradient.
void gpt2_forward(const Backend& k, const GPT2Config& c, const GPT2Params& p, GPT2Acts& a, const GPT2Batch& batch,
                  bool train, float grad_scale, Stream s);
// After gpt2_forward with train and grad_scale, and no other forward pass since: gradients of the sum of losses times
// grad_scale.  g =, or += when accumulate: every parameter's gradient is written.
void gpt2_backward(const Backend& k, const GPT2Config& c, const GPT2Params& p, GPT2Acts& a, GPT2Params& g,
                   const GPT2Batch& batch, bool accumulate, Stream s);

// Fills one parameter: every element is a pure function of (seed, the tensor's place in the list, element).
// Rows that only pad the vocabulary become zero.
void init_tensor(const Backend& k, const ParamInfo& info, Buf parameter, uint32_t tensor, uint64_t seed, Stream s);

// Floating-point operations of one training step per token, PaLM's formula: 6 N + 12 L C T (Chowdhery et al. 2022, app.
// B).
double flops_per_token(const GPT2Config& c);
