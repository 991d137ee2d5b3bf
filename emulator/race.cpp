// The race check: an exact happens-before detector over the accesses that were executed.
//
// Each agent (a thread, a warp's wgmma, an mbarrier's TMA loads) has a clock, and a vector with the last clock that it
// knows of every other agent.  A cell remembers the last write and the reads since then, with the clocks of their
// agents; an access races with an earlier one that it conflicts with and whose clock its agent does not know.  A
// barrier of all threads orders everything: it starts a new epoch, and accesses of older epochs need no comparison.
// Collectives do not order memory; __syncwarp, barriers and mbarriers do.  Any access to the destination of a copy in
// flight is a race, and so is a write to memory that wgmma or a TMA store still reads.  Cells of global memory also
// name the block.  One block is ordered before another only by a __threadfence and then an atomic in the first, and a
// later atomic on the same address in the second.
//
// Not seen: code that was not executed.  Too coarse: accesses of different bytes in one granule of 2 count as
// conflicting.
#include <algorithm>
#include <new>

#include "state.h"

namespace emulator {
namespace {
uint64_t g_launch = 0;
std::map<const void*, std::set<uint32_t>> g_released;  // address of an atomic -> blocks whose writes it publishes

enum class Region { none, redzone, shared, global };
struct ShadowCell {
    Region region;
    Cell* cell;
};

ShadowCell find_global(const uint8_t* p) {
    Block& b = block();
    DeviceBuffer* a = b.last_buffer;
    const auto near = [&](const DeviceBuffer* x) { return p >= x->p - kRedzone && p < x->p + x->n_bytes + kRedzone; };
    if (!a || !near(a)) {
        auto& table = device_buffers().by_address;
        auto it = table.upper_bound(reinterpret_cast<uintptr_t>(p) + kRedzone);
        if (it == table.begin()) return {Region::none, nullptr};
        a = std::prev(it)->second.get();
        if (!near(a)) return {Region::none, nullptr};
        b.last_buffer = a;
    }
    if (p < a->p || p >= a->p + a->n_bytes) return {Region::redzone, nullptr};
    if (!a->cells) {
        a->cells.reset(static_cast<Cell*>(std::calloc(a->n_bytes / kGranule + 2, sizeof(Cell))));
        if (!a->cells) throw std::bad_alloc();
    }
    return {Region::global, &a->cells[size_t(p - a->p) / kGranule]};
}

ShadowCell find(const void* p) {
    Block& b = block();
    if (b.in_arena(p)) return {Region::shared, &b.cells[b.offset(p) / kGranule]};
    const auto* byte = static_cast<const uint8_t*>(p);
    if (byte >= self().stack && byte < self().stack + kStackBytes) return {Region::none, nullptr};
    return find_global(byte);
}

const char* verb(bool write, bool atomic) { return atomic ? "atomic" : write ? "write" : "read"; }
std::string actor(const Access& a) { return agent_name(a.agent) + " [" + place(a.pc) + "]"; }

uint32_t known_clock(const Access& a, int agent) {
    if (a.clock) return a.clock[agent];
    const Block& b = block();
    if (a.agent >= b.n_threads) return 0;
    const Thread& t = b.threads[size_t(a.agent)];
    return t.clock_epoch == b.epoch ? t.clock[size_t(agent)] : 0;
}
uint32_t now_of(const Access& a) {
    if (a.agent < block().n_threads) return block().threads[size_t(a.agent)].now;
    return a.clock ? a.clock[a.agent] : 0;
}

struct Touched {  // one granule of an access
    const Access& access;
    Cell& cell;
    const uint8_t* p;
    bool shared;
    uint32_t block;  // names the accessing block in the cell
};

void report_race(const Touched& t, const char* other, const std::string& other_name, uintptr_t other_pc) {
    report("racecheck", t.access.pc, other_pc, [&] {
        return std::string(t.shared ? "shared" : "global") + " memory race at " + object_name(t.p) + ": " +
               verb(t.access.write, t.access.atomic) + " by " + actor(t.access) + " is not ordered with " + other +
               " by " + other_name + " [" + place(other_pc) + "]";
    });
}

bool unordered_block(uint32_t other, uint32_t own) { return other != own && !block().known_blocks.count(other); }

bool races_with_write(const Touched& t) {
    const Cell& c = t.cell;
    if (!c.written || (t.access.atomic && c.write_atomic)) return false;
    if (unordered_block(c.write_block, t.block)) {
        report_race(t, verb(true, c.write_atomic), "another block", c.write_pc);
        return true;
    }
    if (c.write_epoch != block().epoch || c.writer == t.access.agent) return false;
    if (c.write_clock <= known_clock(t.access, c.writer)) return false;
    report_race(t, verb(true, c.write_atomic), agent_name(c.writer), c.write_pc);
    return true;
}

bool races_with_read(const Touched& t) {
    const Cell& c = t.cell;
    if (c.pending_reads) {
        report("racecheck", t.access.pc, c.read_pc, [&] {
            return "write of " + object_name(t.p) + " by " + actor(t.access) +
                   " while wgmma or a TMA store reads it [" + place(c.read_pc) + "]";
        });
        return true;
    }
    if (c.any_read && (c.many_readers || c.read_block != t.block) && unordered_block(c.read_block, t.block)) {
        report_race(t, "read", "another block", c.read_pc);
        return true;
    }
    if (c.read_epoch != block().epoch) return false;
    for (int32_t i = c.first_read; i >= 0; i = block().reads[size_t(i)].next) {
        const Read& r = block().reads[size_t(i)];
        if (r.agent == t.access.agent || r.clock <= known_clock(t.access, r.agent)) continue;
        report_race(t, "read", agent_name(r.agent), r.pc);
        return true;
    }
    return false;
}

// False: the access raced, and the cell must stay as it was.
bool check_granule(const Touched& t) {
    const Cell& c = t.cell;
    if (c.pending_write) {
        report("racecheck", t.access.pc, c.write_pc, [&] {
            return std::string(verb(t.access.write, t.access.atomic)) + " of " + object_name(t.p) + " by " +
                   actor(t.access) + " while an asynchronous copy into it is in flight [" + place(c.write_pc) + "]";
        });
        return false;
    }
    if (races_with_write(t)) return false;
    if (t.access.write) return !races_with_read(t);
    if (t.shared && !c.written && config().initcheck) {
        report("initcheck", t.access.pc, 3,
               [&] { return "read of " + object_name(t.p) + ", which was never written, by " + actor(t.access); });
        return false;
    }
    return true;
}

void record_write(const Touched& t) {
    Cell& c = t.cell;
    c.written = true;
    c.write_atomic = t.access.atomic;
    c.write_generic = true;
    c.write_block = t.block;
    c.write_epoch = block().epoch;
    c.writer = uint16_t(t.access.agent);
    c.write_clock = now_of(t.access);
    c.write_pc = t.access.pc;
    c.write_time = block().time;
    c.first_read = -1;
    c.any_read = c.many_readers = false;
    c.read_epoch = 0;
}

// Turns the hooks off while the check itself runs: the linker may take its std:: templates from an instrumented file.
struct NoHooks {
    bool before = std::exchange(block().in_hook, true);
    ~NoHooks() { block().in_hook = before; }
};

// False: the access is out of bounds, or the memory is not watched.
bool check_region(const Access& a, const ShadowCell& at) {
    const auto out_of_bounds = [&](const char* memory, uintptr_t kind) {
        report("memcheck", a.pc, kind, [&] {
            return std::string("out-of-bounds ") + memory + " " + verb(a.write, a.atomic) + " of " +
                   std::to_string(a.n_bytes) + " bytes at " + object_name(a.p) + " by " + actor(a);
        });
        return false;
    };
    if (at.region == Region::none) return false;
    if (at.region == Region::redzone) return out_of_bounds("global", 1);
    if (at.region == Region::shared)
        return inside_shared_array(block().offset(a.p), a.n_bytes) || out_of_bounds("shared", 2);
    const DeviceBuffer* buffer = block().last_buffer;
    return static_cast<const uint8_t*>(a.p) + a.n_bytes <= buffer->p + buffer->n_bytes || out_of_bounds("global", 1);
}
}  // namespace

// ---- clocks ----
uint32_t* clock_of(int thread) {
    Block& b = block();
    Thread& t = b.threads[size_t(thread)];
    if (t.clock_epoch != b.epoch) {
        t.clock.assign(size_t(b.n_agents), 0);
        t.clock_epoch = b.epoch;
    }
    t.clock[size_t(thread)] = t.now;
    return t.clock.data();
}

void join(uint32_t* into, const uint32_t* from) {
    for (int i = 0; i < block().n_agents; i++) into[i] = std::max(into[i], from[i]);
}

void order_threads(const std::vector<int>& threads) {
    Block& b = block();
    if (!b.racecheck) return;
    if (int(threads.size()) >= b.live) {
        b.epoch++;
        return;
    }
    std::vector<uint32_t> known(size_t(b.n_agents), 0);
    for (int t : threads) join(known.data(), clock_of(t));
    for (int t : threads) {
        b.threads[size_t(t)].clock = known;
        b.threads[size_t(t)].now++;
    }
}

void order_lanes(uint32_t mask) {
    if (!block().racecheck) return;
    std::vector<int> threads;
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1) threads.push_back(int(self().warp) * 32 + l);
    order_threads(threads);
}

