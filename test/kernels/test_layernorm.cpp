// Broken on purpose and seen to fail: variance divided by C - 1; dw of the last chunk of rows left out.
// On CUDA: the columns past a row's end counted in the variance; a group of warps left out of dw; rows past a chunk's
// end added; dx_sum of dx before it is rounded, or of what dx held before; each barrier left out, and one buffer
// instead of two for the sums of a row's warps (a race).
#include "test/slice.h"

namespace {
struct Case {
    int BT, C;
};
// On CUDA, where C is a multiple of the vector, rows up to 2048 lie in registers of one warp, in the backward of one,
// two (1600) or eight (4104); others are treated by blocks.  64 rows make a chunk, 32 chunks are added at a time.
const Case cases[] = {{1, 1},    {5, 100},  {37, 33},  {7, 768},  {67, 13},  {1100, 16}, {9, 264},
                      {3, 1000}, {5, 1600}, {1, 2049}, {3, 4104}, {2, 8200}, {2060, 8}};

struct Input {
    Doubles x, w, b, dy;
    Input(const Case& c, DType t)
        : x(rounded(normal(size_t(c.BT) * c.C, 1), t)),
          w(rounded(normal(size_t(c.C), 2), t)),
          b(rounded(normal(size_t(c.C), 3), t)),
          dy(rounded(normal(x.size(), 4), t)) {}
};
struct Forward {
    Doubles y, mean, rstd;
};
// Tensors start `offset` elements into their allocations.
Forward forward(const Target& t, const Case& c, const Input& in, bool bias, size_t offset = 0) {
    const size_t BT = size_t(c.BT);
    Slice y(t, t.real, poison(in.x.size()), offset);
    Dev mean(t, t.stat(), poison(BT)), rstd(t, t.stat(), poison(BT));
    Slice x(t, t.real, in.x, offset), w(t, t.real, in.w, offset), b(t, t.real, in.b, offset);
    t.k->layernorm_forward(
        {.y = y, .mean = mean, .rstd = rstd, .x = x, .w = w, .b = bias ? Buf(b) : Buf(), .BT = c.BT, .C = c.C},
        nullptr);
    return {y.host(), mean.host(), rstd.host()};
}
struct Backward {
    Doubles dx, dw, db, dx_sum;
};
struct Variant {
    bool bias, accumulate, sum, overwrite;  // sum: of dx's columns
};
const Variant variants[] = {
    {false, false, false, false}, {true, false, true, false}, {false, true, true, true}, {true, true, false, true}};
// The outputs start from 0.5, which stays under what is added and disappears under what is overwritten.
Backward backward(const Target& t, const Case& c, const Input& in, const Forward& f, const Variant& v,
                  size_t offset = 0) {
    Slice dx(t, t.real, v.overwrite ? poison(in.x.size()) : Doubles(in.x.size(), 0.5), offset);
    const Doubles start(in.w.size(), 0.5);
    Dev dw(t, t.stat(), start), db(t, t.stat(), start), dx_sum(t, t.stat(), start);
    Slice dy(t, t.real, in.dy, offset), x(t, t.real, in.x, offset), w(t, t.real, in.w, offset);
    Dev mean(t, t.stat(), f.mean), rstd(t, t.stat(), f.rstd);
    t.k->layernorm_backward({.dx = dx,
                             .dw = dw,
                             .db = v.bias ? Buf(db) : Buf(),
                             .dx_sum = v.sum ? Buf(dx_sum) : Buf(),
                             .dy = dy,
                             .x = x,
                             .w = w,
                             .mean = mean,
                             .rstd = rstd,
                             .BT = c.BT,
                             .C = c.C,
                             .overwrite_dx = v.overwrite,
                             .accumulate = v.accumulate},
                            nullptr);
    return {dx.host(), dw.host(), db.host(), dx_sum.host()};
}
}  // namespace

