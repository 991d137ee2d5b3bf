// Linear.  Broken on purpose once, each seen to fail here: bias left out (with GELU and without), a tile's row or
// column offset one too small, a tile one row short, the last k skipped, accumulate ignored (dw, db), residual added
// twice when it is y, gelu' left out of dx, the last row left out of db, w not transposed for dx, operands of dw
// mixed up, OneThread removed.
#include <omp.h>

#include <cstring>

#include "test/op_test.h"

namespace {
struct Shape {
    int BT, C, OC;
    size_t in() const { return size_t(BT) * C; }
    size_t out() const { return size_t(BT) * OC; }
    size_t weights() const { return size_t(C) * OC; }
};
const Shape small[] = {{1, 1, 1}, {1, 7, 1}, {5, 1, 3}, {13, 29, 31}, {33, 40, 100}, {300, 17, 500}, {600, 70, 500}};
const Shape real = {64, 768, 2304};

enum class Residual { none, apart, in_place };
struct Flags {
    bool bias, gelu;
    Residual residual;
    bool w_transposed;
};
std::vector<Flags> all_flags() {
    std::vector<Flags> all;
    for (bool transposed : {false, true})
        for (bool bias : {false, true}) {
            all.push_back({bias, true, Residual::none, transposed});
            for (Residual r : {Residual::none, Residual::apart, Residual::in_place})
                all.push_back({bias, false, r, transposed});
        }
    return all;
}

// A float sum of n products differs from the exact one by at most n 2^-24 sum |a_i b_i|; no factor on top of that.
constexpr double kUnit = 0x1p-24;
// gelu and gelu' themselves: see test_gelu.cpp.
constexpr double kGelu = 2.5e-6, kGeluGrad = 1e-5, kMaxSlope = 1.13;

// max |got - want| / bound, element by element; NaN counts as infinity.
double worst_bound(const Doubles& got, const Doubles& want, const Doubles& bound) {
    double w = got.size() == want.size() && got.size() == bound.size() ? 0 : INFINITY;
    for (size_t i = 0; i < got.size() && w < INFINITY; i++) {
        const double e = std::abs(got[i] - want[i]);
        if (!(e <= w * bound[i])) w = std::isnan(e) ? INFINITY : e / bound[i];
    }
    return w;
}
Doubles abs(Doubles v) {
    for (double& x : v) x = std::abs(x);
    return v;
}

double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
// Where w holds the weight from input k to output j.
size_t weight(const Shape& s, int k, int j, bool transposed) { return transposed ? j * s.C + k : k * s.OC + j; }

struct Inputs {
    Doubles x, w, b, residual;  // (BT, C), (C, OC) or (OC, C), (OC), (BT, OC)
};
Inputs inputs(const Shape& s, DType t) {
    return {rounded(normal(s.in(), 1), t), rounded(normal(s.weights(), 2), t), rounded(normal(s.OC, 3), t),
            rounded(normal(s.out(), 4), t)};
}
Inputs abs(const Inputs& i) { return {abs(i.x), abs(i.w), abs(i.b), abs(i.residual)}; }

struct Outputs {
    Doubles y, pre_gelu;  // (BT, OC)
};
Outputs forward(const Target& t, const Shape& s, const Flags& f, const Inputs& i) {
    Dev y(t, t.real, f.residual == Residual::in_place ? i.residual : poison(s.out()));
    Dev pre(t, t.real, poison(s.out())), x(t, t.real, i.x), w(t, t.real, i.w), b(t, t.real, i.b);
    Dev residual(t, t.real, i.residual);
    t.k->linear_forward(
        {.y = y,
         .pre_gelu = f.gelu ? Buf(pre) : Buf(),
         .x = x,
         .w = w,
         .b = f.bias ? Buf(b) : Buf(),
         .residual = f.residual == Residual::none ? Buf() : Buf(f.residual == Residual::apart ? residual : y),
         .BT = s.BT,
         .C = s.C,
         .OC = s.OC,
         .w_transposed = f.w_transposed},
        nullptr);
    return {y.host(), f.gelu ? pre.host() : Doubles()};
}

struct GradFlags {
    bool dx, db, gelu, w_transposed, accumulate;
};
struct GradInputs {
    Doubles dy, x, w, pre, dw, db;  // dw and db: what is there before
};
GradInputs grad_inputs(const Shape& s, DType t) {
    return {rounded(normal(s.out(), 5), t), rounded(normal(s.in(), 6), t),      rounded(normal(s.weights(), 7), t),
            rounded(normal(s.in(), 8), t),  rounded(normal(s.weights(), 9), t), rounded(normal(s.OC, 10), t)};
}
struct Grads {
    Doubles dx, dw, db;  // (BT, C), as w, (OC)
};
Grads backward(const Target& t, const Shape& s, const GradFlags& f, const GradInputs& i) {
    Dev dx(t, t.real, poison(s.in())), dw(t, t.real, f.accumulate ? i.dw : poison(s.weights()));
    Dev db(t, t.real, f.accumulate ? i.db : poison(s.OC)), dy(t, t.real, i.dy), x(t, t.real, i.x), w(t, t.real, i.w);
    Dev pre(t, t.real, i.pre);
    t.k->linear_backward({.dx = f.dx ? Buf(dx) : Buf(),
                          .dw = dw,
                          .db = f.db ? Buf(db) : Buf(),
                          .dy = dy,
                          .x = x,
                          .w = w,
                          .pre_gelu = f.gelu ? Buf(pre) : Buf(),
                          .BT = s.BT,
                          .C = s.C,
                          .OC = s.OC,
                          .w_transposed = f.w_transposed,
                          .accumulate = f.accumulate},
                         nullptr);
    return {f.dx ? dx.host() : Doubles(), dw.host(), f.db ? db.host() : Doubles()};
}

void check_forward(const Target& t, const Shape& s, const Flags& f) {
    INFO(std::string(t.name), " BT ", s.BT, " C ", s.C, " OC ", s.OC);
    INFO(" bias ", f.bias, " gelu ", f.gelu, " residual ", int(f.residual), " w_transposed ", f.w_transposed);
    const Inputs in = inputs(s, t.real);
    const Outputs got = forward(t, s, f, in), want = forward(reference(), s, f, in);
    Flags linear = f;
    linear.gelu = false;
    Doubles bound = forward(reference(), s, linear, abs(in)).y;
    for (double& b : bound) b *= (s.C + f.bias + (f.residual != Residual::none)) * kUnit;
    if (f.gelu) {
        CHECK(worst_bound(got.pre_gelu, want.pre_gelu, bound) <= 1);
        for (size_t i = 0; i < bound.size(); i++) bound[i] = kMaxSlope * bound[i] + kGelu * std::abs(want.y[i]) + 1e-7;
    }
    CHECK(worst_bound(got.y, want.y, bound) <= 1);
}

void check_backward(const Target& t, const Shape& s, const GradFlags& f) {
    INFO(std::string(t.name), " BT ", s.BT, " C ", s.C, " OC ", s.OC);
    INFO(" dx ", f.dx, " db ", f.db, " gelu ", f.gelu, " w_transposed ", f.w_transposed, " accumulate ", f.accumulate);
    const GradInputs in = grad_inputs(s, t.real);
    const Grads got = backward(t, s, f, in), want = backward(reference(), s, f, in);
    GradFlags linear = f;
    linear.gelu = false;
    Grads bound = backward(reference(), s, linear, {abs(in.dy), abs(in.x), abs(in.w), in.pre, abs(in.dw), abs(in.db)});
    for (double& b : bound.dx) b *= f.gelu ? kMaxSlope * (s.OC * kUnit + kGeluGrad) : s.OC * kUnit;
    for (double& b : bound.dw) b *= (s.BT + f.accumulate) * kUnit;
    for (double& b : bound.db) b *= (std::min(s.BT, 32) + (s.BT + 31) / 32 + f.accumulate) * kUnit;
    CHECK(worst_bound(got.dx, want.dx, bound.dx) <= 1);
    CHECK(worst_bound(got.dw, want.dw, bound.dw) <= 1);
    CHECK(worst_bound(got.db, want.db, bound.db) <= 1);
}
}  // namespace

