// The choice of algorithms and of ways (fused or apart) for matrix products, on a nominal clock that the test sets.
// Made to fail by: the first guess kept, the slowest kept, every candidate timed to the end, the run that compares bits
// left out, a choice not looked up again, choices() without the ways, set_choices() that keeps old plans or takes
// another version's, tuning in a capture, the slower way taken; an algorithm that drops terms kept, a long product
// timed in rounds or by all candidates, a split forced where tiles do not divide K or the library's own is stream-K.
#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "common/tuning_cache.h"
#include "common/hash.h"
#include "cuda_emulator_host.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/gemm.h"
#include "kernels/owners.h"
#include "test/op_test.h"

namespace {
const Backend& k = cuda_backend();
const Target t = {&cuda_backend(), DType::bf16, "cuda bf16"};
constexpr int BT = 32, C = 16, OC = 24;
constexpr int kRestless = 6;

// A machine with the nominal clock; the destructor drops all choices and restores the former machine.
struct Clocked {
    const emulator::Machine before = emulator::machine();
    explicit Clocked(int fastest, int epilogue_us = 0) {
        k.set_choices("");
        set(fastest, epilogue_us);
        emulator::products_run().clear();
    }
    ~Clocked() {
        k.tune(false);
        k.set_choices("");
        emulator::machine() = before;
    }
    static void set(int fastest, int epilogue_us = 0) {
        emulator::machine().has_clock = true;
        emulator::machine().fastest_algorithm = fastest;
        emulator::machine().epilogue_us = epilogue_us;
    }
};

// d = a b, d in fp32 or bf16, with a K long enough for every algorithm.
struct Product {
    explicit Product(DType out = DType::f32, int K = 96)
        : a(t, DType::bf16, rounded(normal(size_t(BT) * K, 1), DType::bf16)),
          b(t, DType::bf16, rounded(normal(size_t(OC) * K, 2), DType::bf16)),
          d(t, out, poison(size_t(BT) * OC)),
          g{.d = d, .a = a, .b = b, .M = BT, .N = OC, .K = K} {}
    int run(Stream s = nullptr) {  // the algorithm's number
        cuda::gemm(g, s);
        return emulator::products_run().back();
    }
    Dev a, b, d;
    cuda::Gemm g;
};
std::string tuned(const std::function<void()>& work) {
    k.tune(true);
    work();
    return k.tune(false);
}
std::map<std::string, std::string> chosen() { return parse_choices(k.choices(), "test").by_kind; }
long count(int number) { return std::ranges::count(emulator::products_run(), number); }
}  // namespace

TEST_CASE("gemm choice: the fastest algorithm is kept; without tuning it is the library's first guess") {
    for (int fastest : {0, 1, 2, 3, 4, 7}) {
        CAPTURE(fastest);
        Clocked machine(fastest);
        Product p;
        CHECK(p.run() == 0);
        CHECK(chosen().empty());
        CHECK(tuned([&] { p.run(); }) == "");
        CHECK(chosen().size() == 1);
        Clocked::set(fastest == 2 ? 1 : 2);  // changes nothing: the choice is made
        for (int i = 0; i < 2; i++) CHECK(p.run() == fastest);
        tuned([&] { CHECK(p.run() == fastest); });
        CHECK(chosen().size() == 1);
    }
}

TEST_CASE("gemm choice: a slow candidate is dropped after its first timed run") {
    Clocked machine(0);
    tuned([] { Product().run(); });
    // Untimed; timed once; 3 rounds of 2 to fill 0.2 ms; 2 for their bits, 2 beside the unsplit guess; a call.
    CHECK(count(0) == 1 + 1 + 3 * 2 + 2 + 2 + 1);
    for (int slow : {1, 2, 3, 4, 7}) CHECK(count(slow) == 2);
    CHECK(count(5) == 0);  // adds parts in the output's type in the workspace, which is never asked for
}

