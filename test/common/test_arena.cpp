// Arena: places, alignment, zeroing, and a table whose rows add up.
#include <doctest/doctest.h>

#include <cstdlib>
#include <cstring>

#include "common/arena.h"

namespace {
int live = 0;
const Allocator kMalloc = {[](size_t n) { return live++, std::aligned_alloc(512, n); },
                           [](void* p) { live--, std::free(p); }};
void zero(void* p, size_t n) { std::memset(p, 0, n); }
}  // namespace

// Seen to fail with: tensors not rounded up to kAlign.
TEST_CASE("arena: tensors are disjoint, aligned, zeroed, and the memory goes back") {
    {
        Arena a("weights");
        Buf w, b, none;
        a.add(w, "h.0.w", 100, DType::f32);
        a.add(b, "h.1.w", 7, DType::f32);
        a.add(none, "empty", 0, DType::f32);
        CHECK(a.n_bytes() == 512 + 512);
        CHECK(!w);
        a.allocate(kMalloc, zero);
        CHECK(live == 1);
        CHECK(w.count == 100);
        CHECK(reinterpret_cast<uintptr_t>(b.data) % Arena::kAlign == 0);
        CHECK(static_cast<char*>(b.data) - static_cast<char*>(w.data) == 512);
        for (size_t i = 0; i < w.count; i++) CHECK(w.as<float>()[i] == 0);
        CHECK(a.flat(DType::f32).count == 256);
        CHECK_THROWS_AS(a.flat(DType::bf16), Error);
        CHECK_THROWS_AS(a.add(w, "late", 1, DType::f32), Error);
        const Arena moved(std::move(a));
        CHECK(live == 1);
    }
    CHECK(live == 0);
}

TEST_CASE("arena: the table folds layers and adds up") {
    Arena a("weights");
    Buf x[4];
    a.add(x[0], "wte", 1024, DType::f32);
    a.add(x[1], "h.0.w", 256, DType::f32);
    a.add(x[2], "h.11.w", 256, DType::f32);
    a.add(x[3], "h.0.b", 128, DType::bf16);
    const std::string table = a.table();
    CHECK(a.n_bytes() == 4096 + 1024 + 1024 + 512);  // the last is padded
    CHECK(table.find("weights: 6.50 KiB") == 0);
    CHECK(table.find("h.*.w") != std::string::npos);
    CHECK(table.find("2 x          256 =   2.00 KiB") != std::string::npos);
    CHECK(table.find("1 x          128 =      256 B") != std::string::npos);
}

TEST_CASE("human_bytes") {
    CHECK(human_bytes(0) == "0 B");
    CHECK(human_bytes(1023) == "1023 B");
    CHECK(human_bytes(1536) == "1.50 KiB");
    CHECK(human_bytes(size_t(141) << 30) == "141 GiB");
}
