// Broken on purpose and seen to fail: padded columns in the sum; the columns after the last whole piece skipped.
#include "test/cpu_check.h"

namespace {
struct Case {
    int BT, V, Vp;
    double scale;  // of the logits
};
const Case cases[] = {{1, 1, 128, 1},   {5, 7, 128, 1},      {3, 127, 128, 10},   {4, 128, 128, 1},
                      {7, 257, 384, 3}, {2, 1031, 1152, 30}, {3, 50257, 50304, 2}};

struct Output {
    Doubles loss, correct, logits;
};
Output run(const Target& t, const Case& c, const Doubles& logits, const Doubles& targets, float grad_scale) {
    Dev loss(t, t.stat(), poison(targets.size())), correct(t, DType::i32, Doubles(targets.size(), -7));
    Dev x(t, t.real, logits), at(t, DType::i32, targets);
    t.k->cross_entropy({.loss = loss,
                        .correct = correct,
                        .logits = x,
                        .targets = at,
                        .BT = c.BT,
                        .V = c.V,
                        .Vp = c.Vp,
                        .grad_scale = grad_scale},
                       nullptr);
    return {loss.host(), correct.host(), x.host()};
}
// Padded columns hold large numbers: they must not matter.
Doubles make_logits(const Case& c, DType t, unsigned seed = 1) {
    Doubles x = normal(size_t(c.BT) * c.Vp, seed, c.scale);
    for (size_t i = 0; i < x.size(); i++)
        if (int(i % size_t(c.Vp)) >= c.V) x[i] = 1e4;
    return rounded(x, t);
}
// The formula, plainly.
Output naive(const Case& c, const Doubles& logits, const Doubles& targets, double grad_scale) {
    Output o{Doubles(targets.size()), Doubles(targets.size()), logits};
    for (int i = 0; i < c.BT; i++) {
        const double* x = &logits[size_t(i) * c.Vp];
        const int target = int(targets[i]);
        int best = 0;
        for (int v = 0; v < c.V; v++) best = x[v] > x[best] ? v : best;
        double sum = 0;
        for (int v = 0; v < c.V; v++) sum += std::exp(x[v] - x[best]);
        o.loss[i] = std::log(sum) + x[best] - x[target];
        o.correct[i] = best == target;
        for (int v = 0; v < c.Vp && grad_scale != 0; v++)
            o.logits[size_t(i) * c.Vp + v] =
                v < c.V ? (std::exp(x[v] - x[best]) / sum - (v == target)) * grad_scale : 0;
    }
    return o;
}
}  // namespace

TEST_CASE("cross_entropy: loss, accuracy and gradient against the formula") {
    for (const Target& t : {targets()[0], reference()})
        for (const Case& c : cases)
            for (float grad_scale : {0.0f, 0.125f}) {
                CAPTURE(t.name);
                CAPTURE(c.BT);
                CAPTURE(c.V);
                CAPTURE(grad_scale);
                const Doubles x = make_logits(c, t.real), targets = integers(size_t(c.BT), 2, c.V);
                const Output got = run(t, c, x, targets, grad_scale), want = naive(c, x, targets, grad_scale);
                // a term exp(x - m) is off by the rounding of x - m (up to 12 scale) and 2 units; a piece adds 256 of
                // them to each of at least four lanes; the reference in double must be a million times better
                const double unit = t.real == DType::f64 ? 1e-6 * kUnit : kUnit;
                const double relative = unit * (12 * c.scale + 2 + std::min(c.V, 1024) / 4 + 4);
                CHECK(worst(got.loss, want.loss, relative, unit) <= 1);
                CHECK(same_bits(got.correct, want.correct));
                if (grad_scale == 0)
                    CHECK(same_bits(got.logits, x));  // evaluation leaves them alone
                else
                    CHECK(worst(got.logits, want.logits, unit * grad_scale * 2, relative) <= 1);
                for (size_t i = 0; i < x.size() && grad_scale != 0; i++)
                    if (int(i % size_t(c.Vp)) >= c.V && got.logits[i] != 0) FAIL("a padded column has a gradient");
            }
}

TEST_CASE("cross_entropy: the first of equal largest logits counts, the others do not") {
    const Case c = {3, 100, 128, 1};
    for (const Target& t : targets()) {
        Doubles x(3 * 128, 0.0);
        for (int i = 0; i < 3; i++) x[i * 128 + 40] = x[i * 128 + 77] = 2;
        CHECK(same_bits(run(t, c, x, {40, 77, 3}, 0).correct, {1, 0, 0}));
    }
}

TEST_CASE("cross_entropy: huge logits stay finite, a NaN shows in the loss") {
    const Case c = {2, 5, 128, 1};
    const Target t = targets()[0];
    Doubles x = make_logits(c, t.real);
    x[0] = 1e30, x[128 + 2] = std::nan("");
    const Output o = run(t, c, x, {0, 1}, 1);
    CHECK(o.loss[0] == 0);
    CHECK(std::isfinite(biggest(Doubles(o.logits.begin(), o.logits.begin() + 128))));
    CHECK(std::isnan(o.loss[1]));
}

TEST_CASE("cross_entropy: directional finite difference in double") {
    const Target t = reference();
    const Case c = {7, 257, 384, 3};
    const Doubles x = make_logits(c, t.real), targets = integers(7, 2, c.V), u = normal(x.size(), 3);
    const auto J = [&](const Doubles& v) { return 0.25 * dot(run(t, c, v, targets, 0).loss, Doubles(7, 1.0)); };
    CHECK(dot(run(t, c, x, targets, 0.25f).logits, u) == doctest::Approx(directional(J, x, u)).epsilon(1e-6));
}

TEST_CASE("cross_entropy: the same bits on 1 to 4 threads") {
    const Target t = targets()[0];
    const Case c = {61, 1031, 1152, 5};
    const Doubles x = make_logits(c, t.real), targets = integers(61, 2, c.V);
    check_thread_counts([&] {
        const Output o = run(t, c, x, targets, 0.5f);
        return join({o.loss, o.correct, o.logits});
    });
}

TEST_CASE("cross_entropy rejects a short buffer and a target outside the vocabulary") {
    const Target t = targets()[0];
    Dev loss(t, t.stat(), Doubles(2)), x(t, t.real, Doubles(256)), little(t, t.real, Doubles(255));
    Dev at(t, DType::i32, {0, 9});
    const auto call = [&](const Buf& logits, int V) {
        t.k->cross_entropy({.loss = loss, .correct = {}, .logits = logits, .targets = at, .BT = 2, .V = V, .Vp = 128},
                           nullptr);
    };
    CHECK_THROWS_WITH_AS(call(little, 10), doctest::Contains("holds 255 elements, expected BT*Vp = 256"), Error);
    CHECK_THROWS_WITH_AS(call(x, 9), doctest::Contains("targets[1] is 9, expected 0 <= target < V = 9"), Error);
    CHECK_THROWS_WITH_AS(call(x, 129), doctest::Contains("expected 1 <= V <= Vp = 128"), Error);
}
