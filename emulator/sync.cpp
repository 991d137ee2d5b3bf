// Where threads meet: collectives of a warp, barriers of a block.
#include <cstring>

#include "state.h"

namespace emulator {
namespace {
// The collective that the lanes in mask are gathering for; refuses what hardware leaves undefined.
Collective& enter_collective(const char* op, uint32_t mask) {
    const Thread& t = self();
    Warp& w = own_warp();
    const std::string name = op;
    if (!(mask >> t.lane & 1)) fail("synccheck", name + ": the thread is not named in its own mask");
    if (mask & ~w.live) fail("synccheck", name + ": the mask names lanes that have exited or do not exist");
    for (int i = 0; i < w.n_collectives; i++) {
        Collective& c = w.collectives[i];
        if (c.mask != mask) {  // lanes that run ahead may wait elsewhere, but lanes that wait for each other never meet
            if ((c.arrived & mask) && (c.mask >> t.lane & 1))
                fail("synccheck",
                     "divergent warp: the thread is in " + name + " and waits for lanes that wait for it in " + c.op);
            continue;
        }
        if (std::strcmp(c.op, op))
            fail("synccheck", "divergent warp: the thread is in " + name + ", other lanes wait in " + c.op);
        return c;
    }
    Collective& c = w.collectives[w.n_collectives++];
    c.mask = mask;
    c.arrived = 0;
    c.op = op;
    return c;
}

void release(Barrier& barrier) {
    Block& b = block();
    b.stats.barriers++;
    if (b.counting && barrier.count == 0)
        for (int w = 0; w < b.n_warps; w++) flush_counters(unsigned(w));
    order_threads(barrier.participants);
    barrier.result = barrier.votes;
    barrier.participants.clear();
    barrier.arrived = 0;
    barrier.count = -1;
    barrier.n_votes = 0;
    wake(barrier.waiting);
}

// All threads of a block must meet at the same statement.  The compiler may have copied the statement, so the check
// compares places in the source and not addresses.  Only the race build, whose low optimisation leaves few copies,
// checks.
void check_same_statement(const Barrier& barrier, uintptr_t pc) {
    if (!block().racecheck || pc == barrier.first_pc) return;
    const std::string here = place(pc), there = place(barrier.first_pc);
    if (here != there)
        fail("synccheck", "divergent barrier: the thread is at __syncthreads [" + here + "], thread " +
                              coordinates(block().threads[size_t(barrier.participants[0])].tid) +
                              " waits at another one [" + there + "]");
}

Barrier& enter_barrier(int id, int count, uintptr_t pc) {
    if (id < 0 || id >= kBarriers) fail("synccheck", "barrier id " + std::to_string(id) + " is not in 0..15");
    if (count % 32 || count < 0 || count > block().n_warps * 32)
        fail("synccheck",
             "barrier of " + std::to_string(count) + " threads: not a multiple of 32, or more than the block has");
    Barrier& barrier = block().barriers[id];
    if (barrier.count >= 0 && barrier.count != count)
        fail("synccheck", "barrier " + std::to_string(id) + " is used for " + std::to_string(count) + " and for " +
                              std::to_string(barrier.count) + " threads at the same time");
    if (barrier.arrived == 0)
        barrier.first_pc = pc;
    else if (id == 0 && count == 0)
        check_same_statement(barrier, pc);
    barrier.count = count;
    barrier.arrived++;
    barrier.participants.push_back(int(self().lin));
    return barrier;
}

void sync_at(int id, int count, uintptr_t pc) {
    Barrier& barrier = enter_barrier(id, count, pc);
    if (barrier.arrived == (count ? count : block().live)) {
        release(barrier);
        if (block().random) reschedule();
        return;
    }
    barrier.waiting[self().warp] |= 1u << self().lane;
    park(id ? "a named barrier" : "__syncthreads", pc);
}
}  // namespace

void collective_at(const char* op, uint32_t mask, void* argument, CollectiveBody body, uintptr_t pc) {
    Block& b = block();
    const Thread& t = self();
    Warp& w = own_warp();
    Collective& c = enter_collective(op, mask);
    c.arrived |= 1u << t.lane;
    c.arguments[t.lane] = argument;
    if (c.arrived != mask) {
        park(op, pc);
        return;
    }
    void* arguments[32];
    std::memcpy(arguments, c.arguments, sizeof arguments);
    c = w.collectives[--w.n_collectives];
    b.stats.collectives++;
    if (b.counting && mask == w.live) flush_counters(t.warp);
    if (!config().strict_warp && mask == w.live) order_lanes(mask);
    body(arguments, mask);
    w.runnable |= mask;
    if (b.random && (b.draw() & 1)) reschedule();
}

void warp_collective(const char* op, uint32_t mask, void* argument, CollectiveBody body) {
    collective_at(op, mask, argument, body, CALLER_PC());
}

void warp_fence(uint32_t mask) {
    collective_at(
        "__syncwarp", mask, nullptr, [](void* const*, uint32_t lanes) { order_lanes(lanes); }, CALLER_PC());
}

void bar_sync(int id, int count) { sync_at(id, count, CALLER_PC()); }

void bar_arrive(int id, int count) {
    Barrier& barrier = enter_barrier(id, count, CALLER_PC());
    if (barrier.arrived == count) release(barrier);
}

int bar_reduce(int predicate, Reduce op) {
    Barrier& barrier = block().barriers[0];
    const int vote = predicate != 0;
    if (barrier.n_votes++ == 0)
        barrier.votes = vote;
    else if (op == Reduce::count)
        barrier.votes += vote;
    else
        barrier.votes = op == Reduce::all ? barrier.votes & vote : barrier.votes | vote;
    sync_at(0, 0, CALLER_PC());
    return barrier.result;
}

void release_if_all_arrived() {
    Barrier& barrier = block().barriers[0];
    if (barrier.count == 0 && barrier.arrived && barrier.arrived == block().live) release(barrier);
}
}  // namespace emulator
