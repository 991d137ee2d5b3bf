// The table and the memory of every backend.
#include <cstring>

#include "test/cpu_check.h"

TEST_CASE("backend: no field of the table is null") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        void* field[sizeof(Backend) / sizeof(void*)];  // every field is a pointer
        std::memcpy(field, t.k, sizeof(field));
        for (size_t i = 0; i < std::size(field); i++) {
            CAPTURE(i);
            CHECK(field[i] != nullptr);
        }
    }
}

TEST_CASE("backend: memory is aligned, moves there and back, and can be cleared") {
    for (const Target& t : targets())
        for (size_t n : {size_t(0), size_t(1), size_t(77), (size_t(9) << 20) + 5}) {
            CAPTURE(t.name);
            CAPTURE(n);
            void* p = t.k->memory.alloc(n);
            REQUIRE(p != nullptr);
            CHECK(reinterpret_cast<uintptr_t>(p) % 64 == 0);
            std::vector<char> sent(n), got(n);
            for (size_t i = 0; i < n; i++) sent[i] = char(i * 7 + 1);
            t.k->upload(p, sent.data(), n, nullptr);
            t.k->download(got.data(), p, n, nullptr);
            t.k->synchronize(nullptr);
            CHECK(got == sent);
            t.k->zero(p, n);
            t.k->download(got.data(), p, n, nullptr);
            t.k->synchronize(nullptr);
            CHECK(got == std::vector<char>(n));
            t.k->memory.free(p);
        }
}

TEST_CASE("backend: no memory is an error that says how much was asked for") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        const size_t n = size_t(1) << 63;
        try {
            t.k->memory.free(t.k->memory.alloc(n));
            FAIL("allocated 2^63 bytes");
        } catch (const Error& e) {
            CHECK(e.code == Exit::memory);
            CHECK(std::string(e.what()).find("9223372036854775808") != std::string::npos);
        }
    }
}

TEST_CASE("backend: the CPU refuses a dtype it does not compute in, as a mistake in the config") {
    const Target t = reference();
    Dev x(t, DType::bf16, Doubles(4)), w(t, DType::bf16, Doubles(4)), stat(t, DType::f32, Doubles(1));
    try {
        t.k->layernorm_forward({.y = x, .mean = stat, .rstd = stat, .x = x, .w = w, .b = {}, .BT = 1, .C = 4}, nullptr);
        FAIL("computed in bf16");
    } catch (const Error& e) {
        CHECK(e.code == Exit::usage);
        CHECK(std::string(e.what()).find("fp32, not bf16") != std::string::npos);
    }
}

TEST_CASE("backend: buffers of different dtypes in one call are refused") {
    const Target t = reference();
    Dev x(t, DType::f32, Doubles(4)), w(t, DType::f32, Doubles(4)), stat(t, DType::f64, Doubles(1));
    CHECK_THROWS_WITH_AS(
        t.k->layernorm_forward({.y = x, .mean = stat, .rstd = stat, .x = x, .w = w, .b = {}, .BT = 1, .C = 4}, nullptr),
        doctest::Contains("holds f64"), Error);
}
