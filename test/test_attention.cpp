// Attention against a naive softmax over a T x T matrix, written here in double.
//
// Broken on purpose and seen to fail: the causal mask one column too wide; scores not divided by sqrt(HS); the running
// sum not rescaled at a new maximum; dropout left out of the backward; the last key of a partly filled tile skipped.
// Of the CUDA kernels: every barrier, wait and commit of copies left out (one, between two uses of the rows that
// results leave through, only under the race check); the mask one key too wide or too narrow in each of the three bf16
// kernels; a bit of a dropout group taken for its neighbour; the tail of T or of HS copied, or stored; one stage for
// all tiles.
#include <functional>

#include "common/rng.h"
#include "test/cpu_check.h"

namespace emulator {
[[gnu::weak]] void reset_device();  // linked where the CUDA backend runs on the emulator
}

namespace {
struct Case {
    int B, T, NH, HS;
    float p;
};
const Case cases[] = {{1, 1, 1, 1, 0},     {2, 5, 2, 3, 0},       {2, 5, 2, 3, 0.3f},   {1, 67, 3, 17, 0.2f},
                      {2, 64, 2, 32, 0},   {1, 131, 2, 33, 0},    {1, 96, 1, 64, 0.1f}, {1, 5, 1, 136, 0.2f},
                      {2, 1, 3, 8, 0},     {2, 17, 2, 40, 0.2f},  {1, 64, 1, 128, 0},   {1, 100, 2, 40, 0.3f},
                      {1, 128, 1, 64, 0},  {2, 128, 1, 8, 0.25f}, {1, 130, 1, 64, 0},   {1, 130, 1, 128, 0.1f},
                      {1, 196, 1, 128, 0}, {1, 300, 1, 64, 0},    {1, 300, 1, 20, 0.5f}};
bool emulated() { return emulator::reset_device != nullptr; }
bool on_cuda(const Target& t) { return t.k != &cpu_backend(); }
bool takes(const Target& t, const Case& c) {
    if (t.real == DType::bf16) return c.HS % 8 == 0 && c.HS <= 128;            // others are refused, see below
    return !on_cuda(t) || !emulated() || size_t(c.T) * c.T * c.HS <= 1100000;  // more takes the emulator too long
}
constexpr uint64_t kSeed = 77;
constexpr uint32_t kStep = 3, kPlace = 1000, kSite = 9;

size_t size_of(const Case& c) { return size_t(c.B) * c.T * c.NH * c.HS; }
size_t stats_of(const Case& c) { return size_t(c.B) * c.T * c.NH; }

struct Forward {
    Doubles y, lse;
};
Forward forward(const Target& t, const Case& c, const Doubles& qkv, double place = kPlace) {
    Dev y(t, t.real, poison(size_of(c))), lse(t, t.stat(), poison(stats_of(c))), in(t, t.real, qkv);
    Dev where(t, DType::u32, {kStep, place});
    t.k->attention_forward({.y = y,
                            .lse = lse,
                            .qkv = in,
                            .dropout = {.where = where, .seed = kSeed, .site = kSite, .p = c.p},
                            .B = c.B,
                            .T = c.T,
                            .NH = c.NH,
                            .HS = c.HS},
                           nullptr);
    return {y.host(), lse.host()};
}
Doubles backward(const Target& t, const Case& c, const Doubles& qkv, const Forward& f, const Doubles& dy) {
    Dev dqkv(t, t.real, poison(3 * size_of(c))), d(t, t.real, dy), in(t, t.real, qkv), y(t, t.real, f.y);
    Dev lse(t, t.stat(), f.lse), scratch(t, t.stat(), poison(stats_of(c))), where(t, DType::u32, {kStep, kPlace});
    t.k->attention_backward({.dqkv = dqkv,
                             .dy = d,
                             .qkv = in,
                             .y = y,
                             .lse = lse,
                             .scratch = scratch,
                             .dropout = {.where = where, .seed = kSeed, .site = kSite, .p = c.p},
                             .B = c.B,
                             .T = c.T,
                             .NH = c.NH,
                             .HS = c.HS},
                            nullptr);
    return dqkv.host();
}

// The naive answer; beside each value the sum of its terms' absolute values, with what the error of a score adds
// (size), and the sum that roundings of f p and ds to bf16 act on (round):
//
//   y    sum_j f p v       each f p is off by 2^-8 f p                      round = sum_j f p |v|
//   dv   sum_i f p dy      likewise                                         round = sum_i f p |dy|
//   dq   sum_j ds k        ds by 2^-8 |ds|, and by 2^-8 p sum_c |dy y|      round = sum_j (|ds| + p sum_c |dy y|) |k|
//   dk   sum_i ds q        because D is summed from a rounded y             likewise with |q|
//
// A bf16 result is off by 2^-8 round, by 2^-8 |result| of its own store, and by what an fp32 one is off.
struct Naive {
    Doubles y, lse, dqkv, y_size, lse_size, dqkv_size, y_round, dqkv_round;
};
Doubles tolerance(const Target& t, double bound, const Doubles& size, const Doubles& round, const Doubles& want) {
    Doubles v(size.size());
    for (size_t i = 0; i < v.size(); i++)
        v[i] = bound * size[i] + (t.real == DType::bf16 ? 0x1p-8 * (round[i] + std::abs(want[i])) : 0);
    return v;
}
struct Head {  // one head of one sequence, with accessors into the packed layouts
    const Case& c;
    int b, h;
    size_t qkv(int t, int which, int k) const { return (((size_t(b) * c.T + t) * 3 + which) * c.NH + h) * c.HS + k; }
    size_t y(int t, int k) const { return ((size_t(b) * c.T + t) * c.NH + h) * c.HS + k; }
    double factor(int i, int j) const {  // of dropout: ops.h, word for word
        if (c.p == 0) return 1;
        const size_t e = (size_t(h) * c.T + i) * c.T + j;
        const Philox4 r = philox(kSeed, kStep, kPlace + uint32_t(b), kSite, uint32_t(e / 4));
        return r.v[e % 4] < keep_below(c.p) ? 1 / (1 - double(c.p)) : 0;
    }
};
void naive_row(Naive& o, const Head& a, const Doubles& x, const Doubles& dy, int i) {
    const int HS = a.c.HS;
    const double scale = 1 / std::sqrt(double(HS));
    Doubles p(size_t(i) + 1), f(p.size()), t(p.size()), t_size(p.size());
    double m = -HUGE_VAL, sum = 0, s_size = 0, D = 0, D_size = 0;
    for (int j = 0; j <= i; j++) {
        double s = 0, size = 0;
        for (int k = 0; k < HS; k++) {
            s += x[a.qkv(i, 0, k)] * x[a.qkv(j, 1, k)] * scale;
            size += std::abs(x[a.qkv(i, 0, k)] * x[a.qkv(j, 1, k)] * scale);
        }
        p[j] = s, m = std::max(m, s), s_size = std::max(s_size, size), f[j] = a.factor(i, j);
    }
    for (double& v : p) sum += v = std::exp(v - m);
    o.lse[(size_t(a.b) * a.c.NH + a.h) * a.c.T + i] = m + std::log(sum);
    o.lse_size[(size_t(a.b) * a.c.NH + a.h) * a.c.T + i] = s_size + 1;
    for (int j = 0; j <= i; j++) {
        p[j] /= sum;
        for (int k = 0; k < HS; k++) {
            const double v = x[a.qkv(j, 2, k)], g = dy[a.y(i, k)];
            const double weighed = f[j] * p[j] * std::abs(v);
            o.y[a.y(i, k)] += f[j] * p[j] * v;
            o.y_round[a.y(i, k)] += weighed, o.y_size[a.y(i, k)] += weighed * (1 + s_size);
            t[j] += g * v, t_size[j] += std::abs(g * v);
        }
        D += f[j] * p[j] * t[j], D_size += f[j] * p[j] * t_size[j];
    }
    double dy_y = 0;
    for (int k = 0; k < HS; k++) dy_y += std::abs(dy[a.y(i, k)] * o.y[a.y(i, k)]);
    for (int j = 0; j <= i; j++) {
        const double ds = p[j] * (f[j] * t[j] - D), size = p[j] * (f[j] * t_size[j] + D_size) * (1 + s_size);
        for (int k = 0; k < HS; k++) {
            const double q = x[a.qkv(i, 0, k)] * scale, key = x[a.qkv(j, 1, k)] * scale,
                         g = f[j] * p[j] * dy[a.y(i, k)];
            const double off = std::abs(ds) + p[j] * dy_y;
            o.dqkv_round[a.qkv(i, 0, k)] += off * std::abs(key), o.dqkv_round[a.qkv(j, 1, k)] += off * std::abs(q);
            o.dqkv_round[a.qkv(j, 2, k)] += std::abs(g);
            o.dqkv[a.qkv(i, 0, k)] += ds * key, o.dqkv_size[a.qkv(i, 0, k)] += size * std::abs(key);
            o.dqkv[a.qkv(j, 1, k)] += ds * q, o.dqkv_size[a.qkv(j, 1, k)] += size * std::abs(q);
            o.dqkv[a.qkv(j, 2, k)] += g, o.dqkv_size[a.qkv(j, 2, k)] += std::abs(g) * (1 + s_size);
        }
    }
}
Naive naive(const Case& c, const Doubles& qkv, const Doubles& dy) {
    const Doubles y(size_of(c)), lse(stats_of(c)), dqkv(qkv.size());
    Naive o{y, lse, dqkv, y, lse, dqkv, y, dqkv};
    for (int b = 0; b < c.B; b++)
        for (int h = 0; h < c.NH; h++)
            for (int i = 0; i < c.T; i++) naive_row(o, {c, b, h}, qkv, dy, i);
    return o;
}
}  // namespace