TEST_CASE("gemm choice: where the library has few guesses, k is also split as it did not propose") {
    Clocked machine(0);
    emulator::machine().splits = true;
    Product p(DType::f32, 256);
    p.run();
    const Doubles guess = p.d.host();
    for (int number : {102, 208}) {
        CAPTURE(number);
        Clocked::set(number);
        k.set_choices("");
        tuned([&] { p.run(); });
        CHECK(p.run() == number);
        const Doubles now = p.d.host();
        CHECK(now != guess);
        for (size_t i = 0; i < now.size(); i++)
            CHECK(std::abs(now[i] - guess[i]) < 5e-4);  // 256 fp32 roundings of about 30
        const std::string text = k.choices();           // a split is kept like the others
        k.set_choices(text);
        CHECK(p.run() == number);
    }
    const auto tried = [&](const Product& product) {
        Clocked::set(0);
        k.set_choices("");
        emulator::products_run().clear();
        tuned([&] { cuda::gemm(product.g, nullptr); });
        return std::set<int>(emulator::products_run().begin(), emulator::products_run().end());
    };
    // Up to 16 candidates, each once: algorithm 2 splits as 0 does, and 1 and 2 have 2 and 4 parts of their own.
    CHECK(tried(p) == std::set<int>{0, 1, 2, 3, 4, 6, 7, 102, 103, 203, 104, 204, 106, 206, 108, 208});
    CHECK(count(103) == 2);
    // A tile of 256 of k does not divide these: nothing but the library's own guesses.
    CHECK(tried(Product(DType::f32, 264)) == std::set<int>{0, 1, 2, 3, 4, 6, 7});
    CHECK(tried(Product(DType::f32, 8)) == std::set<int>{0, 1, 2, 4, 7});
    emulator::machine().splits = false;
    CHECK(tried(p) == std::set<int>{0, 1, 2, 3, 4, 6, 7});
}

TEST_CASE("gemm choice: parts meet in bf16 never, in fp32 also in place") {
    Clocked machine(4);
    Product wide(DType::f32), narrow(DType::bf16);
    tuned([&] { wide.run(), narrow.run(); });
    CHECK(wide.run() == 4);
    CHECK(narrow.run() == 0);
    Clocked::set(5);
    k.set_choices("");
    tuned([&] { wide.run(), narrow.run(); });
    CHECK(wide.run() == 0);
    CHECK(narrow.run() == 0);
}

TEST_CASE("gemm choice: an algorithm that does not repeat its bits is rejected, and that is noted") {
    Clocked machine(kRestless);
    Product p;
    const std::string notes = tuned([&] { p.run(); });
    CHECK(notes ==
          "32 x 24 x 96, bf16 x bf16 -> f32, DEFAULT, aligned 16 16 16 16 0 0: an algorithm of 100.0 us is not used, "
          "it gave other bits when it was repeated\n");
    CHECK(p.run() == 0);
    // Also where the product adds to its own output, which changes from run to run with any algorithm.
    p.g.c = p.g.d;
    CHECK(tuned([&] { p.run(); }).find("-> +f32, DEFAULT") != std::string::npos);
    CHECK(p.run() == 0);
    Clocked::set(2);
    k.set_choices("");
    CHECK(tuned([&] { p.run(); }) == "");
    CHECK(p.run() == 2);
}

TEST_CASE("gemm choice: an algorithm that drops terms of k repeats its bits, and is rejected") {
    Clocked machine(2);
    emulator::machine().dropped_terms = 16;  // of 1024
    for (const DType out : {DType::f32, DType::bf16}) {
        CAPTURE(dtype_name(out));
        Product p(out, 1024);
        const std::string notes = tuned([&] { p.run(); });
        CHECK(notes.find("an algorithm of 100.0 us is not used, it gave ") != std::string::npos);
        CHECK(notes.find(" in the place of ") != std::string::npos);
        CHECK(p.run() == 0);
    }
    emulator::machine().dropped_terms = 0;
    for (const int K : {96, 1024, 16384}) {  // roundings alone reject none
        CAPTURE(K);
        Product p(DType::f32, K);
        k.set_choices("");
        CHECK(tuned([&] { p.run(); }) == "");
        CHECK(p.run() == 2);
    }
}

TEST_CASE("gemm choice: a product that takes milliseconds is timed once, and by 8 candidates at most") {
    Clocked machine(0);
    emulator::machine().splits = true;  // up to 16 candidates else
    Product p(DType::f32, 256 * 86);    // 32 x 24 x 22016 is more than 256^3: 20 ms on the nominal clock
    tuned([&] { p.run(); });
    const std::set<int> tried(emulator::products_run().begin(), emulator::products_run().end());
    CHECK(tried == std::set<int>{0, 1, 2, 3, 4, 6, 7, 102});
    CHECK(count(0) == 1 + 1 + 2 + 2 + 1);  // untimed; timed; 2 for their bits, 2 beside the unsplit guess; a call
    for (int other : {1, 2, 3, 4, 6, 7, 102}) CHECK(count(other) == 2);
}

