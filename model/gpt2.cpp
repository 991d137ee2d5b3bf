// The forward and backward pass of GPT-2, straight down the page; then its lists, and its form at Hugging Face.
#include "model/gpt2.h"

#include "common/json.h"

namespace {
// Hands out the tensors of a list one after the other.
class Reader {
  public:
    Reader(const Tensors& list, const char* what) : list_(list), what_(what) {}
    Buf next() {
        CHECK_THAT(n_ < list_.size(), "GPT-2 has more {} than the {} given", what_, list_.size());
        return list_[n_++];
    }
    size_t n_left() const { return list_.size() - n_; }

  private:
    const Tensors& list_;
    const char* what_;
    size_t n_ = 0;
};

GPT2Params bind(const Tensors& list, const ModelConfig& c) {
    GPT2Params p;
    Reader tensors(list, "parameters");
    visit(p, c, [&](int, const char*, Buf& b, auto&&...) { b = tensors.next(); });
    CHECK_THAT(tensors.n_left() == 0, "{} tensors, {} more than GPT-2 has parameters", list.size(), tensors.n_left());
    return p;
}

GPT2Acts bind_activations(const Pass& x) {
    GPT2Acts a;
    Reader tensors(x.acts, "activations");
    const ActivationShape shape{
        .B = x.batch.B, .T = x.batch.T, .recompute = x.recompute, .backward = x.grads != nullptr};
    visit_activations(a, x.config, shape,
                      [&](const char*, int, const char*, Buf& b, auto&&...) { b = tensors.next(); });
    return a;
}

// A pass with the names of its tensors.
struct Named {
    const Backend& k;
    const ModelConfig& c;
    const Batch& batch;
    const Recompute recompute;
    const bool train;
    const Stream s;
    const GPT2Params p;
    const GPT2Acts a;

