// Broken on purpose, seen to fail: bias correction of v left out; the last, partly filled block of 64 skipped; the
// norm without its last chunk; Lion's moment kept by beta1, no decay, the sign of 0 as 1; on CUDA the flags of
// decay shifted by one block, every second load of a chunk added twice, the copy written before the update, the last
// partly filled vector skipped.
#include "test/slice.h"

namespace {
const std::vector<OptimizerKind> kKinds = values_of<OptimizerKind>();
constexpr float kBeta1 = 0.9f, kBeta2 = 0.95f, kEps = 1e-8f, kDecay = 0.1f, kMomentum = 0.9f;

struct State {
    Doubles p, m, v, copy;
};
struct Input {
    State s;
    Doubles grad, decay, rate, clip;
    Input(size_t n, DType t)
        : s{rounded(normal(n, 1), t), rounded(normal(n, 2, 0.1), t), rounded(normal(n, 3, 0.1), t), {}},
          grad(rounded(normal(n, 4), t)),
          decay((n + 63) / 64),
          rate(rounded(Doubles{0.01, 1 - std::pow(0.9, 3), 1 - std::pow(0.95, 3)}, t)),
          clip(rounded(Doubles{0.7}, t)) {
        for (double& v : s.v) v = std::abs(v);
        for (size_t i = 0; i < decay.size(); i++) decay[i] = i % 3 != 1;
    }
};
State update(const Target& t, const Input& in, OptimizerKind kind, size_t offset = 0) {
    Slice p(t, t.stat(), in.s.p, offset), m(t, t.stat(), in.s.m, offset), v(t, t.stat(), in.s.v, offset);
    Slice grad(t, t.stat(), in.grad, offset), copy(t, DType::bf16, poison(in.grad.size()), offset);
    Dev decay(t, DType::u8, in.decay), rate(t, t.stat(), in.rate), clip(t, t.stat(), in.clip);
    t.k->optimizer_update({.param = p,
                           .copy = t.real == DType::bf16 ? Buf(copy) : Buf(),
                           .m = m,
                           .v = n_moments(kind) > 1 ? Buf(v) : Buf(),
                           .grad = grad,
                           .decay = decay,
                           .rate = rate,
                           .clip = clip,
                           .kind = kind,
                           .beta1 = kBeta1,
                           .beta2 = kBeta2,
                           .eps = kEps,
                           .weight_decay = kDecay,
                           .momentum = kMomentum},
                          nullptr);
    return {p.host(), m.host(), v.host(), copy.host()};
}
// The formulas of ops.h for one element.
void scalar(OptimizerKind kind, const Input& in, size_t i, double& p, double& m, double& v) {
    const double lr = in.rate[0], decay = in.decay[i / 64] != 0 ? double(kDecay) : 0;
    double g = in.grad[i] * in.clip[0];
    if (kind == OptimizerKind::adamw || kind == OptimizerKind::lion)
        p -= lr * decay * p;
    else
        g += decay * p;
    if (kind == OptimizerKind::sgd) {
        m = kMomentum * m + g;
        p -= lr * m;
        return;
    }
    if (kind == OptimizerKind::lion) {
        const double c = kBeta1 * m + (1 - double(kBeta1)) * g;
        p -= c > 0 ? lr : c < 0 ? -lr : 0;
        m = kBeta2 * m + (1 - double(kBeta2)) * g;
        return;
    }
    m = kBeta1 * m + (1 - double(kBeta1)) * g;
    v = kBeta2 * v + (1 - double(kBeta2)) * g * g;
    p -= lr * (m / in.rate[1]) / (std::sqrt(v / in.rate[2]) + kEps);
}
// Lion's step is the sign of a sum that is zero but for its roundings.
bool sign_is_open(const Input& in, size_t i, double roundings) {
    return std::abs(kBeta1 * in.s.m[i] + (1 - double(kBeta1)) * in.grad[i] * in.clip[0]) <= roundings;
}
}  // namespace