TEST_CASE("attention: forward and backward against a naive softmax in double") {
    std::vector<Target> all = targets();
    all.push_back(reference());
    for (const Target& t : all)
        for (const Case& c : cases) {
            if (!takes(t, c)) continue;
            CAPTURE(t.name);
            CAPTURE(c.T);
            CAPTURE(c.NH);
            CAPTURE(c.HS);
            CAPTURE(c.p);
            const Doubles qkv = rounded(normal(3 * size_of(c), 1), t.real), dy = rounded(normal(size_of(c), 2), t.real);
            const Naive want = naive(c, qkv, dy);
            // Sums of HS terms in the scores and of T terms over the row.  A score's own error enters every weight by
            // the factor 1 + sum |q k| that the sizes carry.  16: scaling, exp and the steps between the sums.
            const double unit = t.real == DType::f64 ? 1e-6 * kUnit : kUnit, bound = unit * (c.HS + c.T + 16);
            const Forward got = forward(t, c, qkv);
            CHECK(worst_each(got.y, want.y, tolerance(t, bound, want.y_size, want.y_round, want.y)) <= 1);
            CHECK(worst_each(got.lse, want.lse, bound * want.lse_size) <= 1);
            const Forward exact{rounded(want.y, t.real), rounded(want.lse, t.stat())};
            // twice: the products pass through two sums over HS and T each
            CHECK(worst_each(backward(t, c, qkv, exact, dy), want.dqkv,
                             tolerance(t, 2 * bound, want.dqkv_size, want.dqkv_round, want.dqkv)) <= 1);
        }
}