namespace {
void check_forward(const Target& t, const Case& c, bool bias, size_t offset) {
    CAPTURE(t.name);
    CAPTURE(c.BT);
    CAPTURE(c.C);
    CAPTURE(bias);
    CAPTURE(offset);
    const Input in(c, t.real);
    const Forward got = forward(t, c, in, bias, offset), want = forward(reference(), c, in, bias);
    const double sum = (c.C / 4 + 8) * kUnit;  // of at least four lanes; 8 for the steps around it
    CHECK(worst(got.mean, want.mean, sum * biggest(in.x), 0) <= 1);
    CHECK(worst(got.rstd, want.rstd, 0, sum) <= 1);
    // y = n w + b with |n| <= max|x| rstd: the errors of mean and rstd enter once each
    const double size = biggest(in.x) * biggest(want.rstd) * biggest(in.w) + biggest(in.b);
    CHECK(worst(got.y, want.y, 2 * sum * size, store_error(t)) <= 1);
}
// Start plus the sums of dx's columns, in double: what dx_sum must be whatever dx is.
Doubles column_sums(const Doubles& dx, int C, double start) {
    Doubles sum(size_t(C), start);
    for (size_t i = 0; i < dx.size(); i++) sum[i % size_t(C)] += dx[i];
    return sum;
}
void check_backward(const Target& t, const Case& c, const Variant& v, size_t offset) {
    CAPTURE(t.name);
    CAPTURE(c.BT);
    CAPTURE(c.C);
    CAPTURE(v.bias);
    CAPTURE(v.accumulate);
    CAPTURE(v.sum);
    CAPTURE(v.overwrite);
    CAPTURE(offset);
    const Input in(c, t.real);
    Forward f = forward(reference(), c, in, v.bias);
    f.mean = rounded(f.mean, t.stat()), f.rstd = rounded(f.rstd, t.stat());
    const Backward got = backward(t, c, in, f, v, offset);
    const Backward want = backward(reference(), c, in, f, v);
    // every term of dx is at most rstd |g| (1 + |n|^2), n = (x - mean) rstd as computed
    Doubles n(in.x.size());
    for (size_t i = 0; i < n.size(); i++) n[i] = (in.x[i] - f.mean[i / c.C]) * f.rstd[i / c.C];
    const double most_n = biggest(n), most_x = biggest(in.x), g = biggest(in.dy) * biggest(in.w);
    const double row = (c.C / 4 + 8) * kUnit, column = (c.BT + 8) * kUnit;
    CHECK(worst(got.dx, want.dx, row * (biggest(f.rstd) * g * (1 + most_n * most_n) + 0.5), store_error(t)) <= 1);
    Doubles dw_size(in.w.size(), 0.5), db_size(in.w.size(), 0.5);
    for (size_t i = 0; i < n.size(); i++) {
        dw_size[i % c.C] += std::abs(in.dy[i]) * (std::abs(n[i]) + f.rstd[i / c.C] * most_x);
        db_size[i % c.C] += std::abs(in.dy[i]);
    }
    CHECK(worst_each(got.dw, want.dw, column * dw_size) <= 1);  // BT terms
    CHECK(worst_each(got.db, want.db, column * db_size) <= 1);
    Doubles magnitude = got.dx;
    for (double& x : magnitude) x = std::abs(x);
    const Doubles sum = v.sum ? column_sums(got.dx, c.C, v.accumulate ? 0.5 : 0) : Doubles(in.w.size(), 0.5);
    CHECK(worst_each(got.dx_sum, sum, column * column_sums(magnitude, c.C, 0.5)) <= 1);
}
}  // namespace

TEST_CASE("layernorm forward: every backend agrees with the double reference") {
    for (const Target& t : targets()) {
        for (const Case& c : cases)
            for (bool bias : {true, false}) check_forward(t, c, bias, 0);
        check_forward(t, {3, 64}, true, 1);
        check_forward(t, {2, 2048}, false, 4);
    }
}

TEST_CASE("layernorm forward: the reference against the formula") {
    const Case c = {3, 13};
    const Input in(c, DType::f64);
    const Forward f = forward(reference(), c, in, true);
    for (int i = 0; i < c.BT; i++) {
        double mean = 0, var = 0;
        for (int k = 0; k < c.C; k++) mean += in.x[i * c.C + k] / c.C;
        for (int k = 0; k < c.C; k++) var += std::pow(in.x[i * c.C + k] - mean, 2) / c.C;
        const double rstd = 1 / std::sqrt(var + double(1e-5f));
        for (int k = 0; k < c.C; k++)  // 1e-13: a few hundred roundings of doubles
            CHECK(std::abs(f.y[i * c.C + k] - ((in.x[i * c.C + k] - mean) * rstd * in.w[k] + in.b[k])) < 1e-13);
    }
}

