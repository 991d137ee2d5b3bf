// Shared by the emulator's files: the state of the block that an OS thread runs, and the calls between the files.
//
//   scheduler.cpp  who runs next, one block from start to end       launch.cpp   a grid over OS threads, configuration
//   fiber.cpp      the context switch                               memory.cpp   device and shared memory, their bounds
//   sync.cpp       collectives of a warp, barriers of a block       report.cpp   reports, names of places
//   async.cpp      cp.async, mbarrier      tma.cpp   TMA            race.cpp     vector clocks, shadow memory
//   mma.cpp        mma.sync, ldmatrix      wgmma.cpp Hopper's mma   hooks.cpp    hooks that instrumented kernels call
//   warpgroup.cpp  agreement of a warpgroup, setmaxnreg             counters.cpp sectors and bank conflicts
//
// These files are compiled without instrumentation.  Code that touches memory on behalf of a kernel stands here and not
// in the headers: there it would be instrumented with the kernel, and reports would blame the last lane.
#pragma once
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>

#include "emulator.h"

#ifndef EMULATOR_ASAN
#define EMULATOR_ASAN 0  // 1: the kernels are compiled for ASan; announce fibers, poison by hand
#endif
#if EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#endif
#if !defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT 1
#endif
#ifndef EMULATOR_UCONTEXT
#define EMULATOR_UCONTEXT 0
#endif
#if EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

// The return address of the function that uses the macro: a place in the kernel.
#define CALLER_PC() (reinterpret_cast<uintptr_t>(__builtin_return_address(0)))

