// GELU.  Broken on purpose and seen to fail: 0.044715 as 0.0447, exp(-2u) as exp(-u), the 3 of the
// derivative dropped, the last piece of for_pieces left out; on CUDA the last vector of a tensor left out, vectors used
// where a slice is not aligned.
#include "test/slice.h"

namespace {
struct Case {
    size_t n;
    double atol, rtol;
};
// CPU: one exp of at most 1.1 ulp, its argument rounded in 5 steps (relative 2^-22, times |2u| <= 8 where gelu is not
// yet 0 or x), and 5 more roundings of 2^-24: 8 * 2^-22 + 10 * 2^-24 = 2.5e-6.  Beyond |2u| = 8 the error is below 8e-4
// of x times the same.  CUDA: the argument likewise, an exp of at most 2 ulp, a reciprocal of at most 2 and 2 more
// roundings, 10 * 2^-24 again.
constexpr double kRelative = 2.5e-6;
const Case cases[] = {{1, 1e-7, kRelative},    {7, 1e-7, kRelative},     {4096, 1e-7, kRelative},
                      {4097, 1e-7, kRelative}, {20011, 1e-7, kRelative}, {64 * 3072, 1e-7, kRelative}};

double textbook_gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

Doubles forward(const Target& t, const Doubles& x, size_t offset = 0) {
    Slice y(t, t.real, poison(x.size()), offset), dx(t, t.real, x, offset);
    t.k->gelu_forward({.y = y, .x = dx}, nullptr);
    return y.host();
}
Doubles backward(const Target& t, const Doubles& dy, const Doubles& x, size_t offset = 0) {
    Slice out(t, t.real, poison(x.size()), offset), in(t, t.real, dy, offset), at(t, t.real, x, offset);
    t.k->gelu_backward({.dx = out, .dy = in, .x = at}, nullptr);
    return out.host();
}
}  // namespace

TEST_CASE("gelu: the fp64 instance is the textbook formula") {
    const Doubles x = normal(20011, 1, 2);
    Doubles want(x);
    for (double& v : want) v = textbook_gelu(v);
    CHECK(worst(forward(reference(), x), want, 1e-15, 1e-14) <= 1);
}

TEST_CASE("gelu: every backend agrees with the fp64 reference") {
    for (const Target& t : targets())
        for (const Case& c : cases) {
            INFO(std::string(t.name));
            CAPTURE(c.n);
            const Doubles x = rounded(normal(c.n, 2, 3), t.real), dy = rounded(normal(c.n, 3), t.real);
            const double rtol = c.rtol + store_error(t);
            CHECK(worst(forward(t, x), forward(reference(), x), c.atol, rtol) <= 1);
            // the derivative is about 1 and is reached through a difference: what is relative to 1 is absolute here
            CHECK(worst(backward(t, dy, x), backward(reference(), dy, x), 4 * c.rtol, rtol) <= 1);
        }
}

TEST_CASE("gelu backward: directional finite difference in fp64") {
    const size_t n = 4099;
    const Doubles x = normal(n, 4, 2), r = normal(n, 5), u = normal(n, 6);
    const auto j = [&](const Doubles& at) { return dot(forward(reference(), at), r); };
    CHECK(dot(backward(reference(), r, x), u) == doctest::Approx(directional(j, x, u)).epsilon(1e-8));
}

TEST_CASE("gelu: huge, tiny and NaN inputs") {
    std::vector<Target> all = targets();
    all.push_back(reference());
    for (const Target& t : all) {
        INFO(std::string(t.name));
        const Doubles x = rounded(
            {0, -0.0, 1e-30, -1e-30, 12, -12, 40, -40, 1e10, -1e10, 1e30, -1e30, HUGE_VAL, std::nan("")}, t.real);
        const Doubles y = forward(t, x), d = backward(t, Doubles(x.size(), 1.0), x);
        for (size_t i = 0; i + 1 < x.size(); i++) {
            CAPTURE(x[i]);
            const double want = std::abs(x[i]) < 1 ? x[i] / 2 : std::max(x[i], 0.0);
            // on the far negative side 0 comes out as x / exp(80)
            if (std::isinf(want)) {
                CHECK(y[i] == want);
                CHECK(d[i] == 1);
                continue;
            }
            CHECK(std::abs(y[i] - want) <= 1e-6 * std::abs(want) + (x[i] < -10 ? 2e-35 * -x[i] : 0));
            CHECK(d[i] == doctest::Approx(std::abs(x[i]) < 1 ? 0.5 : x[i] > 0 ? 1.0 : 0.0));
        }
        CHECK(std::isnan(y.back()));
        CHECK(std::isnan(d.back()));
    }
}

TEST_CASE("gelu: a slice off the vectors' boundary gives the same bits") {
    for (const Target& t : targets())
        for (size_t n : {1, 2, 9, 1031})
            for (size_t offset : {1, 2, 4}) {
                INFO(std::string(t.name));
                CAPTURE(n);
                CAPTURE(offset);
                const Doubles x = normal(n, 9, 2), dy = normal(n, 10);
                CHECK(same_bits(forward(t, x, offset), forward(t, x)));
                CHECK(same_bits(backward(t, dy, x, offset), backward(t, dy, x)));
            }
}

TEST_CASE("gelu: in place, and the same bits at every thread count") {
    const int before = omp_get_max_threads();
    for (const Target& t : targets()) {
        INFO(std::string(t.name));
        const size_t n = 100003;
        const Doubles x = normal(n, 7, 2), dy = normal(n, 8);
        Doubles want, want_grad;
        for (int threads : {1, 2, 3, 4}) {
            omp_set_num_threads(threads);
            Dev y(t, t.real, x), d(t, t.real, dy), at(t, t.real, x);
            t.k->gelu_forward({.y = y, .x = y}, nullptr);
            t.k->gelu_backward({.dx = d, .dy = d, .x = at}, nullptr);
            if (threads == 1) want = forward(t, x), want_grad = backward(t, dy, x);
            CHECK(std::memcmp(y.host().data(), want.data(), n * sizeof(double)) == 0);
            CHECK(std::memcmp(d.host().data(), want_grad.data(), n * sizeof(double)) == 0);
        }
    }
    omp_set_num_threads(before);
}

TEST_CASE("gelu rejects a short buffer") {
    for (const Target& t : targets()) {
        Dev a(t, t.real, poison(8)), b(t, t.real, poison(7));
        CHECK_THROWS_WITH_AS(t.k->gelu_forward({.y = b, .x = a}, nullptr), doctest::Contains("gelu.y holds 7"), Error);
        CHECK_THROWS_WITH_AS(t.k->gelu_backward({.dx = a, .dy = b, .x = a}, nullptr),
                             doctest::Contains("gelu.dy holds 7"), Error);
    }
}
