// TMA: copies boxes of a tensor between global and shared memory; elements outside the tensor read as zero and are not
// written.
#include <algorithm>
#include <cstring>
#include <utility>

#include "common/buf.h"
#include "state.h"

namespace emulator {
namespace {
constexpr uint32_t kChunk = 16;  // bytes that a swizzle keeps together

struct Chunk {
    uint32_t shared;  // address of the 16 bytes
    int lead, valid;  // bytes outside the tensor in front, bytes inside
    uint8_t* global;  // first byte inside; null: none
};

// Calls f(Chunk) for every 16 bytes of the box, in the order of shared memory before the swizzle.
template <class F>
void for_box(const TmaOp& op, F f) {
    const TensorMap& m = op.map;
    const uint32_t n_inner = m.box[0] * uint32_t(m.element_bytes), per_chunk = kChunk / uint32_t(m.element_bytes);
    uint32_t linear = op.shared, index[5] = {};
    for (;;) {
        bool inside = true;
        int64_t offset = 0;
        for (int d = 1; d < m.rank; d++) {
            const int64_t at = int64_t(op.at[d]) + index[d];
            inside = inside && at >= 0 && at < int64_t(m.dim[d]);
            offset += at * int64_t(m.stride[d]);
        }
        for (uint32_t byte = 0; byte < n_inner; byte += kChunk) {
            const int64_t first = int64_t(op.at[0]) + byte / uint32_t(m.element_bytes);
            Chunk c{swizzled(linear + byte, m.swizzle), 0, 0, nullptr};
            for (int64_t x = first; inside && x < first + int64_t(per_chunk); x++) {
                if (x < 0) c.lead += m.element_bytes;
                if (x >= 0 && x < int64_t(m.dim[0])) c.valid += m.element_bytes;
            }
            if (c.valid > 0) c.global = m.base + offset + first * m.element_bytes + c.lead;
            f(c);
        }
        linear += n_inner;
        int d = 1;
        for (; d < m.rank && ++index[d] == m.box[d]; d++) index[d] = 0;
        if (d >= m.rank) return;
    }
}

std::shared_ptr<TmaOp> make_op(const TensorMap* map, uint32_t shared, std::initializer_list<int> at, uintptr_t pc) {
    if (int(at.size()) != map->rank) fail("memcheck", "TMA: the instruction's rank is not the tensor map's");
    if (shared % 128) fail("memcheck", "TMA: the shared address is not aligned to 128 bytes");
    const uint32_t n_inner = map->box[0] * uint32_t(map->element_bytes);
    if (n_inner % kChunk || (map->swizzle && n_inner > 16u << map->swizzle))
        fail("memcheck", "TMA: an inner box of " + std::to_string(n_inner) + " bytes does not fit the swizzle");
    auto op = std::make_shared<TmaOp>();
    op->map = *map;
    op->shared = shared;
    op->pc = pc;
    std::copy(at.begin(), at.end(), op->at);
    return op;
}

template <class T>
void add_elements(uint8_t* to, const uint8_t* from, int n_bytes) {
    for (int i = 0; i < n_bytes; i += int(sizeof(T))) {
        T a, b;
        std::memcpy(&a, from + i, sizeof a);
        std::memcpy(&b, to + i, sizeof b);
        b = T(float(a) + float(b));
        std::memcpy(to + i, &b, sizeof b);
    }
}

void read_source(TmaOp& op) {
    if (!op.bytes.empty()) return;
    for_box(op, [&](const Chunk& c) {
        const uint8_t* from = block().arena + c.shared;
        op.bytes.insert(op.bytes.end(), from, from + kChunk);
    });
}
void land_store(TmaOp& op) {
    read_source(op);
    size_t at = 0;
    for_box(op, [&](const Chunk& c) {
        const uint8_t* from = &op.bytes[at] + c.lead;
        at += kChunk;
        if (!c.global) return;
        if (!op.add)
            std::memcpy(c.global, from, size_t(c.valid));
        else if (op.map.element_bytes == 4)
            add_elements<float>(c.global, from, c.valid);
        else
            add_elements<bf16>(c.global, from, c.valid);
    });
}

void land_load(const TmaOp& op) {
    Block& b = block();
    Mbarrier& m = find_mbarrier(op.mbarrier);
    const int agent = b.tma_agent(m.index);
    if (b.racecheck) {
        if (m.arriving_epoch != b.epoch) {
            m.arriving.assign(size_t(b.n_agents), 0);
            m.arriving_epoch = b.epoch;
        }
        m.arriving[size_t(agent)] = ++m.tma_clock;
    }
    for_box(op, [&](const Chunk& chunk) {
        uint8_t* to = b.arena + chunk.shared;
        std::memset(to, 0, kChunk);
        if (chunk.global) std::memcpy(to + chunk.lead, chunk.global, size_t(chunk.valid));
        add_transaction_bytes(m, -int64_t(kChunk));
        if (!b.racecheck) return;
        for_cells(to, kChunk, [&](Cell& c) {
            c.pending_write = false;
            c.written = true;
            c.write_epoch = b.epoch;
            c.write_block = 1;
            c.writer = uint16_t(agent);
            c.write_clock = m.tma_clock;
            c.write_generic = false;
            c.write_pc = op.pc;
        });
    });
    complete_phase(m);
}
}  // namespace

uint32_t swizzled(uint32_t address, int mode) {
    constexpr uint32_t kRows[] = {0, 1, 3, 7};
    return address ^ (address >> 7 & kRows[mode]) << 4;
}

void tma_load(uint32_t to, const TensorMap* map, uint32_t mbarrier, std::initializer_list<int> at) {
    const uintptr_t pc = CALLER_PC();
    Block& b = block();
    find_mbarrier(mbarrier);
    const auto op = make_op(map, to, at, pc);
    op->mbarrier = mbarrier;
    for_box(*op, [&](const Chunk& chunk) {
        uint8_t* p = shared_pointer(chunk.shared);
        check_bounds(p, kChunk, "TMA load");
        if (b.racecheck) {
            check_access({p, kChunk, true, pc, int(self().lin)});
            for_cells(p, kChunk, [](Cell& c) { c.pending_write = true; });
        }
        std::memset(p, 0xFF, kChunk);
    });
    b.in_flight.push_back(op);
}

void tma_store(const TensorMap* map, uint32_t from, std::initializer_list<int> at, bool add) {
    const uintptr_t pc = CALLER_PC();
    Block& b = block();
    const int thread = int(self().lin);
    const auto op = make_op(map, from, at, pc);
    op->store = true;
    op->add = add;
    for_box(*op, [&](const Chunk& chunk) {
        uint8_t* p = shared_pointer(chunk.shared);
        check_bounds(p, kChunk, "TMA store");
        if (!b.racecheck) return;
        check_access({p, kChunk, false, pc, thread});
        check_proxy_fence(p, kChunk, pc, "TMA store");
        for_cells(p, kChunk, [&](Cell& c) {
            c.pending_reads++;
            c.read_pc = pc;
        });
        if (!chunk.global) return;
        check_access({chunk.global, size_t(chunk.valid), true, pc, thread, add});
        if (!add)  // stores that add may meet in one element
            for_cells(chunk.global, size_t(chunk.valid), [](Cell& c) { c.pending_write = true; });
    });
    self().bulk.push_back(op);
    b.in_flight.push_back(op);
}

void run_tma(TmaOp& op) {
    if (op.done) return;
    op.done = true;
    if (op.store)
        land_store(op);
    else
        land_load(op);
}

void bulk_commit() {
    Thread& t = self();
    t.bulk_groups.push_back(std::move(t.bulk));
    t.bulk.clear();
}

bool reads_of_bulk_are_open() {
    const Thread& t = self();
    const auto any_open = [](const TmaGroup& group) {
        return std::any_of(group.begin(), group.end(), [](const auto& op) { return !op->waited; });
    };
    return any_open(t.bulk) || std::any_of(t.bulk_groups.begin(), t.bulk_groups.end(), any_open);
}

// Shared memory may be written again.  Global memory need not have the bytes yet.
void bulk_wait_read(int n_left) {
    Thread& t = self();
    for (size_t g = 0; int(t.bulk_groups.size() - g) > n_left; g++)
        for (const auto& op : t.bulk_groups[g]) {
            if (std::exchange(op->waited, true)) continue;
            read_source(*op);
            if (!block().racecheck) continue;
            for_box(*op, [](const Chunk& chunk) {
                for_cells(block().arena + chunk.shared, kChunk, [](Cell& c) {
                    if (c.pending_reads) c.pending_reads--;
                });
            });
        }
}

void bulk_wait(int n_left) {
    Block& b = block();
    Thread& t = self();
    bulk_wait_read(n_left);
    while (int(t.bulk_groups.size()) > n_left) {
        for (const auto& op : t.bulk_groups.front()) {
            run_tma(*op);
            if (!b.racecheck || op->add) continue;
            for_box(*op, [&](const Chunk& chunk) {
                if (!chunk.global) return;
                for_cells(chunk.global, size_t(chunk.valid), [&](Cell& c) {  // from now on the thread's own write
                    c.pending_write = false;
                    c.write_epoch = b.epoch;
                    c.writer = uint16_t(t.lin);
                    c.write_clock = t.now;
                    c.write_time = b.time;
                });
            });
        }
        t.bulk_groups.pop_front();
    }
}
}  // namespace emulator