// ---- shadow ----
void start_launch_shadow() {
    g_launch++;
    g_released.clear();
}
uint64_t shadow_owner(bool shared) { return shared ? block().serial : g_launch; }

CellRange cells_of(const void* p, size_t n_bytes) {
    const ShadowCell at = find(p);
    if (!at.cell) return {nullptr, 0, false};
    const size_t n = (reinterpret_cast<uintptr_t>(p) % kGranule + n_bytes + kGranule - 1) / kGranule;
    return {at.cell, n, at.region == Region::shared};
}

void record_read(Cell& c, int agent, uint32_t clock, uintptr_t pc) {
    Block& b = block();
    if (c.read_epoch != b.epoch) {
        c.first_read = -1;
        c.read_epoch = b.epoch;
    }
    for (int32_t i = c.first_read; i >= 0; i = b.reads[size_t(i)].next) {
        Read& r = b.reads[size_t(i)];
        if (r.agent != agent) continue;
        r.clock = clock;
        r.pc = pc;
        return;
    }
    b.reads.push_back({uint16_t(agent), clock, c.first_read, pc});
    c.first_read = int32_t(b.reads.size()) - 1;
}

void check_access(const Access& a) {
    const NoHooks no_hooks;
    const ShadowCell at = find(a.p);
    if (!check_region(a, at)) return;
    const bool shared = at.region == Region::shared;
    const uint32_t own_block = shared ? 1 : block().number;
    const auto* p = static_cast<const uint8_t*>(a.p);
    bool clean = true;
    for_cells(a.p, a.n_bytes, [&](Cell& c) {
        const Touched t{a, c, p, shared, own_block};
        p += kGranule;
        clean = clean && check_granule(t);
        if (!clean) return;
        if (a.write) {
            record_write(t);
            return;
        }
        if (c.any_read && c.read_block != own_block) c.many_readers = true;
        c.any_read = true;
        c.read_block = own_block;
        c.read_pc = a.pc;
        record_read(c, a.agent, now_of(a), a.pc);
    });
}

