// Attention against a naive softmax over a T x T matrix, written here in double.
//
// Broken on purpose and seen to fail: the causal mask one column too wide; scores not divided by sqrt(HS); the running
// sum not rescaled at a new maximum; dropout left out of the backward; the last key of a partly filled tile skipped.
// In the CUDA kernels: every barrier, wait and commit of copies left out (one, between two uses of the shared rows
// through which results are stored, is seen by the race check alone); the mask one key too wide or too narrow in each
// of the three bf16 kernels; a bit of a dropout group taken for its neighbour; the tail of T or of HS copied, or
// stored; one stage for all tiles.
#include <functional>

#include "test/attention_reference.h"

using namespace attention_test;

namespace {
const Case cases[] = {{1, 1, 1, 1, 0},     {2, 5, 2, 3, 0},       {2, 5, 2, 3, 0.3f},   {1, 67, 3, 17, 0.2f},
                      {2, 64, 2, 32, 0},   {1, 131, 2, 33, 0},    {1, 96, 1, 64, 0.1f}, {1, 5, 1, 136, 0.2f},
                      {2, 1, 3, 8, 0},     {2, 17, 2, 40, 0.2f},  {1, 64, 1, 128, 0},   {1, 100, 2, 40, 0.3f},
                      {1, 128, 1, 64, 0},  {2, 128, 1, 8, 0.25f}, {1, 130, 1, 64, 0},   {1, 130, 1, 128, 0.1f},
                      {1, 196, 1, 128, 0}, {1, 300, 1, 64, 0},    {1, 300, 1, 20, 0.5f}};
bool on_cuda(const Target& t) { return t.k != &cpu_backend(); }
bool takes(const Target& t, const Case& c) {
    if (t.real == DType::bf16) return c.HS % 8 == 0 && c.HS <= 128;            // others are refused, see below
    return !on_cuda(t) || !emulated() || size_t(c.T) * c.T * c.HS <= 1100000;  // more takes the emulator too long
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
            check_against_naive(t, c);
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
        check_short_buffers(t, 2);
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