// The fp64 instance shares its epilogues with the others, so it is itself compared with the plain loops of the
// definition.
TEST_CASE("linear forward: the fp64 instance is the definition") {
    for (const Shape& s : small)
        for (const Flags& f : all_flags()) {
            INFO("BT ", s.BT, " C ", s.C, " OC ", s.OC, " bias ", f.bias, " gelu ", f.gelu, " residual ",
                 int(f.residual), " w_transposed ", f.w_transposed);
            const Inputs in = inputs(s, DType::f64);
            Doubles y(s.out()), pre(f.gelu ? s.out() : 0);
            for (int i = 0; i < s.BT; i++)
                for (int j = 0; j < s.OC; j++) {
                    const size_t at = size_t(i) * s.OC + j;
                    double sum = f.bias ? in.b[j] : 0;
                    for (int k = 0; k < s.C; k++) sum += in.x[i * s.C + k] * in.w[weight(s, k, j, f.w_transposed)];
                    if (f.gelu) pre[at] = sum;
                    y[at] = f.gelu ? gelu(sum) : f.residual != Residual::none ? sum + in.residual[at] : sum;
                }
            const Outputs got = forward(reference(), s, f, in);
            CHECK(worst(got.y, y, 1e-12, 0) <= 1);
            CHECK(worst(got.pre_gelu, pre, 1e-12, 0) <= 1);
        }
}

