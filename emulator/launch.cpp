// Runs a grid: spreads its blocks over OS threads, throws its reports as one error.  Configuration and statistics.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "state.h"

namespace emulator {
namespace {
// Users set the switches of the environment: a wrong value ends the program before it can mislead.
[[noreturn]] void refuse(const char* name, const char* value, const char* allowed) {
    std::fprintf(stderr, "%s=%s: expected %s\n", name, value, allowed);
    std::exit(2);
}
uint64_t number_of(const char* name, const char* value) {
    char* end = nullptr;
    const unsigned long long n = std::strtoull(value, &end, 10);
    if (end == value || *end || *value == '-') refuse(name, value, "a whole number");
    return n;
}
Config config_from_environment() {
    Config c;
    if (const char* seed = std::getenv("KILN_EMULATOR_SEED")) {
        c.order = Order::Random;
        c.seed = number_of("KILN_EMULATOR_SEED", seed);
    }
    if (const char* order = std::getenv("KILN_EMULATOR_ORDER")) {
        const std::string name = order;
        if (name != "sequential" && name != "reverse" && name != "random")
            refuse("KILN_EMULATOR_ORDER", order, "sequential, reverse or random");
        if (name == "random" && !std::getenv("KILN_EMULATOR_SEED")) c.seed = std::random_device{}();
        c.order = name == "random" ? Order::Random : name == "reverse" ? Order::Reverse : Order::Sequential;
    }
    if (const char* n = std::getenv("KILN_EMULATOR_THREADS")) c.threads = int(number_of("KILN_EMULATOR_THREADS", n));
    if (const char* n = std::getenv("KILN_EMULATOR_PREEMPT")) c.preempt = int(number_of("KILN_EMULATOR_PREEMPT", n));
    if (const char* n = std::getenv("KILN_EMULATOR_COUNTERS")) c.counters = number_of("KILN_EMULATOR_COUNTERS", n) != 0;
    return c;
}

// The Block of OS thread 0, 1, ...; kept between launches, because stacks are expensive.  One launch runs at a time.
Block& block_of_worker(size_t worker) {
    static std::mutex mutex;
    static std::vector<std::unique_ptr<Block>> blocks;
    const std::lock_guard<std::mutex> lock(mutex);
    while (blocks.size() <= worker) {
        blocks.push_back(std::make_unique<Block>());
        blocks.back()->threads.reserve(1024);  // fibers must never move
    }
    return *blocks[worker];
}

// One launch: the state that its OS threads share.
struct Launch {
    dim3 grid, dim;
    size_t n_shared_bytes;
    const std::function<void()>& body;
    const void* kernel;
    size_t shared_limit;
    uint64_t n_blocks;
    std::atomic<uint64_t> next{0};
    std::mutex mutex;
};

void add(Stats& to, const Stats& from) {
    to.blocks += from.blocks;
    to.threads += from.threads;
    to.switches += from.switches;
    to.collectives += from.collectives;
    to.barriers += from.barriers;
    to.hooks += from.hooks;
}

void run_blocks(Launch& launch, size_t worker) {
    const Config& c = config();
    Block& b = block_of_worker(worker);
    note_main_stack(b);
    b.body = &launch.body;
    b.kernel = launch.kernel;
    b.shared_limit = launch.shared_limit;
    b.n_threads = int(launch.dim.x * launch.dim.y * launch.dim.z);
    b.n_warps = (b.n_threads + 31) / 32;
    b.order = c.order;
    b.random = c.order == Order::Random;
    b.racecheck = c.racecheck;
    b.counting = c.counters;
    b.preempt = c.preempt;
    b.stats = Stats{};
    b.counted = KernelCounters{};
    b.last_buffer = nullptr;
    for (DeviceBuffer*& a : b.recent) a = nullptr;
    while (b.threads.size() < size_t(b.n_threads)) make_stack(b.threads.emplace_back());
    for (uint64_t i; (i = launch.next.fetch_add(1)) < launch.n_blocks;) {
        run_block(b, launch.grid, launch.dim, i, launch.n_shared_bytes);
        if (!b.failed) continue;
        launch.next = launch.n_blocks;  // the other OS threads finish their block and stop
        add_report(b.failure_kind, b.failure);
    }
    const std::lock_guard<std::mutex> lock(launch.mutex);
    add(stats(), b.stats);
    if (b.counting) add_counters(launch.kernel, b.counted, false);
}

std::string failure_text(const Launch& launch, const std::vector<Report>& reports) {
    const Config& c = config();
    const char* order = c.order == Order::Sequential ? "sequential" : c.order == Order::Reverse ? "reverse" : "random";
    std::string text = launch.kernel ? "kernel " + name_of_kernel(launch.kernel) + ", " : "";
    text += "grid " + coordinates({launch.grid.x, launch.grid.y, launch.grid.z}) + ", block " +
            coordinates({launch.dim.x, launch.dim.y, launch.dim.z}) + ", KILN_EMULATOR_ORDER=" + order;
    if (c.order == Order::Random) text += " KILN_EMULATOR_SEED=" + std::to_string(c.seed);
    for (const Report& r : reports) text += "\n  " + r.text;
    return text;
}
}  // namespace

Config& config() {
    static Config c = config_from_environment();
    return c;
}
Stats& stats() {
    static Stats s;
    return s;
}

void launch_impl(dim3 grid, dim3 dim, size_t n_shared_bytes, const std::function<void()>& body, const void* kernel,
                 size_t shared_limit) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const auto start = std::chrono::steady_clock::now();
    const Config& c = config();
    Launch launch{grid, dim, n_shared_bytes, body, kernel, shared_limit, uint64_t(grid.x) * grid.y * grid.z};
    const uint64_t n_threads = uint64_t(dim.x) * dim.y * dim.z;
    if (n_threads == 0 || n_threads > 1024 || dim.z > 64 || launch.n_blocks == 0 || grid.y > 65535 || grid.z > 65535)
        throw Error(failure_text(launch, {Report{"", "invalid launch configuration"}}));
    if (n_shared_bytes > kMaxDynamicShared)
        throw Error(failure_text(launch, {Report{"", "more than 227 KiB of dynamic shared memory"}}));
    start_launch_shadow();
    // The shadow of global memory and the counters have no lock: one OS thread only.
    const uint64_t n_workers = c.racecheck || c.counters ? 1 : uint64_t(std::max(1, c.threads));
    std::vector<std::thread> workers;
    for (uint64_t i = 1; i < std::min(n_workers, launch.n_blocks); i++)
        workers.emplace_back([&launch, i] { run_blocks(launch, i); });
    run_blocks(launch, 0);
    for (std::thread& t : workers) t.join();
    check_redzones();
    if (c.counters) add_counters(kernel, {}, true);
    stats().seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (!c.fatal) return;
    const std::vector<Report> reports = take_reports();
    if (!reports.empty()) throw Error(failure_text(launch, reports));
}
}  // namespace emulator