TEST_CASE("attention backward: directional finite difference in double") {
    const Target t = reference();
    for (const Case& c : {Case{2, 7, 2, 5, 0}, Case{1, 70, 2, 9, 0.25f}}) {
        const Doubles qkv = normal(3 * size_of(c), 1), dy = normal(size_of(c), 2), u = normal(qkv.size(), 3);
        const auto J = [&](const Doubles& v) { return dot(forward(t, c, v).y, dy); };
        const double got = dot(backward(t, c, qkv, forward(t, c, qkv), dy), u);
        CHECK(got == doctest::Approx(directional(J, qkv, u)).epsilon(1e-6));
    }
}

TEST_CASE("attention is causal: later tokens do not change a bit of earlier outputs") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        const Case c = {1, 150, 2, 24, 0.1f};
        const Doubles qkv = normal(3 * size_of(c), 1);
        const Forward before = forward(t, c, qkv);
        const size_t token = size_t(3) * c.NH * c.HS, row = size_t(c.NH) * c.HS;
        for (size_t first : {1, 7, 63, 64, 65, 128, 149}) {
            CAPTURE(first);
            Doubles moved = qkv;
            for (size_t i = first * token; i < moved.size(); i++) moved[i] = 50 * moved[i] + 3;
            const Forward after = forward(t, c, moved);
            const auto head = [&](const Doubles& y, size_t n) { return Doubles(y.begin(), y.begin() + long(n)); };
            CHECK(same_bits(head(before.y, first * row), head(after.y, first * row)));
            CHECK(same_bits(head(before.lse, first), head(after.lse, first)));  // of head 0
            CHECK_FALSE(same_bits(before.y, after.y));
        }
    }
}

