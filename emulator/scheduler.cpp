// The choice of the thread that runs next, and the run of one block from its start to its end.
//
// A thread runs until it waits: for its warp in a collective, for its block in a barrier, for an mbarrier.  Sequential
// and reverse order stay in a warp while it can run; random order stays seven times out of eight, so that warps run
// far ahead of each other, as on hardware.  TMA copies land when no thread can run, in random order also at any time
// before.
#include <algorithm>
#include <atomic>

#include "state.h"

namespace emulator {
namespace {
void land_one(size_t i) {
    Block& b = block();
    const std::shared_ptr<TmaOp> op = b.in_flight[i];
    b.in_flight.erase(b.in_flight.begin() + ptrdiff_t(i));
    run_tma(*op);
}

Thread* pick_random() {
    Block& b = block();
    int candidates[kMaxWarps], n = 0;
    if (b.warps[b.current_warp].runnable && (b.draw() & 7)) {
        candidates[n++] = b.current_warp;
    } else {
        for (int w = 0; w < b.n_warps; w++)
            if (b.warps[w].runnable) candidates[n++] = w;
    }
    if (n == 0) return nullptr;
    b.current_warp = candidates[n > 1 ? b.draw() % uint64_t(n) : 0];
    uint32_t lanes = b.warps[b.current_warp].runnable;
    for (uint64_t skip = b.draw() % uint64_t(__builtin_popcount(lanes)); skip > 0; skip--) lanes &= lanes - 1;
    return &b.threads[size_t(b.current_warp * 32 + __builtin_ctz(lanes))];
}

Thread* pick_in_order() {
    Block& b = block();
    const bool reverse = b.order == Order::Reverse;
    for (int i = 0; i < b.n_warps; i++) {
        const int w = (b.current_warp + (reverse ? b.n_warps - i : i)) % b.n_warps;
        const uint32_t lanes = b.warps[w].runnable;
        if (!lanes) continue;
        b.current_warp = w;
        return &b.threads[size_t(w * 32 + (reverse ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes)))];
    }
    return nullptr;
}

// Null: no thread can run and no TMA copy is in flight.
Thread* pick() {
    Block& b = block();
    for (;;) {
        if (b.random && !b.in_flight.empty() && (b.draw() & 7) == 0) land_one(b.draw() % b.in_flight.size());
        if (Thread* t = b.random ? pick_random() : pick_in_order()) return t;
        if (b.in_flight.empty()) return nullptr;
        land_one(b.random ? b.draw() % b.in_flight.size() : 0);
    }
}

void leave_warp(Thread& t) {
    Block& b = block();
    Warp& w = b.warps[t.warp];
    finish_thread();
    w.live &= ~(1u << t.lane);
    b.live--;
    if (b.counting && !w.live) flush_counters(t.warp);
    for (int i = 0; i < w.n_collectives; i++)
        if (w.collectives[i].mask >> t.lane & 1)
            fail("synccheck",
                 std::string("exits while its warp waits in ") + w.collectives[i].op + " with a mask that names it");
    if (b.live == 0) check_warpgroups();
    release_if_all_arrived();
}

// Thrown by fail(): unwinds the thread's stack, so that nothing that lies on it leaks.
struct Abandoned {};

// The life of a fiber: a thread of one block, then of the next.
void fiber_main() {
    enter_fiber();
    for (;;) {
        try {
            (*block().body)();
            leave_warp(self());
        } catch (const Abandoned&) { break; }
        park("exited", 0);
    }
    switch_fiber(self(), block().main);
    std::abort();  // never resumed
}

void start_warps(Block& b) {
    for (int w = 0; w < b.n_warps; w++) {
        Warp& warp = b.warps[w];
        const int n_lanes = std::min(32, b.n_threads - w * 32);
        warp.live = warp.runnable = n_lanes == 32 ? kFullMask : (1u << n_lanes) - 1;
        warp.n_collectives = 0;
        warp.wgmma.clear();
        warp.wgmma_groups.clear();
        warp.wgmma_fenced = false;
        warp.registers = 0;
        warp.n_group_instructions = 0;
    }
    for (Warpgroup& g : b.warpgroups) g = Warpgroup{};
    b.free_registers = 0;
    for (uint32_t& lanes : b.wait_for_registers) lanes = 0;
}

void start_threads(Block& b, dim3 dim) {
    for (unsigned i = 0; i < unsigned(b.n_threads); i++) {
        Thread& t = b.threads[i];
        t.tid = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
        t.lin = i;
        t.warp = i / 32;
        t.lane = i % 32;
        t.fenced_at = 0;
        t.thread_fenced = false;
        t.clock_epoch = 0;
        if (t.fresh) reset_fiber(t, fiber_main);
    }
}

void start_block(Block& b, dim3 grid, dim3 dim, uint64_t number, size_t n_shared_bytes) {
    static std::atomic<uint64_t> serial{1};
    b.info.bid = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y), unsigned(number / grid.x / grid.y)};
    b.info.bdim = dim;
    b.info.gdim = grid;
    b.number = uint32_t(number) + 1;
    b.serial = serial++;
    b.live = b.n_threads;
    b.current_warp = 0;
    b.spins = 0;
    b.failed = b.in_hook = false;
    b.failure.clear();
    b.mbarriers.clear();
    b.in_flight.clear();
    b.known_blocks.clear();
    for (Barrier& barrier : b.barriers) barrier = Barrier{};
    // A block's schedule depends on the seed and the block's number only, not on the OS thread that runs the block.
    b.rng = config().seed * 0x9E3779B97F4A7C15ull + (number + 1) * 0xBF58476D1CE4E5B9ull;
    b.draw(), b.draw();
    if (b.racecheck) {
        b.epoch++;
        b.time++;
        b.reads.clear();
        if (b.cells.empty()) b.cells.resize(kArenaBytes / kGranule);
        b.n_agents = b.n_threads + kMaxWarps + kMaxMbarriers;
    }
    prepare_arena(b, n_shared_bytes);
    start_warps(b);
    start_threads(b, dim);
}

