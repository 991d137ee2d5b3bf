// Broken on purpose and seen to fail: padded columns in the sum; the columns after the last whole piece skipped.
// On CUDA: a column past V taken as 0; the vector that holds the target left out of the search for an earlier maximum;
// sums not rescaled to the block's maximum; the barrier of the maximum, and the wait for the row, left out.
#include "test/slice.h"

namespace {
struct Case {
    int BT, V, Vp;
    double scale;  // of the logits
};
// The last row does not fit in a block's shared memory in any dtype; rows of 7 and 130 allow no 16-byte accesses.
const Case cases[] = {{1, 1, 128, 1},   {5, 7, 128, 1},      {3, 127, 128, 10},    {4, 128, 128, 1},
                      {5, 5, 7, 1},     {3, 130, 130, 2},    {3, 1000, 1000, 4},   {1, 1, 1, 1},
                      {7, 257, 384, 3}, {2, 1031, 1152, 30}, {3, 50257, 50304, 2}, {1, 120001, 120064, 3}};

struct Output {
    Doubles loss, correct, logits;
};
// The logits start `offset` elements into their allocation.
Output run(const Target& t, const Case& c, const Doubles& logits, const Doubles& targets, float grad_scale,
           size_t offset = 0) {
    Dev loss(t, t.stat(), poison(targets.size())), correct(t, DType::i32, Doubles(targets.size(), -7));
    Slice x(t, t.real, logits, offset);
    Dev at(t, DType::i32, targets);
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
// Relative error of a probability: a term exp(x - m) is off by the rounding of x - m (up to 12 scale) and 2 units; a
// piece adds 256 of them to each of at least four lanes.  On CUDA the argument is rounded three times, log2(e)
// included, and ex2.approx is off by 4 units; sums brought to a larger maximum (here up to 8 times) are off by as much
// again, their gaps add up to 12 scale; a thread adds a 512th of the row, at least a vector, and two trees of five
// follow.  The reference in double must be a million times better.
double relative_error(const Target& t, const Case& c) {
    if (t.real == DType::f64) return 1e-6 * kUnit * (12 * c.scale + 2 + std::min(c.V, 1024) / 4 + 4);
    if (t.k == &cpu_backend()) return kUnit * (12 * c.scale + 2 + std::min(c.V, 1024) / 4 + 4);
    return kUnit * (2 * 3 * 12 * c.scale + (1 + 8) * 4 + c.V / 512 + 8 + 10);
}
std::vector<Target> targets_and_reference() {
    std::vector<Target> all = targets();
    all.push_back(reference());
    return all;
}
}  // namespace

TEST_CASE("cross_entropy: loss, accuracy and gradient against the formula") {
    for (const Target& t : targets_and_reference())
        for (const Case& c : cases)
            for (float grad_scale : {0.0f, 0.125f}) {
                CAPTURE(t.name);
                CAPTURE(c.BT);
                CAPTURE(c.V);
                CAPTURE(grad_scale);
                const Doubles x = make_logits(c, t.real), targets = integers(size_t(c.BT), 2, c.V);
                const Output got = run(t, c, x, targets, grad_scale), want = naive(c, x, targets, grad_scale);
                const double unit = t.real == DType::f64 ? 1e-6 * kUnit : kUnit, relative = relative_error(t, c);
                // CUDA takes the loss in fp32: two sums, and a logarithm of 1 unit in the last place
                CHECK(worst(got.loss, want.loss, relative, t.k == &cpu_backend() ? unit : 4 * unit) <= 1);
                CHECK(same_bits(got.correct, want.correct));
                if (grad_scale == 0)
                    CHECK(same_bits(got.logits, x));  // evaluation leaves them alone
                else
                    CHECK(worst(got.logits, want.logits, unit * grad_scale * 2, relative + store_error(t)) <= 1);
                for (size_t i = 0; i < x.size() && grad_scale != 0; i++)
                    if (int(i % size_t(c.Vp)) >= c.V && got.logits[i] != 0) FAIL("a padded column has a gradient");
            }
}

TEST_CASE("cross_entropy: a row that is read twice gives the same bits as one that stays in shared memory") {
    for (const Target& t : targets())
        // The last two fill, in fp32 and in bf16, what a block may have without asking for it, but for the static
        // arrays.
        for (const Case& c :
             {Case{3, 127, 128, 3}, Case{2, 2999, 3072, 5}, Case{1, 12280, 12288, 3}, Case{1, 24570, 24576, 3}}) {
            CAPTURE(t.name);
            CAPTURE(c.V);
            const Doubles x = make_logits(c, t.real), targets = integers(size_t(c.BT), 2, c.V);
            const Output kept = run(t, c, x, targets, 0.5f);
            if (t.k != &cpu_backend()) {  // off the boundary of 16 bytes nothing can be kept
                const Output again = run(t, c, x, targets, 0.5f, 1);
                CHECK(same_bits(again.loss, kept.loss));
                CHECK(same_bits(again.correct, kept.correct));
                CHECK(same_bits(again.logits, kept.logits));
            }
            CHECK(same_bits(run(t, c, x, targets, 0).loss, kept.loss));
        }
}

TEST_CASE("cross_entropy: the first of equal largest logits counts, the others do not") {
    const Case c = {6, 1100, 1152, 1};
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        Doubles x(6 * 1152, 0.0);
        for (int i = 0; i < 6; i++) x[i * 1152 + 40] = x[i * 1152 + 42] = x[i * 1152 + 1077] = 2;
        CHECK(same_bits(run(t, c, x, {40, 42, 1077, 3, 41, 1090}, 0).correct, {1, 0, 0, 0, 0, 0}));
        x = Doubles(6 * 1152, 0.0);
        CHECK(same_bits(run(t, c, x, {0, 1, 2, 7, 8, 1099}, 0).correct, {1, 0, 0, 0, 0, 0}));
    }
}