// TMA and wgmma see ordinary stores only after a fence.proxy.async, either by the writer after its store or by the
// thread that issues the operation.
void check_proxy_fence(const void* p, size_t n_bytes, uintptr_t pc, const char* what) {
    const Block& b = block();
    for_cells(p, n_bytes, [&](Cell& c) {
        if (!c.written || !c.write_generic || c.writer >= b.n_threads) return;
        if (b.threads[c.writer].fenced_at > c.write_time || self().fenced_at > c.write_time) return;
        report("proxycheck", pc, c.write_pc, [&] {
            return std::string(what) + " [" + place(pc) + "] reads " + object_name(p) +
                   ", written by ordinary stores of " + agent_name(c.writer) + " [" + place(c.write_pc) +
                   "], without fence.proxy.async";
        });
    });
}

// Between blocks: a fence and then an atomic publish the earlier writes; a later atomic on the same address sees them.
void atomic_hook(const void* p, size_t n_bytes) {
    const uintptr_t pc = CALLER_PC();
    if (!in_kernel()) return;
    Block& b = block();
    if (b.racecheck && !b.in_arena(p)) {
        std::set<uint32_t>& released = g_released[p];
        b.known_blocks.insert(released.begin(), released.end());
        if (self().thread_fenced) {
            released.insert(b.number);
            released.insert(b.known_blocks.begin(), b.known_blocks.end());
        }
    }
    memory_hook(p, n_bytes, true, true, pc);
}
}  // namespace emulator
