// cuDNN's attention beside the double instance of the CPU backend.  It runs in test_native on a GPU with cuDNN; elsewhere
// the test says why it does not, and that the refusal is heard is all that is tested.
#include <array>

#include "test/cpu_check.h"

namespace emulator {
[[gnu::weak]] void reset_device();  // linked where the CUDA backend runs on the emulator
}

namespace {
struct Case {
    int B, T, NH, HS;
    DType real = DType::bf16;
    float p = 0;
};
// Both head sizes; whole and broken tiles of 64 and 128.
const Case cases[] = {{2, 128, 2, 64}, {1, 33, 2, 64}, {1, 300, 3, 64}, {2, 256, 2, 128}, {1, 193, 1, 128}};
// What cuDNN is not asked for.
const Case portable_cases[] = {
    {1, 70, 2, 64, DType::bf16, 0.2f}, {1, 70, 2, 64, DType::f32}, {1, 70, 2, 32}, {2, 1, 2, 64}};
constexpr std::array kKernels = {AttentionKernel::cudnn, AttentionKernel::cudnn_fastest};

size_t size_of(const Case& c) { return size_t(c.B) * c.T * c.NH * c.HS; }
size_t stats_of(const Case& c) { return size_t(c.B) * c.T * c.NH; }
Target target(AttentionKernel kernel, DType real) {
    return {&cuda_backend(kernel), real, kernel == AttentionKernel::cudnn ? "cudnn" : "cudnn_fastest"};
}

// Says why and returns true where these kernels cannot run.
bool refused(AttentionKernel kernel) {
    const std::string why = cuda_attention_refusal(kernel);
    if (!why.empty()) MESSAGE("not run: ", why);
    return !why.empty();
}

struct Forward {
    Doubles y, lse;
};
Forward forward(const Target& t, const Case& c, const Doubles& qkv) {
    Dev y(t, t.real, poison(size_of(c))), lse(t, t.stat(), poison(stats_of(c))), in(t, t.real, qkv);
    Dev where(t, DType::u32, {3, 1000});
    t.k->attention_forward({.y = y,
                            .lse = lse,
                            .qkv = in,
                            .dropout = {.where = where, .seed = 77, .site = 9, .p = c.p},
                            .B = c.B,
                            .T = c.T,
                            .NH = c.NH,
                            .HS = c.HS},
                           nullptr);
    return {y.host(), lse.host()};
}
Doubles backward(const Target& t, const Case& c, const Doubles& qkv, const Forward& f, const Doubles& dy) {
    Dev dqkv(t, t.real, poison(3 * size_of(c))), d(t, t.real, dy), in(t, t.real, qkv), y(t, t.real, f.y);
    Dev lse(t, t.stat(), f.lse), scratch(t, t.stat(), poison(stats_of(c))), where(t, DType::u32, {3, 1000});
    t.k->attention_backward({.dqkv = dqkv,
                             .dy = d,
                             .qkv = in,
                             .y = y,
                             .lse = lse,
                             .scratch = scratch,
                             .dropout = {.where = where, .seed = 77, .site = 9, .p = c.p},
                             .B = c.B,
                             .T = c.T,
                             .NH = c.NH,
                             .HS = c.HS},
                            nullptr);
    return dqkv.host();
}

// What roundings to bf16 act on: of p before its products with v and dy, of ds before those with k and q, and of the y
// that D is summed from.  As in test_attention.cpp, which has the derivation.
struct Rounding {
    Doubles y, dqkv;
    double scores = 0;  // the largest sum |q k| / sqrt(HS)
};
Rounding rounding(const Case& c, const Doubles& x, const Doubles& dy, const Forward& f) {
    Rounding o{Doubles(size_of(c)), Doubles(3 * size_of(c))};
    const double scale = 1 / std::sqrt(double(c.HS));
    for (int b = 0; b < c.B; b++)
        for (int h = 0; h < c.NH; h++) {
            const auto at = [&](int t, int which) { return (((size_t(b) * c.T + t) * 3 + which) * c.NH + h) * c.HS; };
            const auto row = [&](int t) { return ((size_t(b) * c.T + t) * c.NH + h) * c.HS; };
            for (int i = 0; i < c.T; i++) {
                const double *q = &x[at(i, 0)], *g = &dy[row(i)], *y = &f.y[row(i)];
                double D = 0, D_size = 0;
                for (int k = 0; k < c.HS; k++) D += g[k] * y[k], D_size += std::abs(g[k] * y[k]);
                for (int j = 0; j <= i; j++) {
                    const double *key = &x[at(j, 1)], *v = &x[at(j, 2)];
                    double s = 0, s_size = 0, t = 0;
                    for (int k = 0; k < c.HS; k++)
                        s += q[k] * key[k] * scale, s_size += std::abs(q[k] * key[k]) * scale, t += g[k] * v[k];
                    o.scores = std::max(o.scores, s_size);
                    const double p = std::exp(s - f.lse[(size_t(b) * c.NH + h) * c.T + i]);
                    const double off = p * (std::abs(t - D) + D_size) * scale;
                    for (int k = 0; k < c.HS; k++) {
                        o.y[row(i) + k] += p * std::abs(v[k]);
                        o.dqkv[at(i, 0) + k] += off * std::abs(key[k]);
                        o.dqkv[at(j, 1) + k] += off * std::abs(q[k]);
                        o.dqkv[at(j, 2) + k] += p * std::abs(g[k]);
                    }
                }
            }
        }
    return o;
}
// Twice what two roundings allow, that of the terms and that of the store: where a library rounds is its own affair.
// What its sums in fp32 add is far below.
Doubles tolerance(const Doubles& round, const Doubles& want) {
    Doubles v(round.size());
    for (size_t i = 0; i < v.size(); i++) v[i] = 2 * 0x1p-8 * (round[i] + std::abs(want[i]));
    return v;
}
}  // namespace

