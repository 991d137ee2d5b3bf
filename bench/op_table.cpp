#include "bench/op_table.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <string_view>

#include "common/config_words.h"
#include "common/token_order.h"

using bench::Bench;
using bench::shape_of;

namespace {
// ---- Names.

// Products have the names of their weights; GPT-2's weights have these shorter names.
constexpr std::pair<std::string_view, std::string_view> kLabels[] = {{"attn.c_attn", "qkv"},
                                                                     {"attn.c_proj", "attention proj"},
                                                                     {"mlp.c_fc", "fc"},
                                                                     {"mlp.c_proj", "mlp proj"},
                                                                     {"wte", "head"}};
// "h.11.attn.c_attn.weight" -> "qkv".
std::string label_of(std::string_view parameter) {
    parameter = parameter.substr(0, parameter.rfind('.'));
    size_t begin = 0;  // after the block's number
    for (size_t at = 0, end; (end = parameter.find('.', at)) != std::string_view::npos; at = end + 1)
        if (parameter.find_first_not_of("0123456789", at) == end) begin = end + 1;
    parameter.remove_prefix(begin);
    for (const auto& [name, label] : kLabels)
        if (parameter == name) return std::string(label);
    return std::string(parameter);
}

struct Named {
    std::string name, part, shape;
};
const char* when(bool accumulate) { return accumulate ? ", +=" : ""; }

// Names ops: one overload for each.
struct Namer {
    std::map<const void*, std::string> label;  // of the weights at this address

    std::string of(const Buf& w) const { return label.contains(w.data) ? label.at(w.data) : "linear"; }
    static std::string part(const std::string& label) { return label == "head" ? "head" : "layer products"; }

    Named operator()(const Embedding& a) const { return {"embedding forward", "embedding", rows(a.y, a.C)}; }
    Named operator()(const EmbeddingGrad& a) const {
        return {fmt::format("embedding backward{}", when(a.accumulate)), "embedding", rows(a.dy, a.C)};
    }
    Named operator()(const LayerNorm& a) const { return {"layernorm forward", "layernorm", rows(a.y, a.C)}; }
    Named operator()(const LayerNormGrad& a) const {  // the last LayerNorm starts the residual stream's gradient
        return {fmt::format("{}layernorm backward{}", a.overwrite_dx ? "last " : "", when(a.accumulate)), "layernorm",
                rows(a.dy, a.C)};
    }
    Named operator()(const Linear& a) const {
        return {of(a.w) + " forward", part(of(a.w)), shape_of({size_t(a.BT), size_t(a.C), size_t(a.OC)})};
    }
    Named operator()(const LinearGrad& a) const {
        return {fmt::format("{} backward{}", of(a.w), a.dx ? when(a.accumulate) : ", dw alone"), part(of(a.w)),
                shape_of({size_t(a.BT), size_t(a.C), size_t(a.OC)})};
    }
    Named operator()(const Gelu& a) const { return {"gelu forward", "other", shape_of({a.y.count})}; }
    Named operator()(const GeluGrad& a) const { return {"gelu backward", "other", shape_of({a.dx.count})}; }
    Named operator()(const Attention& a) const { return {"attention forward", "attention", heads(a)}; }
    Named operator()(const AttentionGrad& a) const { return {"attention backward", "attention", heads(a)}; }
    Named operator()(const Dropout& a) const {
        return {a.residual ? "dropout + residual" : "dropout", "other", rows(a.y, a.C)};
    }
    Named operator()(const CrossEntropy& a) const { return {"cross-entropy", "loss", rows(a.logits, a.Vp)}; }
    Named operator()(const RowSum& a) const { return {"row sum", "loss", rows(a.x, a.T)}; }
    Named operator()(const Add& a) const { return {"add", "other", shape_of({a.y.count})}; }
    Named operator()(const TreeSum& a) const {
        return {fmt::format("tree sum of {}", a.parts), "other", shape_of({a.y.count})};
    }
    Named operator()(const Cast& a) const { return {"cast", "other", shape_of({a.y.count})}; }
    Named operator()(const Hash& a) const { return {"hash", "other", shape_of({a.x.count})}; }
    Named operator()(const OptimizerUpdate& a) const {
        return {word_of(a.kind), "optimizer", shape_of({a.param.count})};
    }
    Named operator()(const GradNorm& a) const { return {"gradient norm", "optimizer", shape_of({a.grad.count})}; }

