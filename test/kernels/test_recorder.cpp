// The recording backend, and the counted cost of the recorded ops.  test/system/test_performance_page.py compares the
// cost of a whole step with a second count in Python.
// Broken on purpose and seen to fail: a recording that goes on after its scope; the residual of a product not counted.
#include "kernels/recorder.h"

#include <thread>

#include "kernels/cost.h"
#include "kernels/owners.h"
#include "test/op_test.h"

namespace {
const Backend& k = recorder_backend();

Buf buffer(size_t n, DType t = DType::f32) { return {k.memory.alloc(n * dtype_bytes(t)), n, t}; }
}  // namespace

TEST_CASE("recorder: a recording has the ops of its scope and thread, in order, with their arguments") {
    const Buf x = buffer(12), y = buffer(12), one = buffer(1), parts = buffer(1);
    k.add({.y = y, .x = x}, nullptr);  // before
    {
        const Recording outer;
        k.cast({.y = y, .x = x}, nullptr);
        {
            const Recording inner;
            k.grad_norm({.norm = one, .clip = one, .grad = x, .scratch = parts, .max_norm = 2}, nullptr);
            std::thread([&] { k.add({.y = y, .x = x}, nullptr); }).join();
            REQUIRE(inner.ops().size() == 1);
            CHECK(std::get<GradNorm>(inner.ops()[0]).max_norm == 2);
        }
        k.add({.y = x, .x = y}, nullptr);
        REQUIRE(outer.ops().size() == 2);
        CHECK(std::get<Cast>(outer.ops()[0]).y.data == y.data);
        CHECK(std::get<Add>(outer.ops()[1]).y.data == x.data);
    }
    k.add({.y = y, .x = x}, nullptr);  // after
    CHECK(Recording().ops().empty());
}

TEST_CASE("recorder: its buffers are apart, of any size, and read as zeros; sizes are checked") {
    const size_t huge = size_t(1) << 44;
    const Buf a = buffer(huge), b = buffer(huge);
    CHECK(static_cast<char*>(b.data) - static_cast<char*>(a.data) >= int64_t(a.n_bytes()));
    StreamOwner s(k);
    k.zero(a.data, a.n_bytes(), s.get());
    k.copy(b.data, a.data, a.n_bytes(), s.get());
    int number = 7;
    k.download(&number, b.data, sizeof number, s.get());
    k.synchronize(s.get());
    CHECK(number == 0);
    k.memory.free(a.data);
    CHECK_THROWS_WITH_AS(k.add({.y = a, .x = buffer(3)}, s.get()), doctest::Contains("add.y holds"), Error);
}

TEST_CASE("recorder: a recorded op computes where it is given to another backend") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        Dev x(t, DType::f32, {1, 2, 3}), y(t, DType::f32, {10, 20, 30});
        const Recording recording;
        k.add({.y = y, .x = x}, nullptr);
        CHECK(y.host() == Doubles{10, 20, 30});
        for (const AnyOp& op : recording.ops()) give(*t.k, op, nullptr);
        CHECK(y.host() == Doubles{11, 22, 33});
    }
}

TEST_CASE("cost: bytes and flop of products, gradients and optimizers") {
    const int BT = 6, C = 4, OC = 8;
    const Buf x = buffer(24, DType::bf16), y = buffer(48, DType::bf16), w = buffer(32, DType::bf16), dw = buffer(32);
    const auto check = [](const Cost& c, double n_bytes, double flop) {
        CHECK(c.n_bytes == n_bytes);
        CHECK(c.flop == flop);
    };
    const double flop = 2 * 6 * 4 * 8;
    Linear l = {.y = y, .x = x, .w = w, .BT = BT, .C = C, .OC = OC};
    check(cost(l), 2 * (24 + 48 + 32), flop);
    l.residual = y;
    check(cost(l), 2 * (24 + 2 * 48 + 32), flop);
    LinearGrad g = {.dw = dw, .dy = y, .x = x, .w = w, .BT = BT, .C = C, .OC = OC};
    check(cost(g), 2 * (24 + 48) + 4 * 32, flop);
    g.accumulate = true;
    check(cost(g), 2 * (24 + 48) + 2 * 4 * 32, flop);
    g.dx = g.pre_gelu = x;
    check(cost(g), 2 * (24 + 48) + 2 * 4 * 32 + 2 * (24 + 48 + 32 + 24), 2 * flop);
    check(cost(AnyOp(g)), cost(g).n_bytes, cost(g).flop);

    const Buf n = buffer(100);
    OptimizerUpdate u = {.param = n, .m = n, .v = n, .grad = n};
    check(cost(u), 28 * 100, 0);
    u.copy = buffer(100, DType::bf16);
    check(cost(u), 30 * 100, 0);
    u.v = {};
    check(cost(u), 22 * 100, 0);
}