TEST_CASE("linear backward: the fp64 instance is the definition") {
    for (const Shape& s : small)
        for (bool transposed : {false, true})
            for (bool accumulate : {false, true}) {
                INFO("BT ", s.BT, " C ", s.C, " OC ", s.OC, " transposed ", transposed, " accumulate ", accumulate);
                const GradInputs in = grad_inputs(s, DType::f64);
                Doubles dx(s.in()), dw = in.dw, db = in.db;
                if (!accumulate) dw.assign(dw.size(), 0), db.assign(db.size(), 0);
                for (int i = 0; i < s.BT; i++)
                    for (int j = 0; j < s.OC; j++) {
                        const double dy = in.dy[i * s.OC + j];
                        db[j] += dy;
                        for (int k = 0; k < s.C; k++) {
                            dw[weight(s, k, j, transposed)] += in.x[i * s.C + k] * dy;
                            dx[i * s.C + k] += in.w[weight(s, k, j, transposed)] * dy;
                        }
                    }
                const Grads got = backward(reference(), s, {true, true, false, transposed, accumulate}, in);
                CHECK(worst(got.dx, dx, 1e-12, 0) <= 1);
                CHECK(worst(got.dw, dw, 1e-12, 0) <= 1);
                CHECK(worst(got.db, db, 1e-12, 0) <= 1);
            }
}

TEST_CASE("linear forward: every backend agrees with the fp64 reference") {
    for (const Target& t : targets()) {
        for (const Shape& s : small)
            for (const Flags& f : all_flags()) check_forward(t, s, f);
        check_forward(t, real, {true, true, Residual::none, false});
        check_forward(t, real, {true, false, Residual::in_place, true});
    }
}

TEST_CASE("linear backward: every backend agrees with the fp64 reference") {
    for (const Target& t : targets()) {
        for (const Shape& s : small)
            for (unsigned bits = 0; bits < 32; bits++)
                check_backward(t, s, {!!(bits & 1), !!(bits & 2), !!(bits & 4), !!(bits & 8), !!(bits & 16)});
        check_backward(t, real, {true, true, true, false, false});
        check_backward(t, real, {true, true, false, true, true});
    }
}

