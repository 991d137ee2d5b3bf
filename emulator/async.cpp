// cp.async and mbarrier.
//
// The timing is adversarial.  In random order a coin decides whether a copy lands at its issue or as late as its wait;
// in the other orders it always lands late.  The destination is NaN meanwhile.  In random order try_wait fails without
// reason one time in four.
#include <chrono>
#include <cstring>

#include "state.h"

namespace emulator {
namespace {
void land(CopyOp& op) {
    if (op.done) return;
    op.done = true;
    auto* to = static_cast<uint8_t*>(op.to);
    std::memcpy(to, op.from, size_t(op.n_source_bytes));
    std::memset(to + op.n_source_bytes, 0, size_t(op.n_bytes - op.n_source_bytes));
}

// Each operation on an mbarrier reads its word: using an mbarrier before its init was published is a race.
void use_word(uint32_t address, uintptr_t pc) {
    Block& b = block();
    if (b.racecheck) check_access({b.arena + address, 8, false, pc, int(self().lin), true});
}
}  // namespace

void cp_async(void* to, const void* from, int n_bytes, int n_source_bytes) {
    const uintptr_t pc = CALLER_PC();
    Block& b = block();
    Thread& t = self();
    const uintptr_t bits = reinterpret_cast<uintptr_t>(to) | (n_source_bytes ? reinterpret_cast<uintptr_t>(from) : 0);
    if (bits % uintptr_t(n_bytes)) fail("memcheck", "cp.async: an address is not aligned to the copy's size");
    check_bounds(to, size_t(n_bytes), "cp.async");
    if (n_source_bytes) check_bounds(from, size_t(n_source_bytes), "cp.async");
    if (b.counting) {
        if (n_source_bytes) count_access(t, from, size_t(n_source_bytes), false, pc);
        count_access(t, to, size_t(n_bytes), true, pc);
    }
    if (b.racecheck) {
        if (n_source_bytes) check_access({from, size_t(n_source_bytes), false, pc, int(t.lin)});
        check_access({to, size_t(n_bytes), true, pc, int(t.lin)});
        for_cells(to, size_t(n_bytes), [](Cell& c) { c.pending_write = true; });
    }
    CopyOp op{to, from, n_bytes, n_source_bytes, false};
    if (b.random && (b.draw() & 1))
        land(op);
    else
        std::memset(to, 0xFF, size_t(n_bytes));
    t.copies.push_back(op);
}

void cp_async_commit() {
    Thread& t = self();
    t.copy_groups.push_back(std::move(t.copies));
    t.copies.clear();
}

void cp_async_wait(int n_left) {
    Block& b = block();
    Thread& t = self();
    while (int(t.copy_groups.size()) > n_left) {
        for (CopyOp& op : t.copy_groups.front()) {
            land(op);
            if (!b.racecheck) continue;
            for_cells(op.to, size_t(op.n_bytes), [&](Cell& c) {  // from now on the thread's own write
                c.pending_write = false;
                c.write_epoch = b.epoch;
                c.writer = uint16_t(t.lin);
                c.write_clock = t.now;
                c.write_time = b.time;
            });
        }
        t.copy_groups.pop_front();
    }
}

// ---- mbarrier ----
Mbarrier& find_mbarrier(uint32_t address) {
    const auto it = block().mbarriers.find(address);
    if (it == block().mbarriers.end()) fail("synccheck", "an mbarrier is used that was not initialised");
    return it->second;
}

// Arrivals and bytes that an mbarrier can count.
constexpr int64_t kMaxCount = (1 << 20) - 1;

void mbar_init(uint32_t address, unsigned count) {
    Block& b = block();
    if (count < 1 || count > kMaxCount)
        fail("synccheck",
             "mbarrier.init for " + std::to_string(count) + " arrivals: not 1 .. " + std::to_string(kMaxCount));
    if (address % 8) fail("memcheck", "an mbarrier is not aligned to 8 bytes");
    check_bounds(shared_pointer(address), 8, "mbarrier.init");
    if (b.mbarriers.size() >= kMaxMbarriers) fail("synccheck", "more mbarriers than the emulator keeps");
    const auto [it, inserted] = b.mbarriers.try_emplace(address);
    if (!inserted) fail("synccheck", "mbarrier.init on an mbarrier that is in use");
    it->second.expected = it->second.pending = count;
    it->second.index = uint32_t(b.mbarriers.size()) - 1;
    if (b.racecheck) check_access({b.arena + address, 8, true, CALLER_PC(), int(self().lin)});
}

void mbar_inval(uint32_t address) { block().mbarriers.erase(address); }

void complete_phase(Mbarrier& m) {
    if (m.pending != 0 || m.transaction_bytes != 0) return;
    Block& b = block();
    if (b.racecheck) {
        m.released = m.arriving;
        m.released_epoch = m.arriving_epoch;
        m.arriving.assign(size_t(b.n_agents), 0);
    }
    m.phase++;
    m.pending = m.expected;
    wake(m.waiting);
}

void add_transaction_bytes(Mbarrier& m, int64_t n_bytes) {
    m.transaction_bytes += n_bytes;
    if (std::abs(m.transaction_bytes) > kMaxCount)
        fail("synccheck", "an mbarrier counts " + std::to_string(m.transaction_bytes) + " bytes; its limit is " +
                              std::to_string(kMaxCount));
}
void mbar_expect_tx(uint32_t address, int64_t n_bytes) { add_transaction_bytes(find_mbarrier(address), n_bytes); }

void mbar_arrive(uint32_t address, unsigned count, int64_t expect_tx) {
    Block& b = block();
    Thread& t = self();
    Mbarrier& m = find_mbarrier(address);
    use_word(address, CALLER_PC());
    add_transaction_bytes(m, expect_tx);
    if (b.racecheck) {
        if (m.arriving_epoch != b.epoch) {
            m.arriving.assign(size_t(b.n_agents), 0);
            m.arriving_epoch = b.epoch;
        }
        join(m.arriving.data(), clock_of(int(t.lin)));
        t.now++;
    }
    m.pending -= count;
    if (m.pending < 0)
        fail("synccheck", "mbarrier at " + std::to_string(address) + ": more arrivals than its phase expects");
    complete_phase(m);
}

bool mbar_try_wait(uint32_t address, unsigned parity) {
    const uintptr_t pc = CALLER_PC();
    Block& b = block();
    Thread& t = self();
    Mbarrier& m = find_mbarrier(address);
    use_word(address, pc);
    const auto in_progress = [&] { return (m.phase & 1) == (parity & 1); };
    if (in_progress()) {
        if (b.random && (b.draw() & 3) == 0) {
            reschedule();
            return false;
        }
        m.waiting[t.warp] |= 1u << t.lane;
        park("an mbarrier's wait", pc);
        if (in_progress()) return false;
    }
    if (b.racecheck && m.released_epoch == b.epoch && !m.released.empty())
        join(clock_of(int(t.lin)), m.released.data());
    return true;
}

void proxy_fence() {
    Block& b = block();
    self().fenced_at = ++b.time;
    b.time++;
}

uint64_t global_ns() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return uint64_t(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

void thread_fence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    self().thread_fenced = true;
}

void finish_thread() {
    Block& b = block();
    const Thread& t = self();
    const Warp& w = own_warp();
    cp_async_commit();
    cp_async_wait(0);
    if (reads_of_bulk_are_open())
        report("synccheck", 4, 4, [&] {
            return agent_name(int(t.lin)) + " exits without waiting for its TMA stores, which still read shared memory";
        });
    bulk_commit();
    bulk_wait_read(0);
    self().bulk_groups.clear();  // the stores may write global memory until the grid ends
    if (!b.failed && (!w.wgmma.empty() || !w.wgmma_groups.empty()))
        report("synccheck", 5, 5, [&] { return agent_name(int(t.lin)) + " exits with wgmma in flight"; });
}
}  // namespace emulator
