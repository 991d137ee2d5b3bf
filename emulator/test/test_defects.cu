// Kernels that are broken on purpose: every defect is seen, in the race build in every run, and its place is reported.
// Made to fail by: each check of sync.cpp, async.cpp and race.cpp left out in turn.
#include <functional>

#include "emulator/test/emulated.h"

namespace {
using namespace emulated;
using emulator::Order;

enum class Seen {
    always,      // a report in every build and order
    race_check,  // a report in every run of the race build; in other builds none, or by luck
    numbers      // like race_check; in other builds random order shows the defect by a report or wrong numbers
};
struct Expected {
    Seen seen;
    const char* kinds;  // of reports that may appear; empty: wrong numbers are enough in the race build, too
};

bool has_coordinates(const std::string& text) {
    if (text.find("block (") == std::string::npos) return false;
    return text.find("thread") != std::string::npos || text.find("wgmma of warp") != std::string::npos;
}

void check_reports(const std::vector<emulator::Report>& reports, const Expected& expected) {
    REQUIRE_FALSE(reports.empty());
    const emulator::Report& r = reports[0];
    CAPTURE(r.text);
    CHECK(std::string(expected.kinds).find(r.kind) != std::string::npos);
    CHECK(has_coordinates(r.text));
    if (r.kind != "racecheck") return;
    const auto names_both_places = [&](const char* file) { return r.text.find(file) != r.text.rfind(file); };
    CHECK((names_both_places("kernels.cuh:") || names_both_places("test_defects.cu:")));
}

// run() returns the error of its numbers.
void expect_defect(const char* name, const Expected& expected, const std::function<double()>& run,
                   double tolerance = 0) {
    CAPTURE(name);
    struct Schedule {
        Order order;
        uint64_t seed;
    };
    const Schedule schedules[] = {{Order::Sequential, 1}, {Order::Reverse, 1}, {Order::Random, 1},
                                  {Order::Random, 2},     {Order::Random, 3},  {Order::Random, 4}};
    for (const Schedule& s : schedules) {
        CAPTURE(int(s.order));
        CAPTURE(s.seed);
        const WithConfig config(s.order, s.seed);
        const double error = run();
        const auto reports = emulator::take_reports();
        const bool must_report = expected.seen == Seen::always || (SIMT_HOOKED && *expected.kinds);
        if (must_report)
            check_reports(reports, expected);
        else if (s.order == Order::Random && (SIMT_HOOKED || expected.seen == Seen::numbers))
            CHECK((!reports.empty() || !(error <= tolerance)));
    }
}
void expect_clean(const char* name, const std::function<double()>& run) {
    CAPTURE(name);
    for (Order order : {Order::Sequential, Order::Reverse, Order::Random}) {
        const WithConfig config(order);
        run();
        for (const emulator::Report& r : emulator::take_reports()) FAIL_CHECK(r.text);
    }
}

// One launch of a small kernel over 64 floats of 1.
template <class... P, class... A>
std::function<double()> over_ones(void (*kernel)(P...), dim3 grid, dim3 block, A... arguments) {
    return [=] {
        Array<float> values(std::vector<float>(64, 1.0f));
        run(kernel, grid, block, 0, values.data(), arguments...);
        return 0.0;
    };
}

// ---- warps, barriers, masks ----
__global__ void divergent_warp_kernel(float* out) {
    if (threadIdx.x < 16)
        out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    else
        out[threadIdx.x] = float(__ballot_sync(0xffffffffu, 1));
}
__global__ void partial_mask_kernel(float* out) {
    if (threadIdx.x < 7) out[threadIdx.x] = __shfl_sync(0x3fu, 1.0f, 0);
}
__global__ void lane_outside_mask_kernel(float* out) {
    out[threadIdx.x] = __shfl_sync(0xffffu << threadIdx.x / 16 * 16, 1.0f, 20);
}
__global__ void exited_lane_kernel(float* out) {
    if (threadIdx.x == 3) return;
    __syncwarp();
    out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
}
__global__ void two_barriers_kernel(float* out) {  // each half waits at a barrier of its own
    SIMT_SHARED(float, s, [64]);
    s[threadIdx.x] = 1.0f;
    if (threadIdx.x < 32) {
        __syncthreads();
        out[threadIdx.x] = s[threadIdx.x + 32];
    } else {
        __syncthreads();
        out[threadIdx.x] = s[threadIdx.x - 32] + 1.0f;
    }
}
__global__ void one_barrier_more_kernel(float* out) {
    const unsigned t = threadIdx.y * blockDim.x + threadIdx.x;
    if (t < 32) __syncthreads();
    ptx::bar_sync(1, 64);
    out[t] = 1.0f;
}
__global__ void odd_count_kernel(float*) { ptx::bar_sync(1, 40); }
__global__ void spin_kernel(float* out) {
    while (atomicAdd(out, 0.0f) != 2.0f) __nanosleep(20);
}
template <int REGISTERS>
__global__ void share_registers_kernel(float*) {  // 384 threads of 168: 64,512
    if (threadIdx.x < 128)
        ptx::setmaxnreg_dec<24>();
    else
        ptx::setmaxnreg_inc<REGISTERS>();
}
TEST_CASE("misuse of warps and barriers") {
    const Expected synccheck{Seen::always, "synccheck"};
    expect_defect("lanes of a warp in different collectives", synccheck, over_ones(divergent_warp_kernel, 1, 32));
    expect_defect("a lane that its mask does not name", synccheck, over_ones(partial_mask_kernel, 1, 32));
    expect_defect("a shuffle from a lane outside the mask", synccheck, over_ones(lane_outside_mask_kernel, 1, 32));
    expect_defect("a mask that names an exited lane", synccheck, over_ones(exited_lane_kernel, 1, 32));
    expect_defect("a count that is no multiple of 32", synccheck, over_ones(odd_count_kernel, 1, 64));
    expect_defect("some threads wait at one more barrier", {Seen::always, "deadlock"},
                  over_ones(one_barrier_more_kernel, 1, 64));
    expect_defect("more registers than a block has", {Seen::always, "deadlock"},
                  over_ones(share_registers_kernel<248>, 1, 384));
    expect_clean("as many registers as a block has", over_ones(share_registers_kernel<240>, 1, 384));
    expect_defect("two halves at different __syncthreads", {Seen::race_check, "synccheck"},
                  over_ones(two_barriers_kernel, 1, 64));
}
TEST_CASE("a deadlock's report names who waits where") {
    const WithConfig config;
    over_ones(one_barrier_more_kernel, dim3(1, 2), dim3(8, 8))();
    const auto reports = emulator::take_reports();
    REQUIRE(reports.size() == 1);
    CAPTURE(reports[0].text);
    CHECK(reports[0].kind == "deadlock");
    for (const char* part :
         {"block (0,0,0)", "32 threads wait in __syncthreads [", "test_defects.cu:", "]: (0,0,0) .. (7,3,0)",
          "32 threads wait in a named barrier [", "]: (0,4,0) .. (7,7,0)", "0 of 64 have exited"})
        CHECK(reports[0].text.find(part) != std::string::npos);
}
TEST_CASE("a thread that spins for ever is a deadlock") {
    const WithConfig config;
    over_ones(spin_kernel, 1, 1)();
    const auto reports = emulator::take_reports();
    REQUIRE(reports.size() == 1);
    CHECK(reports[0].kind == "deadlock");
    CHECK(has_coordinates(reports[0].text));
}
TEST_CASE("a failed launch names the kernel, its shape and the schedule") {
    const WithConfig config(Order::Random, 77);
    emulator::config().fatal = true;
    std::string text;
    try {
        over_ones(odd_count_kernel, 2, 64)();
    } catch (const emulator::Error& e) { text = e.what(); }
    CAPTURE(text);
    for (const char* part : {"kernel odd_count_kernel, grid (2,1,1), block (64,1,1)", "KILN_EMULATOR_ORDER=random",
                             "KILN_EMULATOR_SEED=77", "synccheck in block (0,0,0), thread ("})
        CHECK(text.find(part) != std::string::npos);
}

// ---- memory ----
__global__ void misaligned_kernel(float* p, int offset) { simt::st_vec(p + 8, simt::ld_vec<float4>(p + offset)); }
TEST_CASE("misaligned vectors") {
    expect_defect("float4 at +4 bytes", {Seen::always, "memcheck"}, over_ones(misaligned_kernel, 1, 1, 1));
    expect_clean("float4 at +16 bytes", over_ones(misaligned_kernel, 1, 1, 4));
}
#ifndef __SANITIZE_ADDRESS__  // ASan ends the program at the first of these errors
__global__ void past_the_end_kernel(float* p) { p[threadIdx.x + 40] = 2.0f; }
TEST_CASE("out of bounds") {
    const Expected memcheck{Seen::always, "memcheck"};
    expect_defect("cp.async to shared memory, a row too far", memcheck,
                  [] { return gemm<Defect::shared_off_by_a_row>(64, 64, 64).error(); });
    expect_defect("cp.async from global memory, past the end", memcheck,
                  [] { return gemm<Defect::no_bounds_check>(60, 64, 64).error(); });
}
TEST_CASE("a store past the end of a device buffer is seen in every build") {
    const WithConfig config;
    over_ones(past_the_end_kernel, 1, 32)();
    const auto reports = emulator::take_reports();
    REQUIRE_FALSE(reports.empty());
    CHECK(reports[0].kind == "memcheck");
}
#endif

// ---- pipelines ----
TEST_CASE("missing barriers and waits in the kernels of kiln's kinds") {
    const Expected race{Seen::race_check, "racecheck initcheck"}, race_or_numbers{Seen::numbers, "racecheck initcheck"};
    expect_defect(
        "block_sum: no barrier", race_or_numbers, [] { return block_sum<Defect::no_barrier>().error(); }, 1e-3);
    expect_defect(
        "gemm: no barrier before the refill", race, [] { return gemm<Defect::no_barrier>(64, 64, 128).error(); }, 1e-3);
    expect_defect(
        "gemm: no cp.async wait", race_or_numbers, [] { return gemm<Defect::no_copy_wait>(64, 64, 128).error(); },
        1e-3);
    expect_defect(
        "flash: K and V written early", race_or_numbers, [] { return flash<Defect::no_barrier>(1, 192).error(); },
        0.02);
}
TEST_CASE("missing waits and fences in Hopper's pipeline") {
    const auto with = []<Defect DEFECT>(int K) {
        return hopper_gemm<0, false, false, DEFECT>(64, 128, uint64_t(K)).error();
    };
    expect_defect(
        "consumer does not wait", {Seen::race_check, "racecheck initcheck"},
        [&] { return with.operator()<Defect::no_full_wait>(384); }, 1e-3);
    expect_defect(
        "producer does not wait", {Seen::numbers, "racecheck synccheck"},
        [&] { return with.operator()<Defect::no_empty_wait>(384); }, 1e-3);
    expect_defect(
        "no fence.proxy.async", {Seen::race_check, "proxycheck"},
        [&] { return with.operator()<Defect::no_proxy_fence>(128); }, 1e-3);
    expect_defect(
        "mbarrier init not published", {Seen::numbers, "racecheck synccheck"},
        [&] { return with.operator()<Defect::init_not_published>(128); }, 1e-3);
    expect_defect(
        "expect_tx too large", {Seen::always, "deadlock"},
        [&] { return with.operator()<Defect::expects_too_many_bytes>(128); }, 1e-3);
    expect_defect(
        "accumulator read before its wait", {Seen::numbers, ""},
        [&] { return with.operator()<Defect::read_before_wait>(128); }, 1e-3);
    expect_defect("accumulator written before its wait", {Seen::always, "synccheck"},
                  [&] { return with.operator()<Defect::write_before_wait>(128); });
    expect_defect("operand in registers written before its wait", {Seen::always, "synccheck"},
                  [] { return hopper_gemm<0, true, false, Defect::operand_before_wait>(64, 128, 128).error(); });
    expect_defect(
        "a warp writes over rows that its group may still read", {Seen::race_check, "racecheck"},
        [&] { return with.operator()<Defect::write_over_operand>(64); }, 1e-3);
}

// ---- rules of Hopper's instructions that hardware does not check ----
enum class Broken { nothing, descriptors, warps, pattern, base_offset, increase, decrease, one_warp, bytes, arrivals };
template <Broken RULE>
__global__ void __launch_bounds__(384, 1) rules_kernel(float* out) {
    SIMT_DYN_SHARED(shared);  // two tiles (64, 64) of bf16
    SIMT_SHARED(uint64_t, barrier, [1]);
    const int t = int(threadIdx.x), warp = t / 32;
    for (int i = t; i < 4096; i += int(blockDim.x)) reinterpret_cast<uint32_t*>(shared)[i] = 0;
    ptx::fence_proxy_async();
    __syncthreads();
    float d[32] = {};
    const auto product = [&](const uint8_t* a, uint64_t base_offset = 0) {
        const uint64_t at_b = ptx::wgmma_desc_sw128(shared, 16, 1024);
        ptx::wgmma_fence();
        ptx::wgmma_m64n64k16_ss<0, 0>(d, ptx::wgmma_desc_sw128(a, 16, 1024) | base_offset << 49, at_b, 0);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
    };
    if (t < 128 && RULE == Broken::nothing) product(shared + 8192);
    if (t < 128 && RULE == Broken::descriptors) product(shared + (warp & 1) * 1024);
    if (warp != 2 && t < 128 && RULE == Broken::warps) product(shared);
    if (t < 128 && RULE == Broken::pattern) product(shared + 128);
    if (t < 128 && RULE == Broken::base_offset) product(shared + 8192, 1);
    if (t < 128 && RULE == Broken::increase) ptx::setmaxnreg_inc<40>();  // from 168
    if (t < 128 && RULE == Broken::decrease) ptx::setmaxnreg_dec<176>();
    if (warp == 0 && RULE == Broken::one_warp) ptx::setmaxnreg_dec<40>();
    if (t == 0 && RULE == Broken::bytes) {
        ptx::mbar_init(barrier, 1);
        ptx::mbar_arrive_expect_tx(barrier, 1u << 20);
    }
    if (t == 0 && RULE == Broken::arrivals) ptx::mbar_init(barrier, 1u << 20);
    if (t < 64) out[t] = d[0];
}
template <Broken RULE>
double break_rule() {
    Array<float> values(std::vector<float>(64, 1.0f));
    run(rules_kernel<RULE>, 1, 384, 16384, values.data());
    return 0;
}
TEST_CASE("broken rules of Hopper's instructions") {
    const Expected synccheck{Seen::always, "synccheck"};
    expect_clean("none", break_rule<Broken::nothing>);
    expect_defect("wgmma: descriptors differ between the warps of a group", synccheck, break_rule<Broken::descriptors>);
    expect_defect("wgmma: one of four warps leaves it out", synccheck, break_rule<Broken::warps>);
    expect_defect("wgmma: a tile that does not start in row 0 of the swizzle", synccheck, break_rule<Broken::pattern>);
    expect_defect("wgmma: a base offset", synccheck, break_rule<Broken::base_offset>);
    expect_defect("setmaxnreg.inc to fewer registers", synccheck, break_rule<Broken::increase>);
    expect_defect("setmaxnreg.dec to more registers", synccheck, break_rule<Broken::decrease>);
    expect_defect("setmaxnreg by one of four warps", synccheck, break_rule<Broken::one_warp>);
    expect_defect("mbarrier: 2^20 bytes", synccheck, break_rule<Broken::bytes>);
    expect_defect("mbarrier: 2^20 arrivals", synccheck, break_rule<Broken::arrivals>);
}

// ---- wait_group.read: the source may be written, the destination is not there yet ----
constexpr unsigned kStored = 64;  // floats, in a (1, 64) box
template <bool kAll>
__global__ void read_back_kernel(SIMT_PARAM simt::TensorMap map, float* global, float* out) {
    SIMT_DYN_SHARED(shared);
    auto* tile = reinterpret_cast<float*>(shared);
    tile[threadIdx.x] = float(threadIdx.x);
    ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    ptx::tma_store_2d(&map, tile, 0, 0);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    for (unsigned i = 0; i < kStored; i++) tile[i] = -1.0f;
    if (kAll) ptx::bulk_wait<0>();
    for (unsigned i = 0; i < kStored; i++) out[i] = global[i];
}
// The error of what the kernel read back (at once), and of what the store left (in the end).
template <bool kAll>
std::pair<double, double> read_back() {
    Array<float> global(std::vector<float>(kStored, 1000.0f)), out(std::vector<float>(kStored, 0.0f));
    const uint64_t dim[2] = {kStored, 1}, stride[2] = {4, kStored * 4};
    const uint32_t box[2] = {kStored, 1};
    run(read_back_kernel<kAll>, 1, kStored, kStored * sizeof(float),
        simt::make_tmap(global.data(), 4, 2, dim, stride, box, false), global.data(), out.data());
    double at_once = 0, in_the_end = 0;
    for (unsigned i = 0; i < kStored; i++) {
        at_once = std::max(at_once, std::abs(double(out.host()[i]) - i));
        in_the_end = std::max(in_the_end, std::abs(double(global.host()[i]) - i));
    }
    return {at_once, in_the_end};
}
TEST_CASE("TMA store: wait_group.read frees the source, and only wait_group has the bytes in global memory") {
    expect_defect("read back after wait_group.read", {Seen::numbers, "racecheck"},
                  [] { return read_back<false>().first; });
    expect_clean("the source written after wait_group.read, and read back after wait_group", [] {
        const auto [at_once, in_the_end] = read_back<true>();
        CHECK(at_once == 0);
        CHECK(in_the_end == 0);
        return 0.0;
    });
}

#if SIMT_HOOKED
// ---- defects that only the race check sees ----
__global__ void blocks_add_kernel(float* out) { out[threadIdx.x] += 1.0f; }
__global__ void blocks_add_atomically_kernel(float* out) { atomicAdd(&out[threadIdx.x], 1.0f); }
__global__ void exchange_kernel(float* p, bool fence) {
    SIMT_SHARED(float, s, [32]);
    s[threadIdx.x] = 0.0f;
    __syncwarp();
    s[threadIdx.x] = p[threadIdx.x];
    if (fence) __syncwarp();
    p[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void last_block_kernel(float* p, bool fence) {  // 16 partial sums, the result, a counter
    SIMT_SHARED(int, last, [1]);
    if (threadIdx.x == 0) {
        p[blockIdx.x] = 2.0f;
        if (fence) __threadfence();
        const int first = __float_as_int(1.0f);  // the counter's value at the start
        last[0] = atomicAdd(reinterpret_cast<int*>(&p[17]), 1) == first + int(gridDim.x) - 1;
    }
    __syncthreads();
    if (last[0] && threadIdx.x < gridDim.x) atomicAdd(&p[16], p[threadIdx.x]);
}
__global__ void unwritten_kernel(float* p) {
    SIMT_SHARED(float, s, [32]);
    p[threadIdx.x] = s[threadIdx.x];
}
__global__ void shared_past_the_end_kernel(float* p, int n) {
    SIMT_SHARED(float, s, [32]);
    for (int i = int(threadIdx.x); i < 32; i += 32) s[i] = 1.0f;
    __syncthreads();
    float* all = s;
    p[threadIdx.x] = all[int(threadIdx.x) + n];
}
// Copies of one barrier are no divergence; different calls of a function with a barrier are.
__device__ __forceinline__ float shared_sum(float* s, float v) {
    s[threadIdx.x] = v;
    __syncthreads();
    const float sum = s[0] + s[63];
    __syncthreads();
    return sum;
}
__global__ void many_barriers_kernel(float* p, int n) {
    SIMT_SHARED(float, s, [64]);
    float v = p[threadIdx.x];
    for (int i = 0; i < n; i++) {
        if (threadIdx.x % 2)
            v = shared_sum(s, v);
        else
            v = 2.0f * shared_sum(s, v + 1.0f);
    }
    for (int i = 0; i < 5; i++) v += shared_sum(s, v);
    p[threadIdx.x] = v;
}
__global__ void unrolled_barriers_kernel(float* p, int n) {
    SIMT_SHARED(float, s, [64]);
    float v = p[threadIdx.x];
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
        s[threadIdx.x] = v;
        __syncthreads();
        v += s[(threadIdx.x + 1) % 64];
        __syncthreads();
    }
    p[threadIdx.x] = v;
}
TEST_CASE("races that leave the numbers right") {
    const auto expect_race = [&](const char* name, const std::function<double()>& run) {
        const WithConfig config;
        run();
        const auto reports = emulator::take_reports();
        CAPTURE(name);
        REQUIRE_FALSE(reports.empty());
        CAPTURE(reports[0].text);
        CHECK(reports[0].kind == "racecheck");
        CHECK(reports[0].text.find("test_defects.cu:") != reports[0].text.rfind("test_defects.cu:"));
    };
    expect_race("blocks add to one word", over_ones(blocks_add_kernel, 4, 32));
    expect_clean("blocks add atomically", over_ones(blocks_add_atomically_kernel, 4, 32));
    expect_race("exchange in a warp without __syncwarp", over_ones(exchange_kernel, 1, 32, false));
    expect_clean("exchange in a warp", over_ones(exchange_kernel, 1, 32, true));
    expect_race("the last block adds up, without __threadfence", over_ones(last_block_kernel, 4, 32, false));
    expect_clean("the last block adds up", over_ones(last_block_kernel, 4, 32, true));
}
TEST_CASE("shared memory: never written, and past an array's end") {
    expect_defect("never written", {Seen::race_check, "initcheck"}, over_ones(unwritten_kernel, 1, 32));
    expect_defect("past the end", {Seen::race_check, "memcheck"}, over_ones(shared_past_the_end_kernel, 1, 32, 1));
    expect_clean("to the end", over_ones(shared_past_the_end_kernel, 1, 32, 0));
}
TEST_CASE("global memory past the end, at once and with its place") {
    const WithConfig config;
    over_ones(past_the_end_kernel, 1, 32)();
    const auto reports = emulator::take_reports();
    REQUIRE_FALSE(reports.empty());
    CAPTURE(reports[0].text);
    CHECK(reports[0].text.find("out-of-bounds global write of 4 bytes at device buffer of 256 bytes +256 by thread "
                               "(24,0,0) [test_defects.cu:") != std::string::npos);
}
TEST_CASE("one __syncthreads statement, many copies of it: no false alarm") {
    expect_clean("unrolled", over_ones(unrolled_barriers_kernel, 1, 64, 11));
}
TEST_CASE("threads in different calls of a function with a barrier are divergent") {
    expect_defect("both branches call it", {Seen::race_check, "synccheck"}, over_ones(many_barriers_kernel, 1, 64, 1));
    expect_clean("all in one call", over_ones(many_barriers_kernel, 1, 64, 0));
}
TEST_CASE("clean kernels have no reports, whatever collectives order") {
    const WithConfig config;
    emulator::config().strict_warp = false;
    over_ones(exchange_kernel, 1, 32, true)();
    CHECK(emulator::take_reports().empty());
    CHECK(emulator::stats().hooks > 0);
}
#endif
}  // namespace
