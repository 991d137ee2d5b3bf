// Packing of vectors for a message: sizes, rounding errors, and what error feedback makes of them.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "comm/quantized.h"
#include "common/buf.h"
#include "common/rng.h"

namespace {
constexpr OuterDtype kTypes[] = {OuterDtype::fp32, OuterDtype::bf16, OuterDtype::int4};

// Magnitudes from 2^-20 to 1 in one vector.
std::vector<float> numbers(size_t n, uint32_t seed) {
    std::vector<float> x(n);
    for (size_t i = 0; i < n; i++) {
        const Philox4 p = philox(3, uint32_t(i), seed, 0, 0);
        x[i] = (uniform_open0(p.v[0]) - 0.5f) * std::exp2(-float(p.v[1] % 20));
    }
    return x;
}

std::vector<float> round_trip(OuterDtype t, const std::vector<float>& x) {
    std::vector<std::byte> packed(packed_bytes(t, x.size()) + 1, std::byte(0x5a));
    pack(t, x, packed.data());
    CHECK(packed.back() == std::byte(0x5a));  // nothing behind the promised bytes
    std::vector<float> y(x.size(), NAN);
    unpack(t, packed.data(), y);
    return y;
}

// Half a step of rounding at x: bf16 has 8 bits; a block of int4 has steps of its scale, at most 1 + 2^-7 times max / 7.
double half_step(OuterDtype t, const std::vector<float>& x, size_t i) {
    if (t == OuterDtype::fp32) return 0;
    if (t == OuterDtype::bf16) return std::abs(double(x[i])) * std::exp2(-8);
    double largest = 0;
    const size_t block = i / kInt4Block * kInt4Block;
    for (size_t j = block; j < std::min(block + kInt4Block, x.size()); j++)
        largest = std::max(largest, std::abs(double(x[j])));
    return largest / 7 * (1 + std::exp2(-7)) / 2;
}
}  // namespace

TEST_CASE("quantized: packed bytes") {
    CHECK(packed_bytes(OuterDtype::fp32, 1000) == 4000);
    CHECK(packed_bytes(OuterDtype::bf16, 1000) == 2000);
    CHECK(packed_bytes(OuterDtype::int4, 1000) == 500 + 2 * 2);
    CHECK(packed_bytes(OuterDtype::int4, 1) == 1 + 2);
    CHECK(packed_bytes(OuterDtype::int4, 0) == 0);
    const size_t n = 1 << 20;
    CHECK(double(packed_bytes(OuterDtype::fp32, n)) / double(packed_bytes(OuterDtype::int4, n)) > 7.93);
}

// Seen to fail with: a scale rounded to nearest, not up; truncation instead of rounding; the halves of a byte exchanged
// in unpack_block.
TEST_CASE("quantized: a round trip is off by half a step at most") {
    for (OuterDtype t : kTypes)
        for (size_t n : {size_t(0), size_t(1), kInt4Block - 1, kInt4Block, kInt4Block + 1, 5 * kInt4Block + 77}) {
            CAPTURE(word_of(t));
            CAPTURE(n);
            const std::vector<float> x = numbers(n, 1), y = round_trip(t, x);
            size_t n_wrong = 0;
            for (size_t i = 0; i < n; i++)
                n_wrong += !(std::abs(double(y[i]) - x[i]) <= half_step(t, x, i) * (1 + 1e-6));
            CHECK(n_wrong == 0);
        }
}

TEST_CASE("quantized: zeros stay zeros, tiny numbers stay finite, and what is not finite shows") {
    const float inf = std::numeric_limits<float>::infinity(), tiny = std::numeric_limits<float>::denorm_min();
    for (OuterDtype t : kTypes) {
        CAPTURE(word_of(t));
        for (float y : round_trip(t, std::vector<float>(700))) CHECK(y == 0);
        for (float y : round_trip(t, {tiny, -tiny, 1e-39f, 0})) CHECK(std::abs(y) < 2e-39f);
        for (float y : round_trip(t, {std::numeric_limits<float>::max(), 0})) CHECK(y >= 0);
        for (float bad : {inf, -inf, std::numeric_limits<float>::quiet_NaN()}) {
            std::vector<float> x = numbers(2 * kInt4Block, 2);
            x[5] = bad;
            const std::vector<float> y = round_trip(t, x);
            CHECK(!std::isfinite(y[5]));
            CHECK(std::isfinite(y[kInt4Block]));  // another block
        }
    }
}

// With error feedback, e_0 = 0 and e_k = (x_k + e_k-1) - sent_k, the sums of x_1..x_K and of sent_1..sent_K differ by
// e_K alone, which is half a step of x_K + e_K-1 at most.  Without it K roundings add up.
// Seen to fail with: e_k = x_k - sent_k.
TEST_CASE("quantized: error feedback keeps the sum of what was sent at the sum of what was meant") {
    constexpr size_t n = 2 * kInt4Block, K = 200;
    for (OuterDtype t : {OuterDtype::bf16, OuterDtype::int4}) {
        CAPTURE(word_of(t));
        const std::vector<float> x = numbers(n, 7);  // the same each time: plain rounding errs the same way each time
        std::vector<float> error(n), last;
        std::vector<double> sent(n), plain(n);
        for (size_t k = 0; k < K; k++) {
            last = x;
            for (size_t i = 0; i < n; i++) last[i] += error[i];
            const std::vector<float> y = round_trip(t, last), z = round_trip(t, x);
            for (size_t i = 0; i < n; i++) {
                error[i] = last[i] - y[i];
                sent[i] += y[i], plain[i] += z[i];
            }
        }
        size_t n_wrong = 0, n_plain_wrong = 0;
        for (size_t i = 0; i < n; i++) {
            // and K roundings of x + e to f32, each half an ulp of a number of at most the block's largest
            const double bound = half_step(t, last, i) * (1 + 1e-6) + double(K) * std::exp2(-24);
            n_wrong += !(std::abs(sent[i] - double(K) * x[i]) <= bound);
            n_plain_wrong += !(std::abs(plain[i] - double(K) * x[i]) <= bound);
        }
        CHECK(n_wrong == 0);
        CHECK(n_plain_wrong > n / 2);
    }
}