namespace emulator {
constexpr size_t kArenaBytes = 256 * 1024;  // a block's window of shared memory; addresses are offsets in it
constexpr size_t kSharedBase = 1024;        // dynamic shared memory starts here, static arrays follow
constexpr size_t kMaxDynamicShared = 227 * 1024;
constexpr size_t kRedzone = 256;  // bytes on each side of a device buffer, which catch a near miss
constexpr uint32_t kFullMask = 0xffffffffu;
constexpr int kMaxWarps = 32, kMaxMbarriers = 64, kBarriers = 16;

// ---- what a thread, a warp and a block own ----
struct CopyOp {  // one cp.async
    void* to;
    const void* from;
    int n_bytes, n_source_bytes;
    bool done;
};
struct TmaOp {
    TensorMap map;
    uint32_t shared, mbarrier;
    int at[5];
    bool store, add, done;
    uintptr_t pc;
    // A store reads shared memory first; until then the bytes are empty.  Then it writes global memory, and is done.
    std::vector<uint8_t> bytes;
    bool waited = false;  // for its reads, by wait_group.read or wait_group
};
using TmaGroup = std::vector<std::shared_ptr<TmaOp>>;

struct Thread : Fiber {
    void* stack_pointer = nullptr;  // while the thread does not run
    uint8_t* stack = nullptr;
    void* fake_stack = nullptr;  // ASan's
    bool fresh = true;           // needs a new stack frame before it can run
#if EMULATOR_UCONTEXT
    ucontext_t context;
#endif
    const char* waits_in = "";  // for the deadlock report
    uintptr_t waits_at = 0;
    std::vector<CopyOp> copies;  // cp.async since the last commit
    std::deque<std::vector<CopyOp>> copy_groups;
    TmaGroup bulk;
    std::deque<TmaGroup> bulk_groups;
    std::vector<uint32_t> clock;  // by agent: its last known clock; valid when clock_epoch is the block's epoch
    uint32_t clock_epoch = 0, now = 1;
    uint64_t fenced_at = 0;      // time of the thread's last fence.proxy.async
    bool thread_fenced = false;  // has executed __threadfence
};

struct Collective {  // lanes of one warp that wait for each other
    uint32_t mask, arrived;
    const char* op;
    void* arguments[32];
};
struct Accumulator {  // of wgmma: values by lane, and the registers that the values return to
    std::vector<float> values;
    float* registers[32];
    int n;  // values per lane
};
struct WgmmaOp {
    int n;
    std::shared_ptr<Accumulator> accumulator;
    uint32_t a_registers[32][4];
    const uint32_t* a_at[32];  // the kernel's registers that a_registers was copied from
    bool a_in_registers;
    uint64_t a, b;  // descriptors
    int scale_d, transpose_a, transpose_b;
    int first_row;  // first of this warp's 16 rows of A
};
struct Warp {
    uint32_t runnable = 0, live = 0;
    Collective collectives[32];
    int n_collectives = 0;
    std::vector<WgmmaOp> wgmma;
    std::deque<std::vector<WgmmaOp>> wgmma_groups;
    bool wgmma_fenced = false;
    int registers = 0;                  // of each thread by setmaxnreg; 0: as launched
    uint64_t n_group_instructions = 0;  // executed so far, of those that a whole warpgroup executes
    uint32_t wgmma_clock = 0;
};
constexpr int kWarpsOfGroup = 4;
struct GroupInstruction {
    std::string name;  // with its operands, as far as the warps of a group must agree on these
    uintptr_t pc;      // of the first warp; the compiler may have copied the instruction for another one
    bool operator==(const GroupInstruction& other) const { return name == other.name; }
};
struct Warpgroup {
    uint64_t n_common = 0;               // instructions that all four warps have executed
    std::deque<GroupInstruction> ahead;  // later ones, which at least one warp has executed
};
struct Barrier {
    int count = -1, arrived = 0;  // count -1: nobody has arrived
    uint32_t waiting[kMaxWarps] = {};
    std::vector<int> participants;
    uintptr_t first_pc = 0;
    int n_votes = 0, votes = 0, result = 0;
};
struct Mbarrier {
    int64_t expected = 0, pending = 0, transaction_bytes = 0;
    uint32_t phase = 0, index = 0;
    // By agent: the clocks known to the arrivals of this phase, and of the last complete one; each valid for one epoch.
    std::vector<uint32_t> arriving, released;
    uint32_t arriving_epoch = 0, released_epoch = 0, tma_clock = 0;
    uint32_t waiting[kMaxWarps] = {};
};
struct StaticShared {
    const void* tag;
    size_t offset, n_bytes;
};

// ---- the race check ----
struct Read {
    uint16_t agent;
    uint32_t clock;
    int32_t next;
    uintptr_t pc;
};
// Shadow of one granule of two bytes.  Agents: the block's threads, then one per warp for wgmma's reads, then one per
// mbarrier for TMA's writes.
struct Cell {
    uint64_t owner = 0;  // the block (shared) or launch (global) that the other fields belong to; else they are stale
    uint32_t write_block = 0, write_epoch = 0, write_clock = 0, read_epoch = 0, read_block = 0;
    uint16_t writer = 0;
    uint16_t pending_reads = 0;  // wgmma and TMA stores in flight
    bool written = false, write_atomic = false, pending_write = false, write_generic = false;
    bool any_read = false, many_readers = false;  // many: in more than one block
    int32_t first_read = -1;                      // list in Block::reads, of the epoch read_epoch
    uint64_t write_time = 0;
    uintptr_t write_pc = 0, read_pc = 0;
};
constexpr int kGranule = 2;

struct FreeMemory {
    void operator()(void* p) const { std::free(p); }
};
struct DeviceBuffer {
    uint8_t* p;
    size_t n_bytes;
    // Made at the first checked access, by calloc: stale cells are all zero, and the system makes only the pages that
    // are used.  Many times as large as the buffer.
    std::unique_ptr<Cell[], FreeMemory> cells;
};

struct Request;
struct AccessSite;

// The block that an OS thread runs; the object is used again for the thread's next block.
struct Block {
    BlockInfo info{};
    const std::function<void()>* body = nullptr;
    const void* kernel = nullptr;
    std::vector<Thread> threads;
    Thread main;  // the OS thread itself
    Warp warps[kMaxWarps];
    Warpgroup warpgroups[kMaxWarps / kWarpsOfGroup];
    int free_registers = 0;  // given up by setmaxnreg.dec
    uint32_t wait_for_registers[kMaxWarps] = {};
    Barrier barriers[kBarriers];
    std::map<uint32_t, Mbarrier> mbarriers;        // by address
    std::deque<std::shared_ptr<TmaOp>> in_flight;  // TMA copies; the scheduler decides when each lands
    int n_threads = 0, n_warps = 0, live = 0, current_warp = 0;

