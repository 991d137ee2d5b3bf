// Whole kernels on the emulator: right numbers in every order, and the same bits whatever the schedule.
// Made to fail by: an mma whose accumulator is not added to, ldmatrix without its transposition, a barrier that lets
// threads pass before all have come.
#include <cstring>

#include "emulator/test/emulated.h"

namespace {
using namespace emulated;
using emulator::Order;

struct Case {
    const char* name;
    double tolerance;
    Result (*run)();
};
// Sums of up to 400 products of normal numbers in fp32 in another order: below 1e-3.  Stores in bf16: 2^-8 of values
// that reach 12 (layernorm) and 4 (flash, whose probabilities are rounded as well).
const Case kCases[] = {
    {"vector_add", 0, [] { return vector_add(1000); }},
    {"block_sum", 1e-3, block_sum<Defect::none>},
    {"layernorm", 0.06, layernorm},
    {"gemm", 1e-3, [] { return gemm<Defect::none>(64, 128, 96); }},
    {"gemm, ragged", 1e-3, [] { return gemm<Defect::none>(100, 72, 64); }},
    {"flash", 0.02, [] { return flash<Defect::none>(2, 128); }},
    {"flash, ragged", 0.02, [] { return flash<Defect::none>(1, 100); }},
    {"hopper gemm", 1e-3, [] { return hopper_gemm<0, false, false, Defect::none>(64, 256, 192); }},
    {"hopper gemm, b (K, N)", 1e-3, [] { return hopper_gemm<1, false, false, Defect::none>(64, 128, 192); }},
    {"hopper gemm, a in registers", 1e-3, [] { return hopper_gemm<0, true, false, Defect::none>(64, 128, 128); }},
    {"hopper gemm, all, added", 1e-3, [] { return hopper_gemm<1, true, true, Defect::none>(64, 256, 128); }},
    {"hopper gemm, clipped", 1e-3, [] { return hopper_gemm<0, false, false, Defect::none>(72, 136, 128); }},
};

void expect_no_reports() {
    for (const emulator::Report& r : emulator::take_reports()) FAIL_CHECK(r.text);
}
}  // namespace

TEST_CASE("kernels give the reference's numbers in every order") {
    for (const Case& c : kCases) {
        for (Order order : {Order::Sequential, Order::Reverse, Order::Random}) {
            CAPTURE(c.name);
            CAPTURE(int(order));
            const WithConfig config(order);
            CHECK(c.run().error() <= c.tolerance);
            expect_no_reports();
        }
    }
}

TEST_CASE("kernels give the same bits under 20 random schedules") {
    for (const Case& c : kCases) {
        CAPTURE(c.name);
        std::vector<float> first;
        for (uint64_t seed = 1; seed <= 20; seed++) {
            CAPTURE(seed);
            const WithConfig config(Order::Random, seed);
            const std::vector<float> got = c.run().got;
            expect_no_reports();
            if (first.empty()) first = got;
            CHECK(std::memcmp(got.data(), first.data(), got.size() * sizeof(float)) == 0);
        }
    }
}

TEST_CASE("kernels give the same bits on several OS threads") {
    for (const Case& c : kCases) {
        CAPTURE(c.name);
        const WithConfig config;
        const std::vector<float> one = c.run().got;
        emulator::config().threads = 3;
        const std::vector<float> three = c.run().got;
        expect_no_reports();
        CHECK(std::memcmp(one.data(), three.data(), one.size() * sizeof(float)) == 0);
    }
}

#if SIMT_HOOKED
TEST_CASE("a thread that yields at memory accesses changes nothing") {
    for (const Case& c : kCases) {
        CAPTURE(c.name);
        const WithConfig config(Order::Random, 7);
        emulator::config().preempt = 50;
        CHECK(c.run().error() <= c.tolerance);
        expect_no_reports();
    }
}
#endif
