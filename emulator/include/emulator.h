// The SIMT emulator: runs a grid block by block, a block's threads as fibers of one OS thread, and finds
//
//   in every build           deadlocks, divergent warps and barriers, misuse of masks, barriers and mbarriers,
//                            misaligned vectors, out-of-bounds cp.async, TMA, ldmatrix and wgmma, writes that hit the
//                            red zones of device buffers, reads of data that an asynchronous copy has yet to deliver
//   in the race build        data races, reads of shared memory never written, accesses out of bounds, missing proxy
//                            fences: kernels are compiled with -fsanitize=thread, and hooks.cpp stands in for its
//                            runtime
//   in the sanitizer build   all that ASan and UBSan see
//
// Environment, for any binary that runs kernels here:
//   KILN_EMULATOR_ORDER=sequential|reverse|random    which thread runs next (default sequential)
//   KILN_EMULATOR_SEED=n       seed of the random order; implies random; if absent, drawn and printed with a failure
//   KILN_EMULATOR_THREADS=n    OS threads that run blocks (default 1)
//   KILN_EMULATOR_PREEMPT=n    random order, race build: a thread also yields at one of n memory accesses
//   KILN_EMULATOR_COUNTERS=1   prints the counters of each kernel at exit
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <initializer_list>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "vector_types.h"

namespace emulator {
// ---- control ----
enum class Order { Sequential, Reverse, Random };
struct Config {
    Order order = Order::Sequential;
    uint64_t seed = 1;
    int threads = 1;          // OS threads that run blocks; one while racecheck or counters are on
    bool racecheck = false;   // on from the start when the kernels were compiled with the hooks
    bool strict_warp = true;  // false: a collective of the whole warp also orders memory, which PTX does not promise
    bool initcheck = true;    // with racecheck: report reads of shared memory that was never written
    bool counters = false;    // count sectors and bank conflicts per kernel
    int preempt = 0;          // random order and hooks: yield at 1/preempt of the memory accesses
    bool fatal = true;        // a launch with reports throws; false: the reports wait for take_reports()
    size_t max_reports = 8;
};
Config& config();

// Kind: racecheck, memcheck, initcheck, synccheck, proxycheck or deadlock.
struct Report {
    std::string kind, text;
};
std::vector<Report> take_reports();

// Thrown by a failed launch; the message has the kernel, the schedule that failed and every report.
struct Error : std::exception {
    std::string m;
    explicit Error(std::string message) : m(std::move(message)) {}
    const char* what() const noexcept override { return m.c_str(); }
};

struct Stats {
    uint64_t blocks = 0, threads = 0, switches = 0, collectives = 0, barriers = 0;
    uint64_t hooks = 0;  // instrumented accesses: 0 unless the kernels were compiled for the race check
    double seconds = 0;
};
Stats& stats();

// One request is one instruction of one warp.  Ideal: 4 sectors per request of 32 lanes x 4 bytes, no conflict cycles.
// Bytes are those that the lanes ask for, counted once where several lanes want the same: a request is coalesced when
// its bytes fill its sectors.
struct KernelCounters {
    uint64_t launches = 0;
    uint64_t global_loads = 0, global_load_sectors = 0, global_load_bytes = 0;  // sectors of 32 bytes
    uint64_t global_stores = 0, global_store_sectors = 0, global_store_bytes = 0;
    uint64_t shared_accesses = 0, shared_conflict_cycles = 0;  // extra cycles by bank conflicts
};
std::map<std::string, KernelCounters> counters();  // by kernel name
void reset_counters();

// ---- the CUDA runtime stand-in ----
// Queues a launch on a stream; the kernel runs when the stream reaches it.
cudaError_t enqueue_kernel(const void* kernel, dim3 grid, dim3 block, size_t n_shared_bytes, cudaStream_t stream,
                           std::function<void()> body);
// Runs a grid to its end; body() is the work of one thread.  `kernel` only gives messages and counters a name;
// static and dynamic shared memory together must not exceed `shared_limit` bytes.
void launch_impl(dim3 grid, dim3 block, size_t n_shared_bytes, const std::function<void()>& body,
                 const void* kernel = nullptr, size_t shared_limit = 227 << 10);
std::string name_of_kernel(const void* kernel);
// Device memory between red zones, filled with NaN.
void* dev_alloc(size_t n_bytes);
void dev_free(void* p);

// ---- building blocks of cuda_emulator.h and ptx.cuh: called by a kernel's threads only ----
struct Fiber {
    uint3 tid;
    unsigned lin, warp, lane;
};
struct BlockInfo {
    uint3 bid;
    dim3 bdim, gdim;
};
extern __thread Fiber* t_cur;
extern __thread BlockInfo* t_blk;

void* static_shared(const void* tag, size_t n_bytes, size_t align);
void* dyn_shared();
uint32_t cvta_shared(const void* p);

// Every lane in mask calls; the last one to arrive runs body(arguments by lane, mask) for all.
using CollectiveBody = void (*)(void* const* arguments, uint32_t mask);
void warp_collective(const char* op, uint32_t mask, void* argument, CollectiveBody body);
void warp_fence(uint32_t mask);        // __syncwarp
void bar_sync(int id, int n_threads);  // n_threads 0: all threads that have not exited
void bar_arrive(int id, int n_threads);
enum class Reduce { count, all, any };
int bar_reduce(int predicate, Reduce op);
void spin_yield();
void thread_fence();
void proxy_fence();
uint64_t global_ns();  // of the host's clock
[[noreturn]] void fail(const char* kind, const std::string& message);

[[noreturn]] void fail_misaligned(const void* p, size_t n_bytes);
inline void check_aligned(const void* p, size_t n_bytes) {
    if (reinterpret_cast<uintptr_t>(p) % n_bytes) fail_misaligned(p, n_bytes);
}
// Vector accesses of instrumented kernels: one access of the whole size for the race check and the counters, where the
// compiler would split a copy of a struct.
struct Bytes8 {
    uint64_t a;
};
struct Bytes16 {
    uint64_t a, b;
};
Bytes8 load_bytes8(const void* p);
Bytes16 load_bytes16(const void* p);
void store_bytes8(void* p, Bytes8 v);
void store_bytes16(void* p, Bytes16 v);
void atomic_hook(const void* p, size_t n_bytes);

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b);
void matrix_load(const char* op, uint32_t* registers, const void* row, int count, bool transposed);
void matrix_store(const char* op, const uint32_t* registers, void* row, int count, bool transposed);