TEST_CASE("gemm choice: what was chosen computes the same bits wherever it is set") {
    Clocked machine(2);
    Product p;
    p.run();
    const Doubles guess = p.d.host();
    tuned([&] { p.run(); });
    const Doubles best = p.d.host();
    CHECK(best != guess);
    const std::string text = k.choices();

    CHECK(k.set_choices("") == "");
    CHECK(chosen().empty());
    p.run();
    CHECK(p.d.host() == guess);
    CHECK(k.set_choices(text) == "");
    CHECK(chosen().empty());  // none is in use yet
    emulator::products_run().clear();
    Clocked::set(0);
    CHECK(tuned([&] { p.run(); }) == "");
    CHECK(emulator::products_run() == std::vector<int>{2});  // and nothing was timed
    CHECK(p.d.host() == best);
    CHECK(k.choices() == text);
}

TEST_CASE("gemm choice: choices for another GPU, another version or in a damaged text change nothing") {
    Clocked machine(2);
    Product p;
    tuned([&] { p.run(); });
    const std::string text = k.choices();
    const emulator::Machine here = emulator::machine();
    const std::string was =
        "made for emulated GPU, compute capability 9.0, 4 multiprocessors, cuBLASLt 130000 with 32 MiB; this is "
        "emulated GPU, compute capability ";
    emulator::machine().cublaslt_version = 130100;
    CHECK(k.set_choices(text) == was + "9.0, 4 multiprocessors, cuBLASLt 130100 with 32 MiB");
    emulator::machine() = here;
    emulator::machine().capability = 80;
    CHECK(k.set_choices(text) == was + "8.0, 4 multiprocessors, cuBLASLt 130000 with 32 MiB");
    emulator::machine() = here;
    std::string damaged = text;
    damaged[damaged.find(" = ") + 5] ^= 1;
    CHECK_THROWS_WITH_AS(k.set_choices(damaged), doctest::Contains("does not have its hash"), Error);
    CHECK(p.run() == 2);
    CHECK(k.choices() == text);
}

TEST_CASE("gemm choice: a choice that the library refuses is noted, and chosen anew or left to the first guess") {
    Clocked machine(2);
    Product p;
    tuned([&] { p.run(); });
    for (const std::string& wrong :
         {std::string("apart"), std::string("12"), std::string(128, 'x'), std::string(128, '1')}) {
        CAPTURE(wrong);
        Choices c = parse_choices(k.choices(), "test");
        REQUIRE(c.by_kind.size() == 1);
        c.by_kind.begin()->second = wrong;
        const std::string kind = c.by_kind.begin()->first;
        k.set_choices(to_text(c));
        CHECK(p.run() == 0);
        CHECK(chosen().empty());
        k.set_choices(to_text(c));
        k.tune(false);
        CHECK(tuned([&] { p.run(); }).starts_with(kind + ": the choice that was kept cannot be used: "));
        CHECK(p.run() == 2);
    }
}

TEST_CASE("gemm choice: a captured stream never tunes, and its kind may be tuned later") {
    Clocked machine(2);
    Product p;
    StreamOwner s(k);
    k.tune(true);
    cudaGraph_t graph = nullptr;
    k.take_workspace(s.get());  // none can be allocated in a capture
    REQUIRE(cudaStreamBeginCapture(s.get(), cudaStreamCaptureModeThreadLocal) == cudaSuccess);
    CHECK(p.run(s.get()) == 0);
    REQUIRE(cudaStreamEndCapture(s.get(), &graph) == cudaSuccess);
    cudaGraphDestroy(graph);
    CHECK(emulator::products_run().size() == 1);
    p.run(s.get());
    CHECK(p.run(s.get()) == 2);
}