// Lists the threads that have not exited, grouped by the place where they wait.
std::string deadlock_text(const Block& b) {
    struct Group {
        int n = 0;
        uint3 first{}, last{};
    };
    std::map<std::pair<std::string, uintptr_t>, Group> groups;
    for (int i = 0; i < b.n_threads; i++) {
        const Thread& t = b.threads[size_t(i)];
        if (!(b.warps[t.warp].live >> t.lane & 1)) continue;
        Group& g = groups[{t.waits_in, t.waits_at}];
        if (g.n++ == 0) g.first = t.tid;
        g.last = t.tid;
    }
    std::string text = "deadlock in block " + coordinates(b.info.bid) + ": nobody can run; ";
    for (const auto& [wait, g] : groups) {
        text += std::to_string(g.n) + (g.n == 1 ? " thread waits in " : " threads wait in ") + wait.first + " [" +
                place(wait.second) + "]: " + coordinates(g.first);
        if (g.n > 1) text += (g.n > 2 ? " .. " : " and ") + coordinates(g.last);
        text += "; ";
    }
    const int n_exited = b.n_threads - b.live;
    return text + std::to_string(n_exited) + " of " + std::to_string(b.n_threads) + " have exited";
}

// Drops the pending copies of abandoned threads, so that the next block starts clean.  The stacks of waiting threads
// are not unwound: the emulator's functions that wait hold no memory.
void abandon_threads(Block& b) {
    for (Thread& t : b.threads) {
        t.fresh = true;
        t.copies.clear();
        t.copy_groups.clear();
        t.bulk.clear();
        t.bulk_groups.clear();
        t.waits_in = "";
    }
    for (auto& sites : b.sites) sites.clear();
}
}  // namespace

void reschedule() {
    Thread* next = pick();
    if (!next) next = &block().main;
    Thread& me = self();
    if (next != &me) switch_fiber(me, *next);
}

void park(const char* waits_in, uintptr_t waits_at) {
    Thread& t = self();
    t.waits_in = waits_in;
    t.waits_at = waits_at;
    own_warp().runnable &= ~(1u << t.lane);
    reschedule();
    t.waits_in = "";
}

void wake(uint32_t (&waiting)[kMaxWarps]) {
    Block& b = block();
    for (int w = 0; w < b.n_warps; w++) {
        b.warps[w].runnable |= waiting[w];
        waiting[w] = 0;
    }
}

void spin_yield() {
    constexpr uint64_t kForever = 20'000'000;
    if (++block().spins > kForever)
        fail("deadlock", "spins for ever: only threads of its own and of earlier blocks can make progress");
    reschedule();
}

void fail(const char* kind, const std::string& message) {
    Block& b = block();
    if (!b.failed) {
        b.failed = true;
        b.failure_kind = kind;
        b.failure = std::string(kind) + " in block " + coordinates(b.info.bid) + ", thread " + coordinates(self().tid) +
                    ": " + message;
    }
    throw Abandoned{};
}

// Runs until all threads have exited and all TMA copies have landed, or until a failure.
static void run_threads(Block& b) {
    try {
        Thread* first = pick();
        switch_fiber(b.main, *first);
        if (!b.failed && b.live > 0) {
            b.failed = true;
            b.failure_kind = "deadlock";
            b.failure = deadlock_text(b);
        }
        while (!b.failed && !b.in_flight.empty()) land_one(0);
    } catch (const Abandoned&) {  // from a TMA copy that landed outside of any thread
    }
}

void run_block(Block& b, dim3 grid, dim3 dim, uint64_t number, size_t n_shared_bytes) {
    start_block(b, grid, dim, number, n_shared_bytes);
    t_block = &b;
    t_blk = &b.info;
    t_cur = &b.main;
    run_threads(b);
    b.stats.blocks++;
    b.stats.threads += uint64_t(b.n_threads);
    if (b.failed) abandon_threads(b);
    t_cur = nullptr;
    t_block = nullptr;
    t_blk = nullptr;
}
}  // namespace emulator
