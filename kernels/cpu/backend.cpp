// The CPU backend's table and memory: 64-byte aligned and exactly as long as asked for, so that ASan sees overruns.
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/arena.h"
#include "kernels/cpu/cpu.h"

namespace {
constexpr size_t kAlign = 64;               // a cache line, an AVX-512 register
constexpr size_t kPiece = size_t(1) << 22;  // bytes cleared by one task: large blocks are first touched by all threads

void* alloc(size_t n_bytes) {
    void* p = nullptr;
    const bool possible = n_bytes <= size_t(PTRDIFF_MAX);
    if (!possible || posix_memalign(&p, kAlign, n_bytes ? n_bytes : 1) != 0)
        fail(Exit::memory,
             "out of memory: the host has no {} ({} bytes) left; use a smaller train.micro_batch_size or model",
             human_bytes(n_bytes), n_bytes);
    return p;
}

void zero(void* to, size_t n_bytes, Stream) {
    const size_t pieces = (n_bytes + kPiece - 1) / kPiece;
#pragma omp parallel for schedule(static) if (pieces > 1)
    for (size_t i = 0; i < pieces; i++) {
        const size_t begin = i * kPiece, left = n_bytes - begin;
        std::memset(static_cast<char*>(to) + begin, 0, left < kPiece ? left : kPiece);
    }
}

void transfer(void* to, const void* from, size_t n_bytes, Stream) {
    if (n_bytes) std::memcpy(to, from, n_bytes);
}
void synchronize(Stream) {}
Stream open_stream() { return nullptr; }  // the CPU's work is done when a call returns
void close_stream(Stream) {}
void take_workspace(Stream) {}
}  // namespace

struct Mark {
    std::chrono::steady_clock::time_point at;
};

namespace {
Mark* new_mark() { return new Mark; }
void free_mark(Mark* m) { delete m; }
void set_mark(Mark* m, Stream) { m->at = std::chrono::steady_clock::now(); }
void wait_mark(const Mark*) {}
void wait_for(Stream, const Mark*) {}
void wait_for_stream(Stream, Stream) {}
double ms_between(const Mark* from, const Mark* to) {
    return std::chrono::duration<double, std::milli>(to->at - from->at).count();
}
MemoryState memory_state() { return {}; }  // unknown: Linux promises more memory than it has

[[noreturn]] void no_graphs() { fail(Exit::internal, "the CPU backend records no graphs"); }
bool can_record() { return false; }
void begin_graph(Stream) { no_graphs(); }
Graph* end_graph(Stream) { no_graphs(); }
void launch_graph(Graph*, Stream) { no_graphs(); }
void free_graph(Graph*) {}

constexpr Backend make_table() {
    Backend table = {
        .name = "cpu",
        .host_addressable = true,
        .memory = {.alloc = alloc, .free = std::free},
        .host_memory = {.alloc = alloc, .free = std::free},
        .open_stream = open_stream,
        .close_stream = close_stream,
        .take_workspace = take_workspace,
        .zero = zero,
        .upload = transfer,
        .download = transfer,
        .copy = transfer,
        .synchronize = synchronize,
        .new_mark = new_mark,
        .free_mark = free_mark,
        .set_mark = set_mark,
        .wait_mark = wait_mark,
        .wait_for = wait_for,
        .wait_for_stream = wait_for_stream,
        .ms_between = ms_between,
        .memory_state = memory_state,
        .can_record = can_record,
        .begin_graph = begin_graph,
        .end_graph = end_graph,
        .launch_graph = launch_graph,
        .free_graph = free_graph,
        .tune = [](bool) { return std::string(); },
        .choices = [] { return std::string(); },
        .set_choices = [](const std::string&) { return std::string(); },
    };
#define OP_ENTRY(function, Op) table.function = checked<Op, cpu::function>;
    KILN_OPS(OP_ENTRY)
#undef OP_ENTRY
    return table;
}
}  // namespace

const Backend& cpu_backend() {
    static constexpr Backend table = make_table();
    return table;
}