namespace {
struct Layer {  // runs every kind of product of linear.cu
    explicit Layer(const Target& target = ::t) : t(target) {}
    const Target t;
    Dev x{t, t.real, rounded(normal(size_t(BT) * C, 3), t.real)},
        w{t, t.real, rounded(normal(size_t(C) * OC, 4), t.real)};
    Dev b{t, t.real, rounded(normal(OC, 5), t.real)}, pre{t, t.real, rounded(normal(size_t(BT) * C, 6), t.real)};
    Dev y{t, t.real, poison(size_t(BT) * OC)}, y_pre{t, t.real, poison(size_t(BT) * OC)};
    Dev gelu{t, t.real, poison(size_t(BT) * OC)}, dx{t, t.real, poison(size_t(BT) * C)};
    Dev dw{t, DType::f32, poison(size_t(C) * OC)}, db{t, DType::f32, poison(OC)};
    Dev dy{t, t.real, rounded(normal(size_t(BT) * OC, 7), t.real)};
    void run() {
        k.linear_forward({.y = y, .x = x, .w = w, .b = b, .BT = BT, .C = C, .OC = OC}, nullptr);
        k.linear_forward({.y = gelu, .pre_gelu = y_pre, .x = x, .w = w, .b = b, .BT = BT, .C = C, .OC = OC}, nullptr);
        k.linear_backward(
            {.dx = dx, .dw = dw, .db = db, .dy = dy, .x = x, .w = w, .pre_gelu = pre, .BT = BT, .C = C, .OC = OC},
            nullptr);
    }
    std::vector<Doubles> outputs() {
        run();
        return {y.host(), y_pre.host(), gelu.host(), dx.host(), dw.host(), db.host()};
    }
};
// "BIAS GELU_AUX_BIAS ...": the epilogues among the choices that are fused or, with `apart`, not fused.
std::string epilogues(bool apart) {
    std::vector<std::string> names;
    for (const auto& [kind, choice] : chosen()) {
        const size_t end = kind.find(", aligned"), begin = kind.rfind(' ', end) + 1;
        const std::string name = kind.substr(begin, end - begin);
        if (name != "DEFAULT" && (choice == "apart") == apart) names.push_back(name);
    }
    std::ranges::sort(names);
    return fmt::format("{}", fmt::join(names, " "));
}
}  // namespace

TEST_CASE("gemm choice: the faster way is taken, fused or apart, and is kept like an algorithm") {
    constexpr const char* kAll = "BGRADA BIAS DGELU GELU_AUX_BIAS";
    Clocked machine(0);
    Layer layer;
    const std::vector<Doubles> untuned = layer.outputs();
    // A kernel takes 10 us.  Column sums of so few rows take one kernel, bias and GELU together two: fusing pays when
    // the epilogue takes less.
    for (const auto& [epilogue_us, fused] : {std::pair{9, true}, {21, false}}) {
        CAPTURE(epilogue_us);
        Clocked::set(0, epilogue_us);
        k.set_choices("");
        tuned([&] { layer.run(); });
        CHECK(epilogues(false) == (fused ? kAll : ""));
        CHECK(epilogues(true) == (fused ? "" : kAll));
        const std::vector<Doubles> now = layer.outputs();
        for (size_t i = 0; i < now.size(); i++) {
            CAPTURE(i);
            // bf16: the way apart rounds once more, by 2^-8 of numbers up to 40
            CHECK(worst(now[i], untuned[i], 0.16, 0.02) <= 1);
        }
        const std::string text = k.choices();
        k.set_choices("");
        k.set_choices(text);
        Clocked::set(3, fused ? 1000 : 0);
        emulator::products_run().clear();
        tuned([&] { CHECK(layer.outputs() == now); });
        CHECK(emulator::products_run().size() == 4);  // nothing was timed
        CHECK(k.choices() == text);
    }
}

TEST_CASE("gemm choice: sums are fused only where that was chosen") {
    Clocked machine(0);
    Layer layer({&cuda_backend(), DType::f32, "cuda f32"});  // sums of so few bf16 would be exact in any order
    layer.run();
    const Doubles apart = layer.db.host();
    CHECK(chosen().empty());
    Clocked::set(2);
    tuned([&] { layer.run(); });
    CHECK(epilogues(false).starts_with("BGRADA"));
    layer.run();
    CHECK(layer.db.host() != apart);  // summed in the product's order, in four parts
    const Doubles want = [&] {
        Doubles sum(OC);
        const Doubles dy = layer.dy.host();
        for (size_t i = 0; i < dy.size(); i++) sum[i % OC] += dy[i];
        return sum;
    }();
    CHECK(worst(layer.db.host(), want, 1e-5, 0) <= 1);
}

TEST_CASE("gemm choice: the workspace follows the device's memory") {
    constexpr size_t kMiB = size_t(1) << 20;
    CHECK(cuda::gemm_workspace_size(1) == 32 * kMiB);
    CHECK(cuda::gemm_workspace_size(size_t(24) << 30) == 96 * kMiB);
    CHECK(cuda::gemm_workspace_size((size_t(24) << 30) + 300 * kMiB) == 97 * kMiB);
    CHECK(cuda::gemm_workspace_size(size_t(141) << 30) == 256 * kMiB);
    CHECK(cuda::gemm_workspace(nullptr).count == 32 * kMiB);
}