    Order order{};
    bool racecheck = false, random = false, counting = false;
    int preempt = 0;
    uint64_t rng = 1, spins = 0;
    uint64_t draw() {
        rng ^= rng << 13;
        rng ^= rng >> 7;
        rng ^= rng << 17;
        return rng;
    }

    uint8_t* arena = nullptr;
    size_t n_dynamic_shared = 0, n_static_shared = 0, shared_limit = 0, arena_used = 0;
    std::vector<StaticShared> static_arrays;
    DeviceBuffer *last_buffer = nullptr, *recent[4] = {};
    unsigned n_recent = 0;

    uint64_t serial = 0;  // names this block in cells of shared memory
    uint32_t number = 0;  // place in the grid, from 1: names this block in cells of global memory
    uint32_t epoch = 1;   // one more at each barrier of all threads: accesses of older epochs are ordered
    uint64_t time = 1;    // orders writes and proxy fences
    int n_agents = 0;
    std::set<uint32_t> known_blocks;  // blocks whose writes are ordered before this block's next accesses
    std::vector<Cell> cells;          // of the arena
    std::vector<Read> reads;
    bool in_hook = false;  // hooks do nothing: the linker may take our std:: templates from an instrumented file

    std::unordered_map<uintptr_t, std::shared_ptr<AccessSite>> sites[kMaxWarps];
    KernelCounters counted;
    Stats stats;

    bool failed = false;
    std::string failure, failure_kind;
    void* main_stack = nullptr;
    size_t main_stack_bytes = 0;

