// Linear.  Broken on purpose and seen to fail: bias left out (with GELU and without), a tile's row or
// column offset one too small, a tile one row short, the last k skipped, accumulate ignored (dw, db), residual added
// twice when it is y, gelu' left out of dx, the last row left out of db, w not transposed for dx, operands of dw
// mixed up, OneThread removed.  On the GPU: the barrier of the column sums removed, a row, a warp or a column left out
// of them, the second pass not adding, vectors where a tensor is not aligned, the unfused bias or GELU left out, an
// epilogue mistaken for another, a plan used for another product or with old addresses, beta always 0 or 1, the key's
// alignment wrong, fuse_gelu ignored.
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <utility>

#include "kernels/cuda/gemm.h"
#include "test/op_test.h"

namespace {
struct Shape {
    int BT, C, OC;
    size_t in() const { return size_t(BT) * C; }
    size_t out() const { return size_t(BT) * OC; }
    size_t weights() const { return size_t(C) * OC; }
    bool operator==(const Shape&) const = default;
};
// Also what the GPU's GEMM treats apart: multiples of 8 in all (bias and GELU fused), in some, in none; one row.
const Shape small[] = {{1, 1, 1},  {1, 7, 1},     {5, 1, 3},    {13, 29, 31},   {33, 40, 100}, {1, 64, 128},
                       {7, 8, 24}, {16, 128, 40}, {72, 24, 13}, {300, 17, 500}, {600, 70, 500}};
// GPT-2's, with several tiles on a CPU.  ASan makes the reference product slow: there a sixth of it, in full
// (make test-full) all.
Shape real_shape() {
#ifdef __SANITIZE_ADDRESS__
    const char* full = std::getenv("KILN_TEST_FULL");
    if (!full || std::string_view(full) != "1") return {64, 384, 768};
#endif
    return {64, 768, 2304};
}
const Shape real = real_shape();

enum class Residual { none, apart, in_place };
struct Flags {
    bool bias, gelu;
    Residual residual;
    bool w_transposed;
    bool operator==(const Flags&) const = default;
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
// Of a number that was stored in bf16, whose spacing is at most 2^-7 of it.
double stored(DType t, double v) { return t == DType::bf16 ? 0x1p-8 * std::abs(v) : 0; }
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

// A tensor that begins `skip` elements into its memory: skip = 1 is off every boundary that vectors need.  In the sets
// `off` below, bit i is set where the i-th tensor of an op begins so.
class Skipped {
  public:
    Skipped(const Target& t, DType dtype, const Doubles& values, size_t skip)
        : n_(values.size()),
          skip_(skip),
          memory_(skip == 0 ? Dev(t, dtype, values) : Dev(t, dtype, shifted(values, skip))) {}
    operator Buf() const { return Buf(memory_).slice(skip_, n_); }
    Doubles host() const {
        Doubles all = memory_.host();
        if (skip_ == 0) return all;
        for (size_t i = 0; i < skip_; i++) CHECK(std::isnan(all[i]));  // nothing is written before the tensor
        return {all.begin() + ptrdiff_t(skip_), all.end()};
    }