TEST_CASE("optimizer: every rule against its formula, element by element") {
    std::vector<Target> all = targets();
    all.push_back(reference());
    for (const Target& t : all)
        for (OptimizerKind kind : kKinds)
            for (size_t n : {1, 64, 127, 1000, 70016}) {
                CAPTURE(t.name);
                CAPTURE(word_of(kind));
                CAPTURE(n);
                const Input in(n, t.stat());
                const State got = update(t, in, kind);
                State want = in.s, tolerance{Doubles(n), Doubles(n), Doubles(n), {}};
                const double unit = t.real == DType::f64 ? 1e-6 * kUnit : kUnit;
                for (size_t i = 0; i < n; i++) {
                    scalar(kind, in, i, want.p[i], want.m[i], want.v[i]);
                    const double g = std::abs(in.grad[i]) + std::abs(in.s.p[i]), before = std::abs(in.s.m[i]);
                    // m and v: a product and two sums, 5 roundings of the terms.  p: its step goes through m, v,
                    // a square root and a quotient, 16 roundings of (|m| + |g|) / sqrt(v), and two sums of p itself
                    tolerance.m[i] = 5 * unit * (before + g);
                    tolerance.v[i] = 5 * unit * (in.s.v[i] + g * g);
                    // (sgd: |m| + |g|; lion: 1, and twice that where rounding decides the sign)
                    double step = before + g;
                    if (n_moments(kind) > 1) step *= 10 / std::sqrt(want.v[i] + 1e-30);
                    if (kind == OptimizerKind::lion) step = 1;
                    tolerance.p[i] = unit * (4 * std::abs(in.s.p[i]) + 16 * in.rate[0] * step);
                    if (kind == OptimizerKind::lion && sign_is_open(in, i, 5 * unit * (before + g)))
                        tolerance.p[i] += 2 * in.rate[0];
                }
                CHECK(worst_each(got.m, want.m, tolerance.m) <= 1);
                CHECK(worst_each(got.v, want.v, tolerance.v) <= 1);
                CHECK(worst_each(got.p, want.p, tolerance.p) <= 1);
            }
}

TEST_CASE("optimizer: a parameter that is zero and gets nothing stays exactly zero") {
    for (const Target& t : targets())
        for (OptimizerKind kind : kKinds) {  // rows V..Vp of wte
            CAPTURE(t.name);
            Input in(128, t.stat());
            in.s = {Doubles(128), Doubles(128), Doubles(128), {}};
            in.grad = Doubles(128);
            CHECK(same_bits(update(t, in, kind).p, Doubles(128)));
        }
}

TEST_CASE("optimizer: the copy is the new parameter rounded") {
    for (Target t : targets())
        for (OptimizerKind kind : kKinds)
            for (size_t n : {1, 130, 4099})
                for (size_t offset : {0, 1, 4}) {
                    CAPTURE(t.name);
                    CAPTURE(word_of(kind));
                    CAPTURE(n);
                    CAPTURE(offset);
                    const Input in(n, t.stat());
                    const State without = update({t.k, DType::f32, t.name}, in, kind);
                    const State with = update({t.k, DType::bf16, t.name}, in, kind, offset);
                    CHECK(same_bits(with.copy, rounded(with.p, DType::bf16)));
                    CHECK_FALSE(same_bits(with.p, in.s.p));
                    // the copy changes nothing else, nor does where the tensors start
                    CHECK(same_bits(with.p, without.p));
                    CHECK(same_bits(with.m, without.m));
                    CHECK(same_bits(with.v, without.v));
                }
}

TEST_CASE("optimizer: a clip factor that is not finite updates nothing") {
    for (const Target& t : targets())
        for (OptimizerKind kind : kKinds)
            for (double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
                CAPTURE(t.name);
                CAPTURE(bad);
                Input in(100, t.stat());
                in.clip = {bad};
                const State got = update(t, in, kind);
                CHECK(same_bits(got.p, in.s.p));
                CHECK(same_bits(got.m, in.s.m));
                CHECK(same_bits(got.v, in.s.v));
                for (double c : got.copy) CHECK(std::isnan(c));  // as it was
            }
}

