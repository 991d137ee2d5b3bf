// bf16 and Buf.  Broken on purpose and seen to fail: truncation for rounding; ties away from zero; no case for NaN
// (0x7fffffff rounded up becomes -0).
#include "common/buf.h"

#include <doctest/doctest.h>

#include <cmath>

namespace {
float number(uint32_t bf16_bits) { return std::bit_cast<float>(bf16_bits << 16); }
float between(uint32_t bf16_bits) { return std::bit_cast<float>(bf16_bits << 16 | 0x8000u); }  // it and the next one
}  // namespace

TEST_CASE("bf16: every value comes back as it was") {
    size_t wrong = 0;
    for (uint32_t bits = 0; bits < 0x10000; bits++) {
        const bf16 b = std::bit_cast<bf16>(uint16_t(bits));
        const float f = float(b);
        if (std::isnan(number(bits)))
            wrong += !std::isnan(f) || !std::isnan(float(bf16(f)));
        else
            wrong += std::bit_cast<uint32_t>(f) != bits << 16 || bf16(f).bits != bits;
    }
    CHECK(wrong == 0);
}

TEST_CASE("bf16: between two neighbours the nearest is taken, half way the even one") {
    size_t wrong = 0;  // rounding is monotone, so its steps say all; above the largest number the neighbour is infinity
    for (uint32_t sign : {0x0000u, 0x8000u})
        for (uint32_t magnitude = 0; magnitude < 0x7f80; magnitude++) {
            const uint32_t low = sign | magnitude, high = low + 1;
            const float half = between(low);
            wrong += bf16(half).bits != (low % 2 == 0 ? low : high);
            wrong += bf16(std::nextafter(half, number(low))).bits != low;
            wrong += bf16(std::nextafter(half, number(high))).bits != high;
        }
    CHECK(wrong == 0);
}

TEST_CASE("bf16: no NaN turns into a number") {
    for (uint32_t bits : {0x7f800001u, 0x7f80ffffu, 0x7fffffffu, 0xff800001u, 0xffffffffu, 0x7fc00000u}) {
        CAPTURE(bits);
        CHECK(std::isnan(float(bf16(std::bit_cast<float>(bits)))));
    }
}

TEST_CASE("buf: a slice stays inside, and a dtype is not mistaken") {
    float x[5] = {0, 1, 2, 3, 4};
    const Buf b(x, 5);
    CHECK(b.n_bytes() == 20);
    CHECK(b.slice(2, 3).as<float>()[0] == 2);
    CHECK(b.slice(5, 0).count == 0);
    CHECK_THROWS_WITH_AS(b.slice(2, 4), doctest::Contains("slice [2, 2+4) of 5 elements"), Error);
    CHECK_THROWS_AS(b.slice(6, 0), Error);
    CHECK_THROWS_AS(b.slice(2, ~size_t(0)), Error);  // 2 + n would wrap
    CHECK_THROWS_WITH_AS(b.as<bf16>(), doctest::Contains("buffer holds f32, asked for bf16"), Error);
    CHECK(Buf().as<bf16>() == nullptr);
    CHECK_FALSE(bool(Buf()));
}