    bool in_arena(const void* p) const { return offset(p) < kArenaBytes; }
    size_t offset(const void* p) const { return size_t(static_cast<const uint8_t*>(p) - arena); }
    int wgmma_agent(unsigned warp) const { return n_threads + int(warp); }
    int tma_agent(uint32_t mbarrier) const { return n_threads + kMaxWarps + int(mbarrier); }
};
extern thread_local Block* t_block;  // set while fibers run
inline Block& block() { return *t_block; }
inline Thread& self() { return *static_cast<Thread*>(t_cur); }
inline Warp& own_warp() { return block().warps[self().warp]; }
// True in a kernel's thread, false in host code of the same object file.
inline bool in_kernel() { return t_block && t_cur && t_cur != &t_block->main; }

// ---- fiber.cpp ----
extern const size_t kStackBytes;
void make_stack(Thread& t);
void reset_fiber(Thread& t, void (*entry)());
void enter_fiber();  // first thing that a new fiber does
void switch_fiber(Thread& from, Thread& to);
void note_main_stack(Block& b);

// ---- scheduler.cpp ----
void reschedule();  // lets another thread run; returns when this one is picked again
void park(const char* waits_in, uintptr_t waits_at);
void wake(uint32_t (&waiting)[kMaxWarps]);
void run_block(Block& b, dim3 grid, dim3 block_dim, uint64_t number, size_t n_shared_bytes);

// ---- sync.cpp ----
void collective_at(const char* op, uint32_t mask, void* argument, CollectiveBody body, uintptr_t pc);
void release_if_all_arrived();  // called when a thread exits: __syncthreads may have waited for this thread alone

// ---- async.cpp, tma.cpp, wgmma.cpp, warpgroup.cpp ----
Mbarrier& find_mbarrier(uint32_t address);
void complete_phase(Mbarrier& b);
void run_tma(TmaOp& op);
bool reads_of_bulk_are_open();  // of stores that the thread has not waited for
void add_transaction_bytes(Mbarrier& m, int64_t n_bytes);
void join_warpgroup(const GroupInstruction& own);  // once for each warp
void check_warpgroups();                           // at the end of a block
uint32_t swizzled(uint32_t address, int mode);
void finish_thread();  // completes and reports what an exiting thread leaves in flight

// ---- memory.cpp ----
struct BufferTable {
    std::map<uintptr_t, std::unique_ptr<DeviceBuffer>> by_address;
    std::mutex mutex;
};
BufferTable& device_buffers();
uint8_t* shared_pointer(uint32_t address);
void check_bounds(const void* p, size_t n_bytes, const char* what);  // fails the launch, in every build
const DeviceBuffer* find_buffer(const void* p, size_t n_bytes);      // the buffer that holds all n_bytes, or null
bool inside_shared_array(size_t offset, size_t n_bytes);
void prepare_arena(Block& b, size_t n_shared_bytes);
void check_redzones();  // reports what a launch wrote past device buffers
void poison(const void* p, size_t n_bytes);
void unpoison(const void* p, size_t n_bytes);

// ---- report.cpp ----
std::string place(uintptr_t pc);         // "layernorm.cu:40", with the chain of inlined calls
std::string agent_name(int agent);       // "thread (3,0,0)"
std::string object_name(const void* p);  // "dynamic shared +64"
std::string coordinates(uint3 c);
void add_report(const std::string& kind, const std::string& text);
bool is_new_report(uintptr_t pc, uintptr_t other_pc);
// make() builds the text.  Called only for a pair of places that was not reported yet: a racy loop meets the same pair
// a million times.
template <class Make>
void report(const char* kind, uintptr_t pc, uintptr_t other_pc, Make make) {
    if (is_new_report(pc, other_pc))
        add_report(kind, std::string(kind) + " in block " + coordinates(block().info.bid) + ": " + make());
}

// ---- race.cpp ----
struct Access {
    const void* p;
    size_t n_bytes;
    bool write;
    uintptr_t pc;
    int agent;
    bool atomic = false;
    const uint32_t* clock = nullptr;  // by agent: the clocks known to `agent`; null: those known to the thread
};
uint32_t* clock_of(int thread);
void join(uint32_t* into, const uint32_t* from);
void order_threads(const std::vector<int>& threads);  // orders all their accesses so far before all later ones
void order_lanes(uint32_t mask);                      // likewise for lanes of the own warp
void check_access(const Access& a);
void check_proxy_fence(const void* p, size_t n_bytes, uintptr_t pc, const char* what);
void record_read(Cell& c, int agent, uint32_t clock, uintptr_t pc);
void start_launch_shadow();
uint64_t shadow_owner(bool shared);
struct CellRange {
    Cell* first;
    size_t count;
    bool shared;
};
CellRange cells_of(const void* p, size_t n_bytes);  // empty when p is not tracked
template <class F>
void for_cells(const void* p, size_t n_bytes, F f) {
    const CellRange range = cells_of(p, n_bytes);
    const uint64_t owner = shadow_owner(range.shared);
    for (size_t i = 0; i < range.count; i++) {
        Cell& c = range.first[i];
        if (c.owner != owner) {
            c = Cell{};
            c.owner = owner;
        }
        f(c);
    }
}

// ---- counters.cpp ----
void count_access(const Thread& t, const void* p, size_t n_bytes, bool write, uintptr_t pc);
void count_matrix(const uint8_t* const (&rows)[8]);  // one 8x8 matrix of ldmatrix or stmatrix
void flush_counters(unsigned warp);                  // the warp's lanes have met: their k-th executions belong together
void add_counters(const void* kernel, const KernelCounters& counted, bool launch);

// ---- hooks.cpp ----
void memory_hook(const void* p, size_t n_bytes, bool write, bool atomic, uintptr_t pc);
}  // namespace emulator