  private:
    static Doubles shifted(const Doubles& values, size_t skip) {
        Doubles all = poison(skip);
        all.insert(all.end(), values.begin(), values.end());
        return all;
    }
    size_t n_, skip_;
    Dev memory_;
};

struct Outputs {
    Doubles y, pre_gelu;  // (BT, OC)
};
Outputs forward(const Target& t, const Shape& s, const Flags& f, const Inputs& i, unsigned off = 0) {
    const auto real = [&](const Doubles& v) { return Skipped(t, t.real, v, std::exchange(off, off >> 1) & 1); };
    Skipped y = real(f.residual == Residual::in_place ? i.residual : poison(s.out()));
    Skipped pre = real(f.gelu ? poison(s.out()) : Doubles());
    Skipped x = real(i.x), w = real(i.w), b = real(i.b);
    Skipped residual = real(f.residual == Residual::apart ? i.residual : Doubles());
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
    bool operator==(const GradFlags&) const = default;
};
std::vector<GradFlags> all_grad_flags() {
    std::vector<GradFlags> all;
    for (unsigned bits = 0; bits < 32; bits++)
        all.push_back({!!(bits & 1), !!(bits & 2), !!(bits & 4), !!(bits & 8), !!(bits & 16)});
    return all;
}
struct GradInputs {
    Doubles dy, x, w, pre, dw, db;  // dw and db: what is there before
};
GradInputs grad_inputs(const Shape& s, DType t) {
    const DType stat = t == DType::f64 ? t : DType::f32;
    return {.dy = rounded(normal(s.out(), 5), t),
            .x = rounded(normal(s.in(), 6), t),
            .w = rounded(normal(s.weights(), 7), t),
            .pre = rounded(normal(s.in(), 8), t),
            .dw = rounded(normal(s.weights(), 9), stat),
            .db = rounded(normal(s.OC, 10), stat)};
}
struct Grads {
    Doubles dx, dw, db;  // (BT, C), as w, (OC)
};
Grads backward(const Target& t, const Shape& s, const GradFlags& f, const GradInputs& i, unsigned off = 0) {
    const auto next = [&] { return std::exchange(off, off >> 1) & 1; };
    const auto real = [&](const Doubles& v) { return Skipped(t, t.real, v, next()); };
    const auto stat = [&](const Doubles& v) { return Skipped(t, t.stat(), v, next()); };
    Skipped dx = real(f.dx ? poison(s.in()) : Doubles()), dy = real(i.dy), x = real(i.x), w = real(i.w);
    Skipped pre = real(f.gelu ? i.pre : Doubles());
    Skipped dw = stat(f.accumulate ? i.dw : poison(s.weights())), db = stat(f.accumulate ? i.db : poison(s.OC));
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

// Keeps the last value that was made, for each dtype: the reference is slow, and the targets of a dtype share it.
template <class Value, class Key>
class Memo {
  public:
    template <class Make>
    const Value& get(DType t, const Shape& s, const Key& key, Make&& make) {
        Last& last = last_[t];
        if (!last.value || !(last.s == s && last.key == key)) last = {s, key, std::make_unique<Value>(make())};
        return *last.value;
    }

  private:
    struct Last {
        Shape s{};
        Key key{};
        std::unique_ptr<Value> value;
    };
    std::map<DType, Last> last_;
};

struct Expected {
    std::shared_ptr<const Inputs> in;
    Outputs want, bound;  // bound: the largest allowed error of each element
};
Expected expect(const Shape& s, const Flags& f, DType t) {
    static Memo<std::shared_ptr<const Inputs>, int> memo;
    const auto kept = memo.get(t, s, 0, [&] { return std::make_shared<const Inputs>(inputs(s, t)); });
    const Inputs& in = *kept;
    const Outputs want = forward(reference(), s, f, in);
    Flags linear = f;
    linear.gelu = false;
    Doubles bound = forward(reference(), s, linear, abs(in)).y;
    for (double& b : bound) b *= (s.C + f.bias + (f.residual != Residual::none)) * kUnit;
    const Doubles& sum = f.gelu ? want.pre_gelu : want.y;
    for (size_t i = 0; i < bound.size(); i++) {
        bound[i] += stored(t, sum[i]);
        // a bias that is not fused is first added to the residual and stored
        if (f.bias && f.residual != Residual::none) bound[i] += stored(t, in.b[i % size_t(s.OC)] + in.residual[i]);
    }
    if (!f.gelu) return {kept, want, {bound, {}}};
    // gelu carries the error of pre_gelu on by its slope: its rounding too, where gelu reads what was stored
    Doubles of_gelu = bound;
    for (size_t i = 0; i < bound.size(); i++)
        of_gelu[i] = kMaxSlope * bound[i] + kGelu * std::abs(want.y[i]) + 1e-7 + stored(t, want.y[i]);
    return {kept, want, {of_gelu, bound}};
}
void check_forward(const Target& t, const Shape& s, const Flags& f, unsigned off = 0) {
    INFO(std::string(t.name), " BT ", s.BT, " C ", s.C, " OC ", s.OC, " off ", off);
    INFO(" bias ", f.bias, " gelu ", f.gelu, " residual ", int(f.residual), " w_transposed ", f.w_transposed);
    static Memo<Expected, Flags> memo;
    const auto& [in, want, bound] = memo.get(t.real, s, f, [&] { return expect(s, f, t.real); });
    const Outputs got = forward(t, s, f, *in, off);
    if (f.gelu) CHECK(worst_bound(got.pre_gelu, want.pre_gelu, bound.pre_gelu) <= 1);
    CHECK(worst_bound(got.y, want.y, bound.y) <= 1);
}

struct ExpectedGrads {
    std::shared_ptr<const GradInputs> in;
    Grads want, bound;  // bound: the largest allowed error of each element; of db per rounding of its sum
};
ExpectedGrads expect(const Shape& s, const GradFlags& f, DType t) {
    static Memo<std::shared_ptr<const GradInputs>, int> memo;
    const auto kept = memo.get(t, s, 0, [&] { return std::make_shared<const GradInputs>(grad_inputs(s, t)); });
    const GradInputs& in = *kept;
    const Grads want = backward(reference(), s, f, in);
    GradFlags linear = f;
    linear.gelu = false;
    Grads bound = backward(reference(), s, linear, {abs(in.dy), abs(in.x), abs(in.w), in.pre, abs(in.dw), abs(in.db)});
    for (double& b : bound.dx) b *= f.gelu ? kMaxSlope * (s.OC * kUnit + kGeluGrad) : s.OC * kUnit;
    // a gelu' that is not fused multiplies a dx that was stored: two roundings, both relative to the result
    for (size_t i = 0; i < bound.dx.size(); i++) bound.dx[i] += (1 + f.gelu) * stored(t, want.dx[i]);
    for (double& b : bound.dw) b *= (s.BT + f.accumulate) * kUnit;
    for (double& b : bound.db) b *= kUnit;
    return {kept, want, bound};
}
// Rounding errors of a column sum: the CPU's order has short chains, elsewhere any order is allowed.
int column_sum_roundings(const Target& t, int BT) {
    return t.k == &cpu_backend() ? std::min(BT, 32) + (BT + 31) / 32 : BT;
}
void check_backward(const Target& t, const Shape& s, const GradFlags& f, unsigned off = 0) {
    INFO(std::string(t.name), " BT ", s.BT, " C ", s.C, " OC ", s.OC, " off ", off);
    INFO(" dx ", f.dx, " db ", f.db, " gelu ", f.gelu, " w_transposed ", f.w_transposed, " accumulate ", f.accumulate);
    static Memo<ExpectedGrads, GradFlags> memo;
    const auto& [in, want, bound] = memo.get(t.real, s, f, [&] { return expect(s, f, t.real); });
    Doubles bound_of_db = bound.db;
    for (double& b : bound_of_db) b *= column_sum_roundings(t, s.BT) + f.accumulate;
    const Grads got = backward(t, s, f, *in, off);
    CHECK(worst_bound(got.dx, want.dx, bound.dx) <= 1);
    CHECK(worst_bound(got.dw, want.dw, bound.dw) <= 1);
    CHECK(worst_bound(got.db, want.db, bound_of_db) <= 1);
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
    for (const Shape& s : small)
        for (const Flags& f : all_flags())
            for (const Target& t : targets()) check_forward(t, s, f);
    for (const Flags& f : {Flags{true, true, Residual::none, false}, Flags{true, false, Residual::in_place, true}})
        for (const Target& t : targets()) check_forward(t, real, f);
}

TEST_CASE("linear backward: every backend agrees with the fp64 reference") {
    for (const Shape& s : small)
        for (const GradFlags& f : all_grad_flags())
            for (const Target& t : targets()) check_backward(t, s, f);
    for (const GradFlags& f : {GradFlags{true, true, true, false, false}, GradFlags{true, true, false, true, true}})
        for (const Target& t : targets()) check_backward(t, real, f);
}

// The library's algorithms and epilogues that timing chose.  This machine's clock decides, so another run may test
// others.
TEST_CASE("linear: what was chosen by timing agrees with the fp64 reference") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        for (const Shape& s : {Shape{7, 8, 24}, Shape{16, 128, 40}, Shape{72, 24, 13}}) {
            const auto all = [&] {
                for (const Flags& f : all_flags()) check_forward(t, s, f);
                for (const GradFlags& f : all_grad_flags()) check_backward(t, s, f);
            };
            t.k->tune(true);
            for (const Flags& f : all_flags()) forward(t, s, f, inputs(s, t.real));
            for (const GradFlags& f : all_grad_flags()) backward(t, s, f, grad_inputs(s, t.real));
            t.k->tune(false);
            CHECK(t.k->choices().empty() == (t.k == &cpu_backend()));
            all();
            t.k->set_choices("");
        }
    }
}

TEST_CASE("linear forward: a GELU that is not fused sees pre_gelu as it is stored, to the last bit") {
    for (const Target& t : targets())
        for (const Shape& s : {Shape{16, 128, 40}, Shape{72, 24, 13}})
            for (bool bias : {false, true}) {
                CAPTURE(t.name);
                const Inputs in = inputs(s, t.real);
                Dev y(t, t.real, poison(s.out())), pre(t, t.real, poison(s.out())), want(t, t.real, poison(s.out()));
                Dev x(t, t.real, in.x), w(t, t.real, in.w), b(t, t.real, in.b);
                t.k->linear_forward({.y = y,
                                     .pre_gelu = pre,
                                     .x = x,
                                     .w = w,
                                     .b = bias ? Buf(b) : Buf(),
                                     .BT = s.BT,
                                     .C = s.C,
                                     .OC = s.OC,
                                     .fuse_gelu = false},
                                    nullptr);
                t.k->gelu_forward({.y = want, .x = pre}, nullptr);
                CHECK(worst(y.host(), want.host(), 1e-300, 0) == 0);
            }
}

TEST_CASE("linear: tensors may begin anywhere, and the bits of db do not depend on where") {
    for (const Target& t : targets())
        for (const Shape& s : {Shape{24, 40, 64}, Shape{7, 13, 3}, Shape{200, 16, 264}}) {
            for (const Flags& f : {Flags{true, true, Residual::none, false}, Flags{true, false, Residual::apart, true},
                                   Flags{false, false, Residual::in_place, false}})
                for (unsigned off : {~0u, 1u, 2u, 4u, 8u, 16u, 32u}) check_forward(t, s, f, off);
            for (bool gelu : {false, true})
                for (unsigned off : {~0u, 1u, 2u, 4u, 8u, 16u, 32u, 64u})
                    check_backward(t, s, {true, true, gelu, gelu, true}, off);
            const GradInputs in = grad_inputs(s, t.real);
            const GradFlags f = {false, true, false, false, true};
            CHECK(worst(backward(t, s, f, in, 0).db, backward(t, s, f, in, ~0u).db, 1e-300, 0) == 0);
        }
}

// All partial sums are whole numbers below 2^24, so an error is a row left out or taken twice.
TEST_CASE("linear backward: column sums of small whole numbers are exact") {
    for (const Target& t : targets())
        for (int BT : {1, 8, 63, 64, 65, 257, 2049})
            for (int OC : {1, 8, 31, 256, 264, 521}) {
                if (BT > 300 && OC > 300 && t.k != &cpu_backend()) continue;  // slow on an emulated GPU
                INFO(std::string(t.name), " BT ", BT, " OC ", OC);
                const Shape s = {BT, 1, OC};
                GradInputs in = grad_inputs(s, t.real);
                in.dy = integers(s.out(), 11, 9);
                Doubles want(size_t(OC), 0.0);
                for (size_t i = 0; i < in.dy.size(); i++) want[i % size_t(OC)] += in.dy[i];
                CHECK(worst(backward(t, s, {false, true, false, false, false}, in).db, want, 1e-300, 0) == 0);
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
                if (t.k != &cpu_backend()) continue;  // no ops of a GPU see the host's threads
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

TEST_CASE("linear on a GPU: a product that the library refuses is named, with its shape") {
    const Target t = {&cuda_backend(), DType::f32, "cuda f32"};
    Dev a(t, DType::f32, poison(6)), b(t, DType::bf16, poison(12)), d(t, DType::f32, poison(8)), i(t, DType::i32, {1});
    CHECK_THROWS_WITH_AS(
        cuda::gemm({.d = d, .a = a, .b = b, .M = 2, .N = 4, .K = 3}, nullptr),
        doctest::Contains("cuBLASLt: CUBLAS_STATUS_NOT_SUPPORTED for M x N x K = 2 x 4 x 3, f32 x bf16"), Error);
    CHECK_THROWS_WITH_AS(cuda::gemm({.d = d, .a = a, .b = b, .M = 2, .N = 4, .K = 4}, nullptr),
                         doctest::Contains("gemm.a holds 6 elements, expected M*K = 8"), Error);
    CHECK_THROWS_WITH_AS(cuda::gemm({.d = i, .a = i, .b = i, .M = 1, .N = 1, .K = 1}, nullptr),
                         doctest::Contains("i32; products are of f32 and bf16"), Error);
}
