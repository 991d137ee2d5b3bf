// Every backend's table of functions, memory, streams and marks.  emulator/test/test_cuda_backend.cpp has the cases
// that need an emulated device: late streams, a broken kernel.
#include <cstddef>
#include <cstring>

#include "kernels/owners.h"
#include "kernels/recorder.h"
#include "test/cpu_check.h"

TEST_CASE("backend: no field of the table is null") {
    std::vector<Target> all = targets();
    all.push_back({&recorder_backend(), DType::f32, "recorder"});
    for (const Target& t : all) {
        CAPTURE(t.name);
        void* field[sizeof(Backend) / sizeof(void*)];  // every field but one is a pointer
        std::memcpy(field, t.k, sizeof(field));
        for (size_t i = 0; i < std::size(field); i++) {
            if (i == offsetof(Backend, host_addressable) / sizeof(void*)) continue;
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
            t.k->zero(p, n, nullptr);
            t.k->download(got.data(), p, n, nullptr);
            t.k->synchronize(nullptr);
            CHECK(got == std::vector<char>(n));
            t.k->memory.free(p);
        }
}

TEST_CASE("backend: pinned memory goes there and back on a stream, and a pageable source may change after the call") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        StreamOwner s(*t.k);
        MarkOwner done(*t.k);
        Dev to(t, DType::i32, Doubles(1000)), other(t, DType::i32, Doubles(3));
        HostBuffer host(*t.k, 4000);
        for (int i = 0; i < 1000; i++) host.as<int>()[i] = i * i;
        std::vector<int> pageable{7, 8, 9};
        t.k->upload(Buf(to).data, host.as<void>(), 4000, s.get());
        t.k->upload(Buf(other).data, pageable.data(), 12, s.get());
        pageable = {0, 0, 0};
        t.k->set_mark(done.get(), s.get());
        t.k->wait_mark(done.get());
        for (int i = 0; i < 1000; i++) host.as<int>()[i] = -1;
        t.k->download(host.as<void>(), Buf(to).data, 4000, s.get());
        t.k->synchronize(s.get());
        for (int i = 0; i < 1000; i++) REQUIRE(host.as<int>()[i] == i * i);
        CHECK(other.host() == Doubles{7, 8, 9});
    }
}

TEST_CASE("backend: marks stand in the order of their stream, time does not run backwards") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        StreamOwner s(*t.k);
        MarkOwner start(*t.k), end(*t.k), never(*t.k);
        t.k->wait_mark(never.get());  // returns at once
        Dev x(t, DType::i32, Doubles(1000));
        for (int round = 0; round < 2; round++) {  // a mark that is set again forgets its earlier place
            t.k->set_mark(start.get(), s.get());
            t.k->zero(Buf(x).data, Buf(x).n_bytes(), s.get());
            t.k->set_mark(end.get(), s.get());
            t.k->wait_mark(end.get());
            const double ms = t.k->ms_between(start.get(), end.get());
            CHECK(ms >= 0);
            CHECK(ms < 60e3);
            CHECK(t.k->ms_between(end.get(), end.get()) == 0);
        }
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
            CHECK(std::string(e.what()).find("train.micro_batch_size") != std::string::npos);
        }
        // It is over with that: the next work is done.
        Dev x(t, DType::f32, Doubles{1, 2, 3}), y(t, DType::f32, Doubles{1, 1, 1});
        t.k->add({.y = y, .x = x}, nullptr);
        CHECK(y.host() == Doubles{2, 3, 4});
    }
}

TEST_CASE("backend: no pinned memory is an error too") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        try {
            t.k->host_memory.free(t.k->host_memory.alloc(size_t(1) << 63));
            FAIL("allocated 2^63 bytes");
        } catch (const Error& e) { CHECK(e.code == Exit::memory); }
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