TEST_CASE("optimizer and grad_norm: the same bits on 1 to 4 threads") {
    const Target t = targets()[0];
    const size_t n = 3 * kGradNormChunk + 321;
    const Input in(n, t.stat());
    for (OptimizerKind kind : kKinds)
        check_thread_counts([&] {
            const State s = update(t, in, kind);
            Dev norm(t, t.stat(), poison(1)), clip(t, t.stat(), poison(1)), grad(t, t.real, in.grad);
            Dev scratch(t, t.stat(), poison(grad_norm_scratch(n)));
            t.k->grad_norm({.norm = norm, .clip = clip, .grad = grad, .scratch = scratch, .max_norm = 1}, nullptr);
            return join({s.p, s.m, s.v, norm.host(), clip.host(), scratch.host()});
        });
}

TEST_CASE("grad_norm: the norm, and the factor that clips it") {
    std::vector<Target> all = targets();
    all.push_back(reference());
    for (const Target& t : all)
        for (size_t n : {size_t(1), size_t(7), size_t(1009), kGradNormChunk, 2 * kGradNormChunk + 77})
            for (double relative_limit : {0.0, 0.5, 2.0}) {
                CAPTURE(t.name);
                CAPTURE(n);
                CAPTURE(relative_limit);
                const Doubles g = rounded(normal(n, 1), t.stat());
                const double want = std::sqrt(dot(g, g));
                const float limit = float(relative_limit * want);
                Dev norm(t, t.stat(), poison(1)), clip(t, t.stat(), poison(1)), grad(t, t.stat(), g);
                Dev scratch(t, t.stat(), poison(grad_norm_scratch(n)));
                t.k->grad_norm({.norm = norm, .clip = clip, .grad = grad, .scratch = scratch, .max_norm = limit},
                               nullptr);
                // rounded: the chunk's sum (halved by the root), the root, and for the factor the quotient; CUDA
                // takes four squares and two sums of them in float: 3 roundings, halved by the root
                const double units = t.k == &cpu_backend() ? 2 : 3;
                CHECK(worst(norm.host(), {want}, 0, units * kUnit) <= 1);
                CHECK(worst(clip.host(), {relative_limit == 0.5 ? limit / want : 1}, 0, (units + 1) * kUnit) <= 1);
            }
}

TEST_CASE("grad_norm: a slice off the vectors' boundary gives the same bits") {
    for (const Target& t : targets())
        for (size_t n : {size_t(3), 2 * kGradNormChunk + 1001}) {
            CAPTURE(t.name);
            CAPTURE(n);
            const auto norm_at = [&](size_t offset) {
                Dev norm(t, t.stat(), poison(1)), clip(t, t.stat(), poison(1));
                Slice grad(t, t.stat(), normal(n, 1), offset);
                Dev scratch(t, t.stat(), poison(grad_norm_scratch(n)));
                t.k->grad_norm({.norm = norm, .clip = clip, .grad = grad, .scratch = scratch, .max_norm = 1}, nullptr);
                return join({norm.host(), clip.host(), scratch.host()});
            };
            CHECK(same_bits(norm_at(1), norm_at(0)));
        }
}

