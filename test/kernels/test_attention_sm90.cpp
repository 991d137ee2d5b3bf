// Hopper's attention kernels against a naive softmax in double; on a GPU of compute capability 9.0 or on the emulator.
//
// Broken on purpose and seen to fail: each barrier and wait left out, by emulator/test/mutate.py.
#include <cstdlib>

#include "test/attention_reference.h"
#include "test/slice.h"

using namespace attention_test;

namespace {
// T around the 64 rows of a warpgroup and the 128 of a tile.  The first ones take a block through more pairs of tiles
// than it has buffers.
const Case cases[] = {{2, 384, 3, 64, 0},  {3, 256, 2, 128, 0}, {2, 1, 3, 64, 0},    {1, 17, 2, 64, 0},
                      {1, 64, 1, 64, 0},   {1, 100, 2, 64, 0},  {1, 128, 1, 64, 0},  {1, 192, 1, 64, 0},
                      {1, 256, 2, 64, 0},  {2, 1, 3, 128, 0},   {1, 17, 2, 128, 0},  {1, 64, 1, 128, 0},
                      {1, 100, 2, 128, 0}, {1, 128, 1, 128, 0}, {1, 192, 1, 128, 0}, {1, 384, 1, 128, 0}};
}  // namespace

TEST_CASE("attention sm90: forward and backward against a naive softmax in double") {
    for (const Target& t : hopper())
        for (const Case& c : cases) {
            CAPTURE(c.B);
            CAPTURE(c.T);
            CAPTURE(c.HS);
            check_against_naive(t, c);
        }
}

TEST_CASE("attention sm90 backward: directional finite difference of the double forward") {
    for (const Target& t : hopper())
        for (const Case& c : {Case{1, 200, 2, 64, 0}, Case{2, 150, 1, 128, 0}}) {
            CAPTURE(c.HS);
            const Doubles qkv = rounded(normal(3 * size_of(c), 4), t.real), dy = rounded(normal(size_of(c), 5), t.real);
            const Doubles u = normal(qkv.size(), 6);
            const auto J = [&](const Doubles& v) { return dot(forward(reference(), c, v).y, dy); };
            const double want = directional(J, qkv, u), got = dot(backward(t, c, qkv, forward(t, c, qkv), dy), u);
            // Each element of the gradient is off by at most what `round` and its own store allow
            // (attention_reference.h).  The errors are of independent signs, so their sum is about the root of the
            // squares; 4 of them is certain.
            const Naive n = naive(c, qkv, dy);
            const Doubles off = tolerance(t, 0, n.dqkv_size, n.dqkv_round, n.dqkv);
            double squares = 0;
            for (size_t i = 0; i < u.size(); i++) squares += off[i] * off[i] * u[i] * u[i];
            CHECK(std::abs(got - want) <= 4 * std::sqrt(squares));
            CHECK(std::sqrt(squares) < 0.05 * std::sqrt(dot(n.dqkv, n.dqkv)));  // or the bound would say little
        }
}

TEST_CASE("attention sm90: the bits depend neither on the multiprocessors nor on the rest of the batch") {
    for (const Target& t : hopper()) {
        const Case two = {2, 300, 2, 64, 0}, one = {1, 300, 2, 64, 0};
        const Doubles half = rounded(normal(3 * size_of(one), 1), t.real),
                      dy = rounded(normal(size_of(one), 2), t.real);
        const auto run = [&](const Case& c, const Doubles& qkv, const Doubles& d) {
            const Forward f = forward(t, c, qkv);
            return std::vector<Doubles>{f.y, f.lse, backward(t, c, qkv, f, d)};
        };
        const std::vector<Doubles> alone = run(one, half, dy);
        const auto check_twice_alone = [&] {
            const std::vector<Doubles> both = run(two, join({half, half}), join({dy, dy}));
            for (size_t i = 0; i < alone.size(); i++) CHECK(same_bits(both[i], join({alone[i], alone[i]})));
        };
        check_twice_alone();
        if (!emulated()) continue;
        for (const char* n : {"1", "7", "132"}) {
            CAPTURE(n);
            setenv("KILN_EMULATOR_MULTIPROCESSORS", n, 1);
            emulator::reset_device();
            check_twice_alone();
        }
        unsetenv("KILN_EMULATOR_MULTIPROCESSORS");
        emulator::reset_device();
    }
}