// An offset that all logits of a row share changes neither loss nor gradient.  What it does to the logits themselves is
// the only error that it may bring: they are rounded before.
TEST_CASE("cross_entropy: rows far from 0, up to and beyond the logits from which m is subtracted first") {
    const Case c = {9, 700, 768, 3};
    const double offsets[] = {5e3, -5e3, 5e5, -5e5, 0x1p20 - 8, 0x1p20 + 8, -0x1p20, 0x1p20, 3e6};
    for (const Target& t : targets_and_reference()) {
        if (t.real == DType::bf16) continue;  // holds no fraction of such numbers
        CAPTURE(t.name);
        Doubles x = make_logits(c, t.real), targets;
        for (int i = 0; i < c.BT; i++) {
            for (int v = 0; v < c.V; v++) x[size_t(i) * c.Vp + v] += offsets[i];
            targets.push_back(i * 50);
        }
        x = rounded(x, t.real);
        const Output got = run(t, c, x, targets, 0.5), want = naive(c, x, targets, 0.5);
        const double error = relative_error(t, c);
        for (int i = 0; i < c.BT; i++) {
            CAPTURE(offsets[i]);
            CHECK(std::abs(got.loss[i] - want.loss[i]) <= 2 * error + kUnit * std::abs(want.loss[i]));
            for (int v = 0; v < c.V; v++) {
                const size_t at = size_t(i) * c.Vp + v;
                const double bound = 2 * error * std::abs(want.logits[at] + 0.5 * (v == targets[i])) + kUnit;
                REQUIRE(std::abs(got.logits[at] - want.logits[at]) <= bound);
            }
        }
    }
}

TEST_CASE("cross_entropy: huge logits stay finite, -inf is probability 0, a NaN shows in the loss") {
    const Case c = {4, 5, 128, 1};
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        Doubles x = make_logits(c, t.real);
        x[0] = rounded(1e30, t.real), x[128 + 2] = std::nan("");
        x[2 * 128] = x[2 * 128 + 1] = -HUGE_VAL;
        for (int v = 0; v < 5; v++) x[3 * 128 + v] = rounded(-1e30, t.real);
        const Output o = run(t, c, x, {0, 1, 2, 3}, 1);
        CHECK(o.loss[0] == 0);
        CHECK(std::isfinite(biggest(Doubles(o.logits.begin(), o.logits.begin() + 128))));
        CHECK(std::isnan(o.loss[1]));
        CHECK(std::isfinite(o.loss[2]));
        CHECK(o.logits[2 * 128] == 0);
        CHECK(o.loss[3] == doctest::Approx(std::log(5.0)));
    }
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
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        Dev loss(t, t.stat(), Doubles(2)), x(t, t.real, Doubles(256)), little(t, t.real, Doubles(255));
        Dev at(t, DType::i32, {0, 9});
        const auto call = [&](const Buf& logits, int V) {
            t.k->cross_entropy(
                {.loss = loss, .correct = {}, .logits = logits, .targets = at, .BT = 2, .V = V, .Vp = 128}, nullptr);
        };
        CHECK_THROWS_WITH_AS(call(little, 10), doctest::Contains("holds 255 elements, expected BT*Vp = 256"), Error);
        CHECK_THROWS_WITH_AS(call(x, 129), doctest::Contains("expected 1 <= V <= Vp = 128"), Error);
        if (t.k == &cpu_backend())
            CHECK_THROWS_WITH_AS(call(x, 9), doctest::Contains("targets[1] is 9, expected 0 <= target < V = 9"), Error);
    }
}

TEST_CASE("cross_entropy: a device makes NaN of a row whose target is outside the vocabulary, and of no other") {
    const Case c = {4, 100, 128, 1};
    for (const Target& t : targets()) {
        if (t.k == &cpu_backend()) continue;  // refuses it
        CAPTURE(t.name);
        const Doubles x = make_logits(c, t.real);
        const Output o = run(t, c, x, {100, 7, -1, 2147483647}, 1), good = run(t, c, x, {0, 7, 0, 0}, 1);
        for (size_t i = 0; i < 4; i++) {
            CHECK(std::isnan(o.loss[i]) == (i != 1));
            if (i != 1) CHECK(o.correct[i] == 0);
            for (size_t v = 0; v < 128; v++) {
                const double g = o.logits[i * 128 + v], want = good.logits[i * 128 + v];
                if (i == 1 || v >= 100 ? g != want : !std::isnan(g)) FAIL("row ", i, " column ", v);
            }
        }
    }
}