    explicit Named(const Pass& x)
        : k(x.k),
          c(x.config),
          batch(x.batch),
          recompute(x.recompute),
          train(x.train),
          s(x.stream),
          p(bind(x.params, x.config)),
          a(bind_activations(x)) {
        CHECK_THAT(0 <= x.first_layer && x.first_layer < x.end() && x.end() <= c.L, "blocks [{}, {}) of {}",
                   x.first_layer, x.end(), c.L);
    }
    DropoutMask mask(int layer, DropoutKind kind) const {
        return {
            .where = batch.where, .seed = batch.seed, .site = dropout_site(layer, kind), .p = train ? c.dropout : 0};
    }
    // The activations of a block.  Where a block keeps no tensor of its own, the one that all blocks use in turn.
    BlockActs acts_of(int layer) const {
        BlockActs h = a.block[size_t(layer)];
        const auto shared = [&](auto... member) { ((h.*member = h.*member ? h.*member : a.shared.*member), ...); };
        shared(&BlockActs::ln1, &BlockActs::ln1_mean, &BlockActs::ln1_rstd, &BlockActs::qkv, &BlockActs::att,
               &BlockActs::lse, &BlockActs::res_att, &BlockActs::ln2, &BlockActs::ln2_mean, &BlockActs::ln2_rstd,
               &BlockActs::pre_gelu, &BlockActs::gelu);
        return h;
    }
    // (BT, C) the residual stream that a block begins with.
    Buf input_of(int layer) const { return layer > 0 ? a.block[size_t(layer - 1)].res_mlp : a.emb; }
};

// y = residual + dropout(x w + b); without dropout the sum is part of the matrix product's epilogue.
void project(const Named& x, Linear op, const DropoutMask& m) {
    if (m.p == 0) return x.k.linear_forward(op, x.s);
    const Buf y = op.y, residual = op.residual, branch = x.a.branch;
    op.y = branch;
    op.residual = {};
    x.k.linear_forward(op, x.s);
    x.k.dropout({.y = y, .x = branch, .residual = residual, .mask = m, .B = x.batch.B, .T = x.batch.T, .C = op.OC},
                x.s);
}

// Gradient of a projection's output, from the gradient of the residual stream it was added to.
Buf branch_gradient(const Named& x, const DropoutMask& m) {
    if (m.p == 0) return x.a.d_res;
    x.k.dropout({.y = x.a.d_branch, .x = x.a.d_res, .mask = m, .B = x.batch.B, .T = x.batch.T, .C = x.c.C}, x.s);
    return x.a.d_branch;
}

// One op per statement: outputs, inputs, sizes.  Hand-aligned, because this is the page that people come to read.
// clang-format off

// A block up to the input of its last projection: what the backward pass needs of it.
void block_forward(const Named& x, int l) {
    const Backend& k = x.k;
    const int B = x.batch.B, T = x.batch.T, BT = B * T, C = x.c.C, NH = x.c.NH, HS = x.c.HS();
    const BlockParams& w = x.p.block[size_t(l)];
    const BlockActs h = x.acts_of(l);
    const Buf in = x.input_of(l);  // (BT, C)
    k.layernorm_forward({.y = h.ln1, .mean = h.ln1_mean, .rstd = h.ln1_rstd,
                         .x = in, .w = w.ln1w, .b = w.ln1b, .BT = BT, .C = C}, x.s);
    k.linear_forward({.y = h.qkv, .x = h.ln1, .w = w.qkvw, .b = w.qkvb, .BT = BT, .C = C, .OC = 3 * C}, x.s);
    k.attention_forward({.y = h.att, .lse = h.lse, .qkv = h.qkv, .dropout = x.mask(l, DropoutKind::attention),
                         .B = B, .T = T, .NH = NH, .HS = HS}, x.s);
    project(x, {.y = h.res_att, .x = h.att, .w = w.projw, .b = w.projb, .residual = in,
                .BT = BT, .C = C, .OC = C}, x.mask(l, DropoutKind::attention_residual));
    k.layernorm_forward({.y = h.ln2, .mean = h.ln2_mean, .rstd = h.ln2_rstd,
                         .x = h.res_att, .w = w.ln2w, .b = w.ln2b, .BT = BT, .C = C}, x.s);
    k.linear_forward({.y = h.gelu, .pre_gelu = h.pre_gelu, .x = h.ln2, .w = w.fcw, .b = w.fcb,
                      .BT = BT, .C = C, .OC = 4 * C, .fuse_gelu = x.recompute != Recompute::gelu}, x.s);
}

void forward(const Pass& pass) {
    const Named x(pass);
    const Backend& k = x.k;
    const ModelConfig& c = x.c;
    const GPT2Acts& a = x.a;
    const int B = x.batch.B, T = x.batch.T, BT = B * T, C = c.C;
    if (pass.is_first()) {
        k.embedding_forward({.y = a.emb, .tokens = x.batch.inputs, .wte = x.p.wte, .wpe = x.p.wpe,
                             .B = B, .T = T, .C = C, .V = c.V}, x.s);
        if (const DropoutMask m = x.mask(0, DropoutKind::embedding); m.p > 0)
            k.dropout({.y = a.emb, .x = a.emb, .mask = m, .B = B, .T = T, .C = C}, x.s);
    }
    for (int l = pass.first_layer; l < pass.end(); l++) {
        const BlockParams& w = x.p.block[size_t(l)];
        const BlockActs h = x.acts_of(l);
        block_forward(x, l);
        project(x, {.y = h.res_mlp, .x = h.gelu, .w = w.fcprojw, .b = w.fcprojb, .residual = h.res_att,
                    .BT = BT, .C = 4 * C, .OC = C}, x.mask(l, DropoutKind::mlp_residual));
    }
    if (!pass.is_last()) return;
    k.layernorm_forward({.y = a.lnf, .mean = a.lnf_mean, .rstd = a.lnf_rstd,
                         .x = x.input_of(c.L), .w = x.p.lnfw, .b = x.p.lnfb, .BT = BT, .C = C}, x.s);
    k.linear_forward({.y = a.logits, .x = a.lnf, .w = x.p.wte,
                      .BT = BT, .C = C, .OC = c.Vp(), .w_transposed = true}, x.s);
    if (!x.batch.targets) return;
    k.cross_entropy({.loss = a.loss, .correct = a.correct, .logits = a.logits, .targets = x.batch.targets,
                     .BT = BT, .V = c.V, .Vp = c.Vp(), .grad_scale = pass.grad_scale}, x.s);
}

// Computes again the activations that a block did not keep.  Those of the last block still lie in the shared tensors.
void recompute(const Named& x, int l) {
    if (l == x.c.L - 1) return;
    const BlockActs h = x.acts_of(l);
    if (x.recompute == Recompute::gelu) x.k.gelu_forward({.y = h.gelu, .x = h.pre_gelu}, x.s);
    if (x.recompute == Recompute::block) block_forward(x, l);
}

void backward(const Pass& pass) {
    CHECK_THAT(pass.train && pass.grads, "a backward pass needs gradients and the masks of a training forward pass");
    const Named x(pass);
    const Backend& k = x.k;
    const ModelConfig& c = x.c;
    const GPT2Acts& a = x.a;
    const GPT2Params g = bind(*pass.grads, c);
    const int B = x.batch.B, T = x.batch.T, BT = B * T, C = c.C, NH = c.NH, HS = c.HS();
    const bool acc = pass.accumulate;
    // Without dropout d_res is the gradient of a projection's output, and its column sums are the gradient of the
    // projection's bias.  layernorm_backward writes d_res and these sums (dx_sum): ln2 those of projb; those of fcprojb
    // the LayerNorm that the next block begins with.
    const bool dropout = c.dropout > 0;
    const auto from_layernorm = [&](Buf bias) { return dropout ? Buf() : bias; };  // (C)
    const auto from_linear = [&](Buf bias) { return dropout ? bias : Buf(); };     // (C)
    const auto bias_below = [&](int l) { return l > 0 ? from_layernorm(g.block[size_t(l - 1)].fcprojb) : Buf(); };
    CHECK_THAT(pass.is_first() || dropout || !c.bias || bias_below(pass.first_layer),
               "no gradient for the bias below block {}", pass.first_layer);
    if (pass.is_last()) {  // cross_entropy has replaced the logits by their gradient
        k.linear_backward({.dx = a.d_ln, .dw = g.wte, .dy = a.logits, .x = a.lnf, .w = x.p.wte,
                           .BT = BT, .C = C, .OC = c.Vp(), .w_transposed = true, .accumulate = acc}, x.s);
        k.layernorm_backward({.dx = a.d_res, .dw = g.lnfw, .db = g.lnfb, .dx_sum = bias_below(c.L),
                              .dy = a.d_ln, .x = x.input_of(c.L), .w = x.p.lnfw, .mean = a.lnf_mean, .rstd = a.lnf_rstd,
                              .BT = BT, .C = C, .overwrite_dx = true, .accumulate = acc}, x.s);
    }
    for (int l = pass.end() - 1; l >= pass.first_layer; l--) {
        const BlockParams &w = x.p.block[size_t(l)], &dw = g.block[size_t(l)];
        const BlockActs h = x.acts_of(l);
        recompute(x, l);

        Buf dy = branch_gradient(x, x.mask(l, DropoutKind::mlp_residual));
        k.linear_backward({.dx = a.d_gelu, .dw = dw.fcprojw, .db = from_linear(dw.fcprojb),
                           .dy = dy, .x = h.gelu, .w = w.fcprojw, .pre_gelu = h.pre_gelu,
                           .BT = BT, .C = 4 * C, .OC = C, .accumulate = acc}, x.s);
        k.linear_backward({.dx = a.d_ln, .dw = dw.fcw, .db = dw.fcb, .dy = a.d_gelu, .x = h.ln2, .w = w.fcw,
                           .BT = BT, .C = C, .OC = 4 * C, .accumulate = acc}, x.s);
        k.layernorm_backward({.dx = a.d_res, .dw = dw.ln2w, .db = dw.ln2b, .dx_sum = from_layernorm(dw.projb),
                              .dy = a.d_ln, .x = h.res_att, .w = w.ln2w, .mean = h.ln2_mean, .rstd = h.ln2_rstd,
                              .BT = BT, .C = C, .accumulate = acc}, x.s);

        dy = branch_gradient(x, x.mask(l, DropoutKind::attention_residual));
        k.linear_backward({.dx = a.d_att, .dw = dw.projw, .db = from_linear(dw.projb),
                           .dy = dy, .x = h.att, .w = w.projw,
                           .BT = BT, .C = C, .OC = C, .accumulate = acc}, x.s);
        k.attention_backward({.dqkv = a.d_qkv, .dy = a.d_att, .qkv = h.qkv, .y = h.att, .lse = h.lse,
                              .scratch = a.att_scratch, .dropout = x.mask(l, DropoutKind::attention),
                              .B = B, .T = T, .NH = NH, .HS = HS}, x.s);
        k.linear_backward({.dx = a.d_ln, .dw = dw.qkvw, .db = dw.qkvb, .dy = a.d_qkv, .x = h.ln1, .w = w.qkvw,
                           .BT = BT, .C = C, .OC = 3 * C, .accumulate = acc}, x.s);
        k.layernorm_backward({.dx = a.d_res, .dw = dw.ln1w, .db = dw.ln1b, .dx_sum = bias_below(l), .dy = a.d_ln,
                              .x = x.input_of(l), .w = w.ln1w, .mean = h.ln1_mean, .rstd = h.ln1_rstd,
                              .BT = BT, .C = C, .accumulate = acc}, x.s);
    }
    if (!pass.is_first()) return;
    if (const DropoutMask m = x.mask(0, DropoutKind::embedding); m.p > 0)
        k.dropout({.y = a.d_res, .x = a.d_res, .mask = m, .B = B, .T = T, .C = C}, x.s);
    k.embedding_backward({.dwte = g.wte, .dwpe = g.wpe, .dy = a.d_res, .tokens = x.batch.inputs, .order = x.batch.order,
                          .B = B, .T = T, .C = C, .V = c.V, .accumulate = acc}, x.s);
}
// clang-format on

std::vector<ParamInfo> params(const ModelConfig& c) {
    GPT2Params unused;
    std::vector<ParamInfo> list;
    visit(unused, c,
          [&](int layer, const char* name, Buf&, std::vector<size_t> shape, Init init, Split split, size_t n_rows) {
              const bool decay = shape.size() >= 2;
              list.push_back({layer < 0 ? name : fmt::format("h.{}.{}", layer, name), std::move(shape), n_rows, init,
                              decay, split, layer});
          });
    return list;
}

std::vector<ActivationInfo> activations(const ModelConfig& c, const ActivationShape& shape) {
    GPT2Acts unused;
    std::vector<ActivationInfo> list;
    visit_activations(unused, c, shape,
                      [&](const char* prefix, int layer, const char* name, Buf&, size_t count, DType dtype) {
                          const std::string block = layer < 0 ? "" : fmt::format("{}.", layer);
                          list.push_back({prefix + block + name, count, dtype});
                      });
    return list;
}

void check(const ModelConfig& c, DType real) {
    if (c.C % c.NH != 0) fail(Exit::usage, "model.n_embd = {} is not divisible by model.n_head = {}", c.C, c.NH);
    if (real == DType::bf16 && (c.HS() % 8 != 0 || c.HS() > 128))
        fail(Exit::usage,
             "model.n_embd / model.n_head = {} / {} makes heads of {}; in bf16 they must be a multiple of 8 up to 128: "
             "change n_head, or use device.dtype: fp32",
             c.C, c.NH, c.HS());
}

// PaLM's formula: 6 N + 12 L C T (Chowdhery et al. 2022, app. B).
double flops_per_token(const ModelConfig& c) { return 6.0 * double(count_params(c)) + 12.0 * c.L * double(c.C) * c.T; }

// Buffers of Hugging Face's attention: the causal mask.
bool is_buffer(std::string_view name) { return name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias"); }

// Hugging Face's GPT-2 has no switch for biases: a model without them is stored with biases of zero.
ModelConfig stored(const ModelConfig& c) {
    ModelConfig with_biases = c;
    with_biases.bias = true;
    return with_biases;
}

// Hugging Face's GPT2Config, plus kiln_bias.
nlohmann::ordered_json write_config(const ModelConfig& c) {
    return {{"model_type", "gpt2"},
            {"architectures", {"GPT2LMHeadModel"}},
            {"vocab_size", c.V},
            {"n_positions", c.T},
            {"n_ctx", c.T},
            {"n_embd", c.C},
            {"n_layer", c.L},
            {"n_head", c.NH},
            {"activation_function", "gelu_new"},
            {"layer_norm_epsilon", 1e-5},
            {"resid_pdrop", c.dropout},
            {"embd_pdrop", c.dropout},
            {"attn_pdrop", c.dropout},
            {"tie_word_embeddings", true},
            {"kiln_bias", c.bias}};
}

ModelConfig read_config(const nlohmann::json& j, const std::string& file) {
    // A model that was trained otherwise would run and give wrong numbers.
    const auto require = [&](const char* key, const nlohmann::json& expected) {
        if (j.contains(key) && j[key] != expected)
            fail(Exit::checkpoint, "{}: {} = {}, kiln's GPT-2 has {}", file, key, j[key].dump(), expected.dump());
    };
    require("model_type", "gpt2");
    require("layer_norm_epsilon", 1e-5);
    require("scale_attn_weights", true);
    require("scale_attn_by_inverse_layer_idx", false);
    require("tie_word_embeddings", true);
    if (j.value("activation_function", "gelu_new") != "gelu_pytorch_tanh") require("activation_function", "gelu_new");
    ModelConfig c{.architecture = &gpt2,
                  .L = j.at("n_layer"),
                  .NH = j.at("n_head"),
                  .C = j.at("n_embd"),
                  .V = j.at("vocab_size")};
    c.T = j.contains("n_positions") ? j.at("n_positions") : j.at("n_ctx");
    c.bias = j.value("kiln_bias", true);
    return c;
}
}  // namespace

const Architecture gpt2 = {
    .name = "gpt2",
    .title = "GPT-2",
    .check = check,
    .params = params,
    .activations = activations,
    .forward = forward,
    .backward = backward,
    .flops_per_token = flops_per_token,
    .hugging_face = {.prefix = "transformer.",
                     .head = "lm_head.weight",
                     .tied = "wte.weight",
                     .is_buffer = is_buffer,
                     .stored = stored,
                     .write_config = write_config,
                     .read_config = read_config},
};