TEST_CASE("attention: large scores do not overflow") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        const Case c = {1, 80, 1, 8, 0};
        const Doubles qkv = normal(3 * size_of(c), 1, 100);
        const Forward f = forward(t, c, qkv);
        for (double v : f.y) CHECK(std::isfinite(v));
        for (double v : backward(t, c, qkv, f, normal(size_of(c), 2))) CHECK(std::isfinite(v));
    }
}

TEST_CASE("attention: the dropout mask belongs to the place in the global batch") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        const Case two = {2, 33, 2, 16, 0.3f}, one = {1, 33, 2, 16, 0.3f};
        const Doubles half = normal(3 * size_of(one), 1);
        const Doubles both = forward(t, two, join({half, half}), 4).y;
        CHECK(same_bits(both, join({forward(t, one, half, 4).y, forward(t, one, half, 5).y})));
        CHECK_FALSE(same_bits(forward(t, one, half, 4).y, forward(t, one, half, 5).y));
    }
}

TEST_CASE("attention: the same bits on 1 to 4 threads") {
    const Target t = {&cpu_backend(), DType::f32, "cpu f32"};
    for (const Case& c : {Case{2, 70, 3, 20, 0.1f}, Case{1, 530, 2, 32, 0}}) {
        const Doubles qkv = normal(3 * size_of(c), 1), dy = normal(size_of(c), 2);
        check_thread_counts([&] {
            const Forward f = forward(t, c, qkv);
            return join({f.y, f.lse, backward(t, c, qkv, f, dy)});
        });
    }
}

TEST_CASE("attention rejects a short buffer") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        Dev y(t, t.real, Doubles(12)), lse(t, t.stat(), Doubles(6)), qkv(t, t.real, Doubles(35));
        CHECK_THROWS_WITH_AS(
            t.k->attention_forward({.y = y, .lse = lse, .qkv = qkv, .dropout = {}, .B = 1, .T = 3, .NH = 2, .HS = 2},
                                   nullptr),
            doctest::Contains("attention.qkv holds 35 elements, expected B*T*3*NH*HS = 36"), Error);
        CHECK_THROWS_WITH_AS(t.k->attention_backward({.dqkv = qkv,
                                                      .dy = y,
                                                      .qkv = qkv,
                                                      .y = y,
                                                      .lse = lse,
                                                      .scratch = lse,
                                                      .dropout = {},
                                                      .B = 1,
                                                      .T = 3,
                                                      .NH = 2,
                                                      .HS = 2},
                                                     nullptr),
                             doctest::Contains("attention.dqkv holds 35 elements, expected"), Error);
    }
}

TEST_CASE("attention in bf16 on a GPU refuses head sizes that its tiles cannot hold") {
    for (const Target& t : targets()) {
        if (t.real != DType::bf16) continue;
        for (int HS : {1, 4, 12, 100, 136}) {
            CAPTURE(HS);
            const Case c = {1, 2, 1, HS, 0};
            const Doubles qkv(3 * size_of(c)), y(size_of(c)), lse(stats_of(c));
            for (const std::function<void()>& run :
                 {std::function<void()>([&] { forward(t, c, qkv); }), std::function<void()>([&] {
                      backward(t, c, qkv, {y, lse}, y);
                  })})
                try {
                    run();
                    FAIL("not refused");
                } catch (const Error& e) {
                    CHECK(e.code == Exit::usage);
                    for (const char* text : {"model.n_embd / model.n_head = ", "multiple of 8", "at most 128", "fp32"})
                        CHECK(std::string(e.what()).find(text) != std::string::npos);
                }
        }
    }
}
