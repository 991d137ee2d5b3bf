// Every op of the CUDA backend: the same bits under 20 random schedules, on one OS thread and on two.
// In the race build the same runs are the race check under those schedules.
// Made to fail by: layernorm's partial rows added in the order in which blocks arrive (an atomicAdd).
#include <functional>

#include "emulator.h"
#include "test/op_test.h"

namespace {
// The schedule of what runs while it lives; whatever the emulator finds is an error of the op.
class Schedule {
  public:
    explicit Schedule(uint64_t seed) : before_(emulator::config()) {
        emulator::config().order = emulator::Order::Random;
        emulator::config().seed = seed;
        emulator::config().threads = 1 + int(seed % 2);
    }
    ~Schedule() { emulator::config() = before_; }

  private:
    emulator::Config before_;
};

struct OpCase {
    const char* name;
    std::function<Doubles(const Target&)> run;  // all outputs, one behind the other
};

Doubles joined(std::initializer_list<const Dev*> outputs) {
    Doubles all;
    for (const Dev* d : outputs) {
        const Doubles v = d->host();
        all.insert(all.end(), v.begin(), v.end());
    }
    return all;
}

constexpr int B = 2, T = 37, NH = 2, HS = 16, C = NH * HS, BT = B * T, OC = 24, V = 50, Vp = 128;
Doubles numbers(size_t n, unsigned seed) { return normal(n, seed, 0.5); }

Doubles embedding(const Target& t) {
    const Doubles tokens = integers(BT, 1, V);
    const std::vector<int32_t> ids(tokens.begin(), tokens.end());
    std::vector<int32_t> order(BT);
    sort_rows_by_token(ids.data(), order.data(), BT, V);
    Dev in(t, DType::i32, tokens), rows(t, DType::i32, Doubles(order.begin(), order.end()));
    Dev wte(t, t.real, numbers(Vp * C, 2)), wpe(t, t.real, numbers(T * C, 3)), y(t, t.real, poison(BT * C));
    Dev dwte(t, t.stat(), numbers(Vp * C, 4)), dwpe(t, t.stat(), poison(T * C));
    t.k->embedding_forward({.y = y, .tokens = in, .wte = wte, .wpe = wpe, .B = B, .T = T, .C = C, .V = V}, nullptr);
    t.k->embedding_backward(
        {.dwte = dwte, .dwpe = dwpe, .dy = y, .tokens = in, .order = rows, .B = B, .T = T, .C = C, .V = V}, nullptr);
    return joined({&y, &dwte, &dwpe});
}

Doubles layernorm(const Target& t) {
    Dev x(t, t.real, numbers(BT * C, 1)), w(t, t.real, numbers(C, 2)), b(t, t.real, numbers(C, 3));
    Dev y(t, t.real, poison(BT * C)), mean(t, t.stat(), poison(BT)), rstd(t, t.stat(), poison(BT));
    Dev dx(t, t.real, numbers(BT * C, 4)), dw(t, t.stat(), poison(C)), db(t, t.stat(), poison(C));
    t.k->layernorm_forward({.y = y, .mean = mean, .rstd = rstd, .x = x, .w = w, .b = b, .BT = BT, .C = C}, nullptr);
    t.k->layernorm_backward(
        {.dx = dx, .dw = dw, .db = db, .dy = y, .x = x, .w = w, .mean = mean, .rstd = rstd, .BT = BT, .C = C}, nullptr);
    return joined({&y, &mean, &rstd, &dx, &dw, &db});
}

Doubles linear(const Target& t) {
    Dev x(t, t.real, numbers(BT * C, 1)), w(t, t.real, numbers(C * OC, 2)), b(t, t.real, numbers(OC, 3));
    Dev y(t, t.real, poison(BT * OC)), pre(t, t.real, poison(BT * OC)), dx(t, t.real, poison(BT * C));
    Dev dw(t, t.stat(), poison(C * OC)), db(t, t.stat(), poison(OC));
    t.k->linear_forward({.y = y, .pre_gelu = pre, .x = x, .w = w, .b = b, .BT = BT, .C = C, .OC = OC}, nullptr);
    t.k->linear_backward(
        {.dx = dx, .dw = dw, .db = db, .dy = y, .x = x, .w = w, .pre_gelu = x, .BT = BT, .C = C, .OC = OC}, nullptr);
    return joined({&y, &pre, &dx, &dw, &db});
}

Doubles attention(const Target& t) {
    Dev qkv(t, t.real, numbers(BT * 3 * C, 1)), where(t, DType::u32, {3, 4}), y(t, t.real, poison(BT * C));
    Dev lse(t, t.stat(), poison(BT * NH)), dy(t, t.real, numbers(BT * C, 2)), dqkv(t, t.real, poison(BT * 3 * C));
    Dev scratch(t, t.stat(), poison(BT * NH));
    const DropoutMask mask{.where = where, .seed = 9, .site = 5, .p = 0.2f};
    t.k->attention_forward({.y = y, .lse = lse, .qkv = qkv, .dropout = mask, .B = B, .T = T, .NH = NH, .HS = HS},
                           nullptr);
    t.k->attention_backward({.dqkv = dqkv,
                             .dy = dy,
                             .qkv = qkv,
                             .y = y,
                             .lse = lse,
                             .scratch = scratch,
                             .dropout = mask,
                             .B = B,
                             .T = T,
                             .NH = NH,
                             .HS = HS},
                            nullptr);
    return joined({&y, &lse, &dqkv});
}

Doubles elementwise(const Target& t) {
    const size_t n = BT * C;
    Dev x(t, t.real, numbers(n, 1)), y(t, t.real, poison(n)), dx(t, t.real, poison(n)), z(t, t.real, poison(n));
    Dev where(t, DType::u32, {3, 4}), sum(t, DType::f32, numbers(n, 2)), more(t, DType::f32, numbers(n, 3));
    Dev parts(t, DType::f32, numbers(4 * n, 4)), tree(t, DType::f32, poison(n)), rounded(t, DType::bf16, poison(n));
    Dev rows(t, DType::f32, poison(BT)), hash(t, DType::u32, {0, 0});
    t.k->gelu_forward({.y = y, .x = x}, nullptr);
    t.k->gelu_backward({.dx = dx, .dy = y, .x = x}, nullptr);
    t.k->dropout({.y = z,
                  .x = x,
                  .residual = y,
                  .mask = {.where = where, .seed = 9, .site = 5, .p = 0.2f},
                  .B = B,
                  .T = T,
                  .C = C},
                 nullptr);
    t.k->add({.y = sum, .x = more}, nullptr);
    t.k->tree_sum({.y = tree, .x = parts, .parts = 4}, nullptr);
    t.k->cast({.y = rounded, .x = sum}, nullptr);
    t.k->row_sum({.y = rows, .x = sum, .B = BT, .T = C}, nullptr);
    t.k->hash({.y = hash, .x = sum}, nullptr);
    return joined({&y, &dx, &z, &sum, &tree, &rounded, &rows, &hash});
}

Doubles cross_entropy(const Target& t) {
    Dev logits(t, t.real, numbers(BT * Vp, 1)), targets(t, DType::i32, integers(BT, 2, V));
    Dev loss(t, t.stat(), poison(BT)), correct(t, DType::i32, Doubles(BT));
    t.k->cross_entropy({.loss = loss,
                        .correct = correct,
                        .logits = logits,
                        .targets = targets,
                        .BT = BT,
                        .V = V,
                        .Vp = Vp,
                        .grad_scale = 0.1f},
                       nullptr);
    return joined({&loss, &correct, &logits});
}

Doubles optimizer(const Target& t) {
    const size_t n = 3000;
    Dev p(t, DType::f32, numbers(n, 1)), m(t, DType::f32, numbers(n, 2)), v(t, DType::f32, Doubles(n, 0.1));
    Dev grad(t, DType::f32, numbers(n, 3)), decay(t, DType::u8, Doubles((n + 63) / 64, 1)),
        copy(t, DType::bf16, poison(n));
    Dev rate(t, DType::f32, {1e-2, 0.1, 0.05}), norm(t, DType::f32, {0}), clip(t, DType::f32, {0});
    Dev scratch(t, DType::f32, poison(grad_norm_scratch(n)));
    t.k->grad_norm({.norm = norm, .clip = clip, .grad = grad, .scratch = scratch, .max_norm = 1}, nullptr);
    t.k->optimizer_update({.param = p,
                           .copy = copy,
                           .m = m,
                           .v = v,
                           .grad = grad,
                           .decay = decay,
                           .rate = rate,
                           .clip = clip,
                           .weight_decay = 0.1f},
                          nullptr);
    return joined({&p, &copy, &m, &v, &norm, &clip});
}

const OpCase kOps[] = {{"embedding", embedding}, {"layernorm", layernorm},     {"linear", linear},
                       {"attention", attention}, {"elementwise", elementwise}, {"cross_entropy", cross_entropy},
                       {"optimizer", optimizer}};
}  // namespace

TEST_CASE("ops: the same bits under 20 random schedules") {
    for (const Target& t : targets()) {
        if (t.k != &cuda_backend()) continue;
        for (const OpCase& op : kOps) {
            CAPTURE(t.name);
            CAPTURE(op.name);
            const Doubles first = op.run(t);
            for (const double x : first) REQUIRE(!std::isnan(x));
            for (uint64_t seed = 1; seed <= 20; seed++) {
                CAPTURE(seed);
                const Schedule schedule(seed);
                CHECK(op.run(t) == first);
            }
        }
    }
}