// Seen to fail with: the last part's sums at the place of the first; the final sum without the last chunk.
TEST_CASE("grad_norm: in parts the bits of the whole") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        const size_t n = 3 * kGradNormChunk + 1001, chunks = grad_norm_scratch(n), first = 2 * kGradNormChunk;
        Dev norm(t, t.stat(), poison(1)), clip(t, t.stat(), poison(1)), grad(t, t.stat(), normal(n, 1));
        Dev scratch(t, t.stat(), poison(chunks)), norm2(t, t.stat(), poison(1)), clip2(t, t.stat(), poison(1));
        Dev scratch2(t, t.stat(), poison(chunks));
        t.k->grad_norm({.norm = norm, .clip = clip, .grad = grad, .scratch = scratch, .max_norm = 1}, nullptr);
        for (const auto& [begin, end] : {std::pair(first, n), std::pair(size_t(0), first)})
            t.k->grad_norm({.grad = Buf(grad).slice(begin, end - begin),
                            .scratch = Buf(scratch2).slice(begin / kGradNormChunk, grad_norm_scratch(end - begin))},
                           nullptr);
        CHECK(std::isnan(norm2.host()[0]));  // not written yet
        t.k->grad_norm({.norm = norm2, .clip = clip2, .scratch = scratch2, .max_norm = 1}, nullptr);
        CHECK(same_bits(norm2.host(), norm.host()));
        CHECK(same_bits(clip2.host(), clip.host()));
        CHECK(same_bits(scratch2.host(), scratch.host()));
    }
}

TEST_CASE("grad_norm: what is not finite shows, and stops the update") {
    for (const Target& t : targets())
        for (double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL, 1e30 /* its square is beyond float */})
            for (float max_norm : {0.0f, 1.0f})
                for (size_t n : {size_t(3), kGradNormChunk + 5}) {
                    CAPTURE(t.name);
                    CAPTURE(bad);
                    CAPTURE(max_norm);
                    Doubles g(n, 1);
                    g[n - 1] = bad;
                    Dev norm(t, t.stat(), {0}), clip(t, t.stat(), {0}), grad(t, t.stat(), g);
                    Dev scratch(t, t.stat(), poison(grad_norm_scratch(n)));
                    t.k->grad_norm({.norm = norm, .clip = clip, .grad = grad, .scratch = scratch, .max_norm = max_norm},
                                   nullptr);
                    CHECK_FALSE(std::isfinite(norm.host()[0]));
                    CHECK(std::isnan(clip.host()[0]));
                }
}

TEST_CASE("optimizer and grad_norm reject a short buffer") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        Dev p(t, t.stat(), Doubles(100)), one(t, t.stat(), Doubles(1)), three(t, t.stat(), Doubles(3));
        Dev flags(t, DType::u8, Doubles(2)), few(t, DType::u8, Doubles(1)), little(t, t.stat(), Doubles(99));
        Dev m(t, t.stat(), Doubles(100)), v(t, t.stat(), Doubles(100)), grad(t, t.stat(), Doubles(100));
        Dev short_copy(t, DType::bf16, Doubles(99)), wide_copy(t, DType::f32, Doubles(100));
        const auto call = [&](const Buf& second, const Buf& decay, OptimizerKind kind, const Buf& copy = {}) {
            t.k->optimizer_update({.param = p,
                                   .copy = copy,
                                   .m = m,
                                   .v = second,
                                   .grad = grad,
                                   .decay = decay,
                                   .rate = three,
                                   .clip = one,
                                   .kind = kind},
                                  nullptr);
        };
        CHECK_THROWS_WITH_AS(call(little, flags, OptimizerKind::adamw),
                             doctest::Contains("optimizer.v holds 99 elements"), Error);
        CHECK_THROWS_WITH_AS(call({}, flags, OptimizerKind::adam), doctest::Contains("expected n = 100"), Error);
        CHECK_THROWS_WITH_AS(call(v, few, OptimizerKind::adamw), doctest::Contains("expected ceil(n/64) = 2"), Error);
        CHECK_THROWS_WITH_AS(call(v, flags, OptimizerKind::adamw, short_copy),
                             doctest::Contains("optimizer.copy holds 99 elements, expected n = 100"), Error);
        CHECK_THROWS_WITH_AS(call(v, flags, OptimizerKind::adamw, wide_copy), doctest::Contains("buffer holds f32"),
                             Error);
        CHECK_NOTHROW(call({}, flags, OptimizerKind::sgd));
        CHECK_THROWS_WITH_AS(t.k->grad_norm({.norm = one, .clip = one, .grad = p, .scratch = three}, nullptr),
                             doctest::Contains("grad_norm.scratch holds 3 elements, expected"), Error);
    }
}