  private:
    static std::string rows(const Buf& b, int width) { return shape_of({b.count / size_t(width), size_t(width)}); }
    template <class Op>
    static std::string heads(const Op& a) {
        return shape_of({size_t(a.B), size_t(a.T), size_t(a.NH), size_t(a.HS)});
    }
};

// ---- Operands of the timed ops.

// Token numbers distributed as in text (Zipf): a few tokens are very frequent.
std::vector<int32_t> some_tokens(size_t n, int V) {
    std::mt19937 gen(2);
    std::uniform_real_distribution<double> u(0, 1);
    std::vector<int32_t> v(n);
    for (int32_t& t : v) t = std::min(int32_t(std::pow(double(V), u(gen))) - 1, V - 1);
    return v;
}
size_t n_different(std::vector<int32_t> tokens) {
    std::ranges::sort(tokens);
    return size_t(std::unique(tokens.begin(), tokens.end()) - tokens.begin());
}
Cost cost_on_some_tokens(const AnyOp& op) {
    const auto* e = std::get_if<EmbeddingGrad>(&op);
    return e ? cost(*e, n_different(some_tokens(e->tokens.count, e->V))) : cost(op);
}

// Gives an op new buffers of the op's sizes and dtypes: one overload for each.  Activations have a deviation of 1.
struct Filler {
    static constexpr double kGrad = 0.01, kWeight = 0.02;  // deviations
    Bench& b;

    Buf tokens(const Buf& like, int V) const { return b.copy_of(some_tokens(like.count, V)); }
    DropoutMask mask(DropoutMask m) const { return m.where = b.like(m.where), m; }

    void operator()(Embedding& a) const {
        a.y = b.like(a.y), a.tokens = tokens(a.tokens, a.V);
        a.wte = b.like(a.wte, kWeight), a.wpe = b.like(a.wpe, kWeight);
    }
    void operator()(EmbeddingGrad& a) const {
        const std::vector<int32_t> drawn = some_tokens(a.tokens.count, a.V);
        std::vector<int32_t> order(drawn.size());
        sort_rows_by_token(drawn.data(), order.data(), drawn.size(), a.V);
        a.dwte = b.like(a.dwte), a.dwpe = b.like(a.dwpe), a.dy = b.like(a.dy, kGrad);
        a.tokens = b.copy_of(drawn), a.order = b.copy_of(order);
    }
    void operator()(LayerNorm& a) const {
        a.y = b.like(a.y), a.mean = b.like(a.mean), a.rstd = b.like(a.rstd);
        a.x = b.like(a.x), a.w = b.like(a.w), a.b = b.like(a.b);
    }
    void operator()(LayerNormGrad& a) const {
        a.dx = b.like(a.dx, kGrad), a.dw = b.like(a.dw), a.db = b.like(a.db), a.dx_sum = b.like(a.dx_sum);
        a.dy = b.like(a.dy, kGrad), a.x = b.like(a.x), a.w = b.like(a.w);
        a.mean = b.like(a.mean, 0.01), a.rstd = b.like(a.rstd);
    }
    void operator()(Linear& a) const {
        a.y = b.like(a.y), a.pre_gelu = b.like(a.pre_gelu), a.residual = b.like(a.residual);
        a.x = b.like(a.x), a.w = b.like(a.w, kWeight), a.b = b.like(a.b, kWeight);
    }
    void operator()(LinearGrad& a) const {
        a.dx = b.like(a.dx), a.dw = b.like(a.dw), a.db = b.like(a.db);
        a.dy = b.like(a.dy, kGrad), a.x = b.like(a.x), a.w = b.like(a.w, kWeight), a.pre_gelu = b.like(a.pre_gelu);
    }
    void operator()(Gelu& a) const { a.y = b.like(a.y), a.x = b.like(a.x); }
    void operator()(GeluGrad& a) const { a.dx = b.like(a.dx), a.dy = b.like(a.dy, kGrad), a.x = b.like(a.x); }
    void operator()(Attention& a) const {
        a.y = b.like(a.y), a.lse = b.like(a.lse), a.qkv = b.like(a.qkv), a.dropout = mask(a.dropout);
    }
    void operator()(AttentionGrad& a) const {
        a.dqkv = b.like(a.dqkv), a.dy = b.like(a.dy, kGrad), a.qkv = b.like(a.qkv), a.dropout = mask(a.dropout);
        a.y = b.like(a.y), a.lse = b.like(a.lse), a.scratch = b.like(a.scratch);
        b.k().attention_forward(
            {.y = a.y, .lse = a.lse, .qkv = a.qkv, .dropout = a.dropout, .B = a.B, .T = a.T, .NH = a.NH, .HS = a.HS},
            b.stream());  // the gradient needs a matching y and lse
    }
    void operator()(Dropout& a) const {
        a.y = b.like(a.y), a.x = b.like(a.x), a.residual = b.like(a.residual), a.mask = mask(a.mask);
    }
    void operator()(CrossEntropy& a) const {
        a.loss = b.like(a.loss), a.correct = b.like(a.correct), a.logits = b.like(a.logits);
        a.targets = tokens(a.targets, a.V);
    }
    void operator()(RowSum& a) const { a.y = b.like(a.y), a.x = b.like(a.x); }
    void operator()(Add& a) const { a.y = b.like(a.y), a.x = b.like(a.x, 1e-3); }
    void operator()(TreeSum& a) const { a.x = b.like(a.x), a.y = a.x.slice(0, a.y.count); }
    void operator()(Cast& a) const { a.y = b.like(a.y), a.x = b.like(a.x); }
    void operator()(Hash& a) const { a.y = b.like(a.y), a.x = b.like(a.x); }
    void operator()(OptimizerUpdate& a) const {
        a.param = b.like(a.param, kWeight), a.copy = b.like(a.copy), a.grad = b.like(a.grad, 1e-3);
        a.m = b.like(a.m, 1e-3), a.v = a.v ? b.zeros(a.v.count, a.v.dtype) : Buf();  // v is not negative
        a.decay = b.like(a.decay);
        a.rate = b.copy_of(std::vector<float>{1e-4f, 0.1f, 0.05f}), a.clip = b.copy_of(std::vector<float>{1});
    }
    void operator()(GradNorm& a) const {
        a.norm = b.like(a.norm), a.clip = b.like(a.clip), a.grad = b.like(a.grad), a.scratch = b.like(a.scratch);
    }
};

// ---- The rows.

class Rows {
  public:
    explicit Rows(const TrainerMemory& memory) {
        for (size_t i = 0; i < memory.params.size(); i++)
            namer_.label[memory.params[i].data] = label_of(memory.param_list[i].name);
    }
    void add(const AnyOp& op, int calls) {
        Named n = std::visit(namer_, op);
        for (OpRow& row : all_)
            if (row.name == n.name && row.shape == n.shape) {
                row.calls += calls;
                return;
            }
        all_.push_back({std::move(n.name), std::move(n.part), std::move(n.shape), calls, cost_on_some_tokens(op), op});
    }
    std::vector<OpRow> take() { return std::move(all_); }