TEST_CASE("linear backward: directional finite differences in fp64") {
    const Target t = reference();
    for (const Shape& s : {Shape{1, 1, 1}, Shape{5, 7, 3}, Shape{33, 29, 40}})
        for (bool transposed : {false, true})
            for (bool gelu : {false, true}) {
                INFO(" BT ", s.BT, " C ", s.C, " OC ", s.OC, " transposed ", transposed, " gelu ", gelu);
                const Inputs in = inputs(s, t.real);
                const Doubles r = normal(s.out(), 20);  // J = sum(y r), with x = gelu(in.x) where gelu is set
                const auto input = [&](const Doubles& x) {
                    Dev y(t, t.real, x), at(t, t.real, x);
                    if (gelu) t.k->gelu_forward({.y = y, .x = at}, nullptr);
                    return y.host();
                };
                const auto j = [&](const Doubles& x, const Doubles& w, const Doubles& b) {
                    return dot(
                        forward(t, s, {true, false, Residual::none, transposed}, {input(x), w, b, in.residual}).y, r);
                };
                const Grads g = backward(t, s, {true, true, gelu, transposed, false},
                                         {.dy = r, .x = input(in.x), .w = in.w, .pre = in.x, .dw = {}, .db = {}});
                const Doubles ux = normal(in.x.size(), 21), uw = normal(in.w.size(), 22), ub = normal(in.b.size(), 23);
                const auto jx = [&](const Doubles& x) { return j(x, in.w, in.b); };
                const auto jw = [&](const Doubles& w) { return j(in.x, w, in.b); };
                const auto jb = [&](const Doubles& b) { return j(in.x, in.w, b); };
                CHECK(dot(g.dx, ux) == doctest::Approx(directional(jx, in.x, ux)).epsilon(1e-7));
                CHECK(dot(g.dw, uw) == doctest::Approx(directional(jw, in.w, uw)).epsilon(1e-7));
                CHECK(dot(g.db, ub) == doctest::Approx(directional(jb, in.b, ub)).epsilon(1e-7));
            }
}

TEST_CASE("linear: the same bits at every thread count, which is left as it was") {
    const auto same = [](const Doubles& a, const Doubles& b) {
        return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
    };
    const int before = omp_get_max_threads();
    // Products in which oneDNN's own threads would split K (long K, small output) or the output; the first is so
    // small that it is left to one thread.
    for (const Shape& s :
         {Shape{1, 4096, 8}, Shape{32, 4096, 32}, Shape{4096, 32, 32}, Shape{32, 32, 4096}, Shape{300, 128, 500}, real})
        for (const Target& t : targets())
            for (bool transposed : {false, true}) {
                INFO(std::string(t.name), " BT ", s.BT, " C ", s.C, " OC ", s.OC, " transposed ", transposed);
                const Inputs in = inputs(s, t.real);
                const GradInputs grad_in = grad_inputs(s, t.real);
                Outputs y;
                Grads g;
                for (int threads : {1, 2, 3, 4}) {
                    omp_set_num_threads(threads);
                    Outputs y2 = forward(t, s, {true, true, Residual::none, transposed}, in);
                    Grads g2 = backward(t, s, {true, true, true, transposed, true}, grad_in);
                    CHECK(omp_get_max_threads() == threads);
                    if (threads == 1) y = y2, g = g2;
                    CHECK(same(y.y, y2.y));
                    CHECK(same(y.pre_gelu, y2.pre_gelu));
                    CHECK(same(g.dx, g2.dx));
                    CHECK(same(g.dw, g2.dw));
                    CHECK(same(g.db, g2.db));
                }
            }
    omp_set_num_threads(before);
}

TEST_CASE("linear rejects a short buffer, and GELU together with a residual") {
    for (const Target& t : targets()) {
        Dev y(t, t.real, poison(6)), x(t, t.real, poison(8)), w(t, t.real, poison(12)), b(t, t.real, poison(2));
        Linear p = {.y = y, .pre_gelu = {}, .x = x, .w = w, .b = b, .residual = {}, .BT = 2, .C = 4, .OC = 3};
        CHECK_THROWS_WITH_AS(t.k->linear_forward(p, nullptr), doctest::Contains("linear.b holds 2"), Error);
        p.b = {};
        p.pre_gelu = p.residual = y;
        CHECK_THROWS_WITH_AS(t.k->linear_forward(p, nullptr), doctest::Contains("together"), Error);
        LinearGrad g = {.dx = x, .dw = w, .db = {}, .dy = b, .x = x, .w = w, .pre_gelu = {}, .BT = 2, .C = 4, .OC = 3};
        CHECK_THROWS_WITH_AS(t.k->linear_backward(g, nullptr), doctest::Contains("expected BT*OC = 6"), Error);
        g.dy = y;
        g.pre_gelu = y;
        CHECK_THROWS_WITH_AS(t.k->linear_backward(g, nullptr), doctest::Contains("linear.pre_gelu holds 6"), Error);
    }
}
