// Shared by the tests of attention: calls of the op, and a naive softmax over a T x T matrix in double.
#pragma once
#include "common/rng.h"
#include "test/cpu_check.h"

namespace emulator {
[[gnu::weak]] void reset_device();  // linked where the CUDA backend runs on the emulator; reads the environment again
}

namespace attention_test {
inline bool emulated() { return emulator::reset_device != nullptr; }
// The target with Hopper's kernels; no target, and a message, where these kernels cannot run.
inline std::vector<Target> hopper() {
    if (const std::string refusal = cuda_attention_refusal(AttentionKernel::sm90); !refusal.empty()) {
        MESSAGE("skipped: " << refusal);
        return {};
    }
    return {{&cuda_backend(AttentionKernel::sm90), DType::bf16, "cuda bf16 sm90"}};
}

struct Case {
    int B, T, NH, HS;
    float p;
};
constexpr uint64_t kSeed = 77;
constexpr uint32_t kStep = 3, kPlace = 1000, kSite = 9;

inline size_t size_of(const Case& c) { return size_t(c.B) * c.T * c.NH * c.HS; }
inline size_t stats_of(const Case& c) { return size_t(c.B) * c.T * c.NH; }

struct Forward {
    Doubles y, lse;
};
inline Forward forward(const Target& t, const Case& c, const Doubles& qkv, double place = kPlace) {
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
inline Doubles backward(const Target& t, const Case& c, const Doubles& qkv, const Forward& f, const Doubles& dy) {
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

// The naive answer.  Two sums stand beside each value: `size`, of its terms' absolute values and of the errors that
// come through the scores; and `round`, which roundings of f p and ds to bf16 act on:
//
//   y    sum_j f p v       each f p is off by 2^-8 f p                      round = sum_j f p |v|
//   dv   sum_i f p dy      likewise                                         round = sum_i f p |dy|
//   dq   sum_j ds k        ds by 2^-8 |ds|, and by 2^-8 p sum_c |dy y|      round = sum_j (|ds| + p sum_c |dy y|) |k|
//   dk   sum_i ds q        because D is summed from a rounded y             likewise with |q|
//
// A bf16 result is off by 2^-8 round, by 2^-8 |result| of its own store, and by the error of an fp32 result.
struct Naive {
    Doubles y, lse, dqkv, y_size, lse_size, dqkv_size, y_round, dqkv_round;
};
inline Doubles tolerance(const Target& t, double bound, const Doubles& size, const Doubles& round,
                         const Doubles& want) {
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
    double factor(int i, int j) const {  // of dropout, exactly as ops.h defines it
        if (c.p == 0) return 1;
        const size_t e = (size_t(h) * c.T + i) * c.T + j;
        const Philox4 r = philox(kSeed, kStep, kPlace + uint32_t(b), kSite, uint32_t(e / 4));
        return r.v[e % 4] < keep_below(c.p) ? 1 / (1 - double(c.p)) : 0;
    }
};
inline void naive_row(Naive& o, const Head& a, const Doubles& x, const Doubles& dy, int i) {
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
inline Naive naive(const Case& c, const Doubles& qkv, const Doubles& dy) {
    const Doubles y(size_of(c)), lse(stats_of(c)), dqkv(qkv.size());
    Naive o{y, lse, dqkv, y, lse, dqkv, y, dqkv};
    for (int b = 0; b < c.B; b++)
        for (int h = 0; h < c.NH; h++)
            for (int i = 0; i < c.T; i++) naive_row(o, {c, b, h}, qkv, dy, i);
    return o;
}

// Checks one case of one target: forward, then the backward from the exact y and lse.  `slack` multiplies the
// tolerances, for a library that may round more often than said above.
inline void check_against_naive(const Target& t, const Case& c, double slack = 1) {
    const Doubles qkv = rounded(normal(3 * size_of(c), 1), t.real), dy = rounded(normal(size_of(c), 2), t.real);
    const Naive want = naive(c, qkv, dy);
    // Sums of HS terms in the scores and of T terms over the row.  A score's own error enters every weight by the
    // factor 1 + sum |q k| that the sizes carry.  16: scaling, exp and the steps between the sums.
    const double unit = t.real == DType::f64 ? 1e-6 * kUnit : kUnit, bound = unit * (c.HS + c.T + 16);
    const Forward got = forward(t, c, qkv);
    CHECK(worst_each(got.y, want.y, slack * tolerance(t, bound, want.y_size, want.y_round, want.y)) <= 1);
    CHECK(worst_each(got.lse, want.lse, bound * want.lse_size) <= 1);
    const Forward exact{rounded(want.y, t.real), rounded(want.lse, t.stat())};
    // twice: the products pass through two sums over HS and T each
    CHECK(worst_each(backward(t, c, qkv, exact, dy), want.dqkv,
                     slack * tolerance(t, 2 * bound, want.dqkv_size, want.dqkv_round, want.dqkv)) <= 1);
}

// The same bits from two targets, forward and backward.
inline void check_same_bits(const Target& t, const Target& other, const Case& c) {
    const Doubles qkv = normal(3 * size_of(c), 1), dy = normal(size_of(c), 2);
    const Forward a = forward(t, c, qkv), b = forward(other, c, qkv);
    CHECK(same_bits(a.y, b.y));
    CHECK(same_bits(a.lse, b.lse));
    CHECK(same_bits(backward(t, c, qkv, a, dy), backward(other, c, qkv, b, dy)));
}

inline void check_short_buffers(const Target& t, int HS) {
    const size_t n = size_t(3) * 2 * HS;  // T NH HS
    Dev y(t, t.real, Doubles(n)), lse(t, t.stat(), Doubles(6)), qkv(t, t.real, Doubles(3 * n - 1));
    const std::string text = fmt::format("holds {} elements, expected B*T*3*NH*HS = {}", 3 * n - 1, 3 * n);
    CHECK_THROWS_WITH_AS(
        t.k->attention_forward({.y = y, .lse = lse, .qkv = qkv, .dropout = {}, .B = 1, .T = 3, .NH = 2, .HS = HS},
                               nullptr),
        doctest::Contains(("attention.qkv " + text).c_str()), Error);
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
                                                  .HS = HS},
                                                 nullptr),
                         doctest::Contains(("attention.dqkv " + text).c_str()), Error);
}
}  // namespace attention_test