TEST_CASE("layernorm backward: every backend agrees with the double reference") {
    for (const Target& t : targets()) {
        for (const Case& c : cases)
            for (const Variant& v : variants) check_backward(t, c, v, 0);
        check_backward(t, {67, 64}, variants[1], 1);
        // more than 64 rows to a chunk, no multiple of a block's warps; once is enough, it takes a second
        if (t.k != &cpu_backend() && t.real == DType::f32) check_backward(t, {65537, 4}, variants[1], 0);
        check_backward(t, {2, 2048}, variants[2], 4);
    }
}

TEST_CASE("layernorm backward: directional finite difference in double") {
    const Target t = reference();
    for (const Case& c : {Case{5, 12}, Case{37, 7}}) {
        const Input in(c, t.real);
        const Backward b = backward(t, c, in, forward(t, c, in, true), variants[1]);
        const auto check = [&](Doubles Input::*member, Doubles gradient, double start) {
            for (double& g : gradient) g -= start;
            const Doubles u = normal(gradient.size(), 9);
            const auto J = [&](const Doubles& v) {
                Input moved = in;
                moved.*member = v;
                return dot(forward(t, c, moved, true).y, in.dy);
            };
            CHECK(dot(gradient, u) == doctest::Approx(directional(J, in.*member, u)).epsilon(1e-6));
        };
        check(&Input::x, b.dx, 0.5);  // dx was added to 0.5
        check(&Input::w, b.dw, 0);
        check(&Input::b, b.db, 0);

        // dx_sum is the derivative along a vector (C) that is added to every row
        const Backward fresh = backward(t, c, in, forward(t, c, in, true), {true, false, true, true});
        const Doubles u = normal(size_t(c.C), 10);
        Doubles every_row(in.x.size());
        for (size_t i = 0; i < every_row.size(); i++) every_row[i] = u[i % size_t(c.C)];
        const auto J = [&](const Doubles& x) {
            Input moved = in;
            moved.x = x;
            return dot(forward(t, c, moved, true).y, in.dy);
        };
        CHECK(dot(fresh.dx_sum, u) == doctest::Approx(directional(J, in.x, every_row)).epsilon(1e-6));
    }
}

TEST_CASE("layernorm: the same bits on 1 to 4 threads") {
    const Case c = {203, 100};
    for (const Target& t : {targets()[0], reference()}) {
        const Input in(c, t.real);
        check_thread_counts([&] {
            const Forward f = forward(t, c, in, true);
            const Backward b = backward(t, c, in, f, {true, true, true, true});
            return join({f.y, f.mean, f.rstd, b.dx, b.dw, b.db, b.dx_sum});
        });
    }
}

TEST_CASE("layernorm rejects a short buffer") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        Dev x(t, t.real, Doubles(35)), full(t, t.real, Doubles(36)), w(t, t.real, Doubles(9)),
            dw(t, t.stat(), Doubles(9)), stat(t, t.stat(), Doubles(4));
        CHECK_THROWS_WITH_AS(
            t.k->layernorm_forward({.y = full, .mean = stat, .rstd = stat, .x = x, .w = w, .b = {}, .BT = 4, .C = 9},
                                   nullptr),
            doctest::Contains("layernorm.x holds 35 elements, expected BT*C = 36"), Error);
        CHECK_THROWS_WITH_AS(t.k->layernorm_backward({.dx = full,
                                                      .dw = dw,
                                                      .db = {},
                                                      .dy = x,
                                                      .x = full,
                                                      .w = w,
                                                      .mean = stat,
                                                      .rstd = stat,
                                                      .BT = 4,
                                                      .C = 9},
                                                     nullptr),
                             doctest::Contains("layernorm.dy holds 35 elements, expected BT*C = 36"), Error);
        CHECK_THROWS_WITH_AS(t.k->layernorm_backward({.dx = full,
                                                      .dw = dw,
                                                      .dx_sum = stat,
                                                      .dy = full,
                                                      .x = full,
                                                      .w = w,
                                                      .mean = stat,
                                                      .rstd = stat,
                                                      .BT = 4,
                                                      .C = 9},
                                                     nullptr),
                             doctest::Contains("layernorm.dx_sum holds 4 elements, expected C = 9"), Error);
    }
}