TEST_CASE("attention by cuDNN: forward, log-sum-exp and backward against the double instance") {
    for (AttentionKernel kernel : kKernels) {
        if (refused(kernel)) continue;
        const Target t = target(kernel, DType::bf16);
        CAPTURE(t.name);
        for (const Case& c : cases) {
            CAPTURE(c.T);
            CAPTURE(c.HS);
            const Doubles qkv = rounded(normal(3 * size_of(c), 1), t.real), dy = rounded(normal(size_of(c), 2), t.real);
            const Forward want = forward(reference(), c, qkv);
            const Rounding round = rounding(c, qkv, dy, want);
            const Forward got = forward(t, c, qkv);
            CHECK(worst_each(got.y, want.y, tolerance(round.y, want.y)) <= 1);
            // natural logarithm, scaled scores; the bound of sums in fp32
            CHECK(worst(got.lse, want.lse, kUnit * (c.HS + c.T + 16) * (1 + round.scores), 0) <= 1);
            // from exact y and lse: an lse in another unit would show in the backward by itself
            const Forward exact{rounded(want.y, t.real), rounded(want.lse, DType::f32)};
            const Doubles dqkv = backward(reference(), c, qkv, want, dy);
            CHECK(worst_each(backward(t, c, qkv, exact, dy), dqkv, tolerance(round.dqkv, dqkv)) <= 1);
            CHECK(worst_each(backward(t, c, qkv, got, dy), dqkv, 2 * tolerance(round.dqkv, dqkv)) <= 1);
        }
    }
}

TEST_CASE("attention by cuDNN, the deterministic one: the same bits again") {
    if (refused(AttentionKernel::cudnn)) return;
    const Target t = target(AttentionKernel::cudnn, DType::bf16);
    for (const Case& c : {Case{4, 512, 4, 64}, Case{2, 300, 4, 128}}) {
        CAPTURE(c.HS);
        const Doubles qkv = normal(3 * size_of(c), 1), dy = normal(size_of(c), 2);
        const Forward f = forward(t, c, qkv);
        const Doubles dqkv = backward(t, c, qkv, f, dy);
        for (int i = 0; i < 5; i++) {
            const Forward again = forward(t, c, qkv);
            CHECK((same_bits(f.y, again.y) && same_bits(f.lse, again.lse)));
            CHECK(same_bits(dqkv, backward(t, c, qkv, f, dy)));
        }
    }
}

TEST_CASE("attention by cuDNN: what cuDNN is not asked for has the bits of the portable kernels") {
    for (AttentionKernel kernel : kKernels) {
        if (refused(kernel)) continue;
        for (const Case& c : portable_cases) {
            CAPTURE(c.T);
            CAPTURE(c.HS);
            CAPTURE(c.p);
            const Target t = target(kernel, c.real), portable = {&cuda_backend(), c.real, "portable"};
            const Doubles qkv = normal(3 * size_of(c), 1), dy = normal(size_of(c), 2);
            const Forward f = forward(t, c, qkv), want = forward(portable, c, qkv);
            CHECK((same_bits(f.y, want.y) && same_bits(f.lse, want.lse)));
            CHECK(same_bits(backward(t, c, qkv, f, dy), backward(portable, c, qkv, want, dy)));
        }
    }
}

TEST_CASE("attention by cuDNN rejects a short buffer") {
    for (AttentionKernel kernel : kKernels) {
        if (refused(kernel)) continue;
        const Target t = target(kernel, DType::bf16);
        Dev y(t, t.real, Doubles(256)), lse(t, t.stat(), Doubles(4)), qkv(t, t.real, Doubles(767));
        CHECK_THROWS_WITH_AS(
            t.k->attention_forward({.y = y, .lse = lse, .qkv = qkv, .dropout = {}, .B = 1, .T = 2, .NH = 2, .HS = 64},
                                   nullptr),
            doctest::Contains("attention.qkv holds 767 elements, expected B*T*3*NH*HS = 768"), Error);
        CHECK_THROWS_WITH_AS(t.k->attention_backward({.dqkv = qkv,
                                                      .dy = y,
                                                      .qkv = qkv,
                                                      .y = y,
                                                      .lse = lse,
                                                      .scratch = lse,
                                                      .dropout = {},
                                                      .B = 1,
                                                      .T = 2,
                                                      .NH = 2,
                                                      .HS = 64},
                                                     nullptr),
                             doctest::Contains("attention.dqkv holds 767 elements, expected"), Error);
    }
}

TEST_CASE("attention by cuDNN: where it cannot run, asking for its table says why") {
    for (AttentionKernel kernel : kKernels) {
        const std::string why = cuda_attention_refusal(kernel);
        if (emulator::reset_device != nullptr)
            CHECK(why == "the emulator has no cuDNN: take the portable kernels, or a GPU");
        if (why.empty())
            CHECK((cuda_backend(kernel).attention_forward != cuda_backend().attention_forward));
        else
            CHECK_THROWS_WITH_AS(cuda_backend(kernel), why.c_str(), Error);
    }
    CHECK(cuda_attention_refusal(AttentionKernel::portable).empty());
}
