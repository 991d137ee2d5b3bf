// Broken on purpose and seen to fail: row_sum starting at t = 1; add writing x instead of y + x.
#include "test/cpu_check.h"

TEST_CASE("add: y += x") {
    for (const Target& t : targets())
        for (size_t n : {1, 31, 100, 20011}) {
            CAPTURE(t.name);
            CAPTURE(n);
            const Doubles x = rounded(normal(n, 1), DType::f32), y = rounded(normal(n, 2), DType::f32);
            Dev dy(t, DType::f32, y), dx(t, DType::f32, x);
            t.k->add({.y = dy, .x = dx}, nullptr);
            Doubles want(n);
            for (size_t i = 0; i < n; i++) want[i] = x[i] + y[i];
            CHECK(worst(dy.host(), want, 0, kUnit) <= 1);  // one rounding
        }
}

TEST_CASE("row_sum: sums of rows") {
    struct Case {
        int B, T;
    };
    for (const Target& t : targets())
        for (Case c : {Case{1, 1}, {3, 7}, {5, 100}, {2, 1023}}) {
            CAPTURE(t.name);
            CAPTURE(c.B);
            CAPTURE(c.T);
            const Doubles x = rounded(normal(size_t(c.B) * c.T, 1), t.stat());
            Doubles want(size_t(c.B)), size(size_t(c.B));
            for (size_t i = 0; i < x.size(); i++) want[i / c.T] += x[i], size[i / c.T] += std::abs(x[i]);
            Dev y(t, t.stat(), poison(size_t(c.B))), dx(t, t.stat(), x);
            t.k->row_sum({.y = y, .x = dx, .B = c.B, .T = c.T}, nullptr);
            CHECK(worst_each(y.host(), want, c.T * kUnit * size) <= 1);  // T terms
        }
}

TEST_CASE("add and row_sum: the same bits on 1 to 4 threads") {
    const Target t = targets()[0];
    check_thread_counts([&] {
        Dev y(t, DType::f32, normal(50001, 1)), x(t, DType::f32, normal(50001, 2)), sums(t, DType::f32, poison(3));
        t.k->add({.y = y, .x = x}, nullptr);
        t.k->row_sum({.y = sums, .x = y, .B = 3, .T = 16667}, nullptr);
        return join({y.host(), sums.host()});
    });
}

TEST_CASE("add and row_sum reject a short buffer") {
    const Target t = targets()[0];
    Dev four(t, DType::f32, Doubles(4)), five(t, DType::f32, Doubles(5));
    CHECK_THROWS_WITH_AS(t.k->add({.y = four, .x = five}, nullptr), doctest::Contains("expected"), Error);
    CHECK_THROWS_WITH_AS(t.k->row_sum({.y = four, .x = five, .B = 4, .T = 2}, nullptr),
                         doctest::Contains("expected B*T"), Error);
}