  private:
    Namer namer_;
    std::vector<OpRow> all_;
};

Buf buffer(size_t n, DType t) { return {recorder_backend().memory.alloc(n * dtype_bytes(t)), n, t}; }

// Adds ops, at the step's shapes, that deserve a row although this step may not use them.
void add_ops_beside_the_step(Rows& rows, const std::vector<AnyOp>& step) {
    for (const AnyOp& op : step) {
        if (const auto* a = std::get_if<LinearGrad>(&op)) {
            LinearGrad dw_alone = *a;
            dw_alone.dx = dw_alone.pre_gelu = {};
            dw_alone.accumulate = false;
            rows.add(dw_alone, 0);
        }
        if (const auto* a = std::get_if<Linear>(&op); a && a->pre_gelu) {
            rows.add(Gelu{.y = a->y, .x = a->pre_gelu}, 0);
            rows.add(GeluGrad{.dx = a->y, .dy = a->y, .x = a->pre_gelu}, 0);
        }
        if (const auto* a = std::get_if<Embedding>(&op)) {
            const DropoutMask mask = {.where = buffer(2, DType::u32), .seed = 1, .site = 1, .p = 0.1f};
            const Dropout alone = {.y = a->y, .x = a->y, .mask = mask, .B = a->B, .T = a->T, .C = a->C};
            Dropout with_residual = alone;
            with_residual.residual = a->y;
            rows.add(with_residual, 0);
            rows.add(alone, 0);
        }
        if (const auto* a = std::get_if<OptimizerUpdate>(&op)) {
            const size_t n = a->grad.count;
            const Buf two = buffer(2 * n, DType::f32);  // (2, n)
            rows.add(Add{.y = a->grad, .x = a->grad}, 0);
            rows.add(TreeSum{.y = two.slice(0, n), .x = two, .parts = 2}, 0);
            rows.add(Cast{.y = a->copy ? a->copy : a->param, .x = a->grad}, 0);
            rows.add(Hash{.y = buffer(2, DType::u32), .x = a->param}, 0);
        }
    }
}
}  // namespace

StepRecord record_step(const TrainerOptions& options) {
    TrainerOptions o = options;
    o.graph = UseGraph::off;
    const Group one_rank(recorder_backend());
    Trainer trainer(one_rank, o);
    const std::vector<int32_t> tokens(size_t(o.train.micro_batch_size) * size_t(o.model.T));  // (B, T)
    const Recording step;
    trainer.step(0, 0, [&] { return Trainer::Tokens{.inputs = tokens, .targets = tokens, .order = {}}; });
    Rows rows(trainer.memory());
    for (const AnyOp& op : step.ops()) rows.add(op, 1);
    add_ops_beside_the_step(rows, step.ops());
    return {.rows = rows.take(), .n_micro = trainer.share().n_micro};
}

Bench::Run prepare(Bench& b, AnyOp op) {
    std::visit(Filler{b}, op);
    return [op, &b] { give(b.k(), op, b.stream()); };
}