void cp_async(void* to, const void* from, int n_bytes, int n_source_bytes);  // the remaining bytes become zero
void cp_async_commit();
void cp_async_wait(int n_left);
void setmaxnreg(bool increase, int n);  // registers of each thread; an increase waits for them
void mbar_init(uint32_t address, unsigned count);
void mbar_inval(uint32_t address);
void mbar_arrive(uint32_t address, unsigned count, int64_t expect_tx);
void mbar_expect_tx(uint32_t address, int64_t n_bytes);
bool mbar_try_wait(uint32_t address, unsigned parity);

struct TensorMap {
    uint8_t* base;
    int rank, element_bytes;
    int swizzle;                 // 0: none, 1: 32 bytes, 2: 64, 3: 128
    uint64_t dim[5], stride[5];  // dim[0] is contiguous; strides in bytes
    uint32_t box[5];
};
void tma_load(uint32_t to, const TensorMap* map, uint32_t mbarrier, std::initializer_list<int> at);
void tma_store(const TensorMap* map, uint32_t from, std::initializer_list<int> at, bool add);
void bulk_commit();
void bulk_wait(int n_left);
void bulk_wait_read(int n_left);

// a_registers null: A comes from shared memory by its descriptor `a`.  transpose: 1 for an operand that is MN-major.
void wgmma_issue(int n, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, int scale_d, int transpose_a,
                 int transpose_b);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int n_left);
}  // namespace emulator