TEST_CASE("attention sm90: tiles in pairs, against a naive softmax in double") {
    for (const Target& t : hopper())
        for (const int HS : {64, 128}) {
            // Fewer than two pairs for each multiprocessor would go tile by tile: 4 are emulated, a GPU has up to 148.
            const Case c = emulated() ? Case{2, 140, 4, HS, 0} : Case{25, 140, 12, HS, 0};
            CAPTURE(HS);
            check_against_naive(t, c);
        }
}

TEST_CASE("attention sm90 is causal: later tokens do not change a bit of earlier outputs") {
    for (const Target& t : hopper()) {
        const Case c = {1, 200, 1, 64, 0};
        const Doubles qkv = normal(3 * size_of(c), 1);
        const Forward before = forward(t, c, qkv);
        for (size_t first : {1, 63, 64, 65, 127, 128, 129, 199}) {
            CAPTURE(first);
            Doubles moved = qkv;
            for (size_t i = first * 3 * 64; i < moved.size(); i++) moved[i] = 50 * moved[i] + 3;
            const Forward after = forward(t, c, moved);
            const auto head = [](const Doubles& y, size_t n) { return Doubles(y.begin(), y.begin() + long(n)); };
            CHECK(same_bits(head(before.y, first * 64), head(after.y, first * 64)));
            CHECK(same_bits(head(before.lse, first), head(after.lse, first)));
            CHECK_FALSE(same_bits(before.y, after.y));
        }
    }
}

TEST_CASE("attention sm90: large scores do not overflow") {
    for (const Target& t : hopper()) {
        const Case c = {1, 200, 1, 64, 0};
        const Doubles qkv = rounded(normal(3 * size_of(c), 1, 100), t.real);
        const Forward f = forward(t, c, qkv), want = forward(reference(), c, qkv);
        // Scores have a spread of 100 * 100 * sqrt(64) / 8: the largest one takes nearly all of a row's weight.  They
        // are off by some 2^-24 of 64 terms of 10^4, which is less than 0.05 and so changes weights by 5 %.
        CHECK(worst(f.y, want.y, 0.05 * 300, 0.05) <= 1);
        CHECK(biggest(f.y) > 200);
        for (double v : backward(t, c, qkv, f, normal(size_of(c), 2))) CHECK(std::isfinite(v));
    }
}

TEST_CASE("attention sm90: dropout, fp32 and other heads go to the portable kernels") {
    for (const Target& t : hopper())
        for (const auto& [real, c] :
             {std::pair(DType::bf16, Case{1, 70, 2, 64, 0.2f}), std::pair(DType::f32, Case{1, 20, 1, 64, 0}),
              std::pair(DType::bf16, Case{1, 70, 2, 32, 0})}) {
            CAPTURE(c.HS);
            check_same_bits({t.k, real, t.name}, {&cuda_backend(), real, "portable"}, c);
        }
}

TEST_CASE("attention sm90 rejects a short buffer and one off 16-byte boundaries") {
    for (const Target& t : hopper()) {
        check_short_buffers(t, 64);
        Dev y(t, t.real, Doubles(256)), lse(t, t.stat(), Doubles(4));
        const Slice qkv(t, t.real, Doubles(768), 1);
        CHECK_THROWS_WITH_AS(
            t.k->attention_forward({.y = y, .lse = lse, .qkv = qkv, .dropout = {}, .B = 1, .T = 4, .NH = 1, .HS = 64},
                                   nullptr),
            doctest::Contains("attention.qkv does not start on a 16-byte"), Error);
    }
}
