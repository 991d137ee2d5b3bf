// The runtime of -fsanitize=thread, for the race build: the compiler calls these functions at every access to memory
// that is not a local variable, and the program is linked without libtsan.  Called from host code, which shares its
// object files with the kernels, the functions do nothing.
//
// objcopy redirects memcpy, memmove and memset to this file (see the Makefile): compilers turn copies of structs into
// such calls.
#include <cstring>

#include "state.h"

namespace emulator {
void memory_hook(const void* p, size_t n_bytes, bool write, bool atomic, uintptr_t pc) {
    if (!in_kernel()) return;
    Block& b = block();
    if (b.in_hook) return;
    b.in_hook = true;
    b.stats.hooks++;
    const Thread& t = self();
    if (b.racecheck) check_access({p, n_bytes, write, pc, int(t.lin), atomic});
    if (b.counting) count_access(t, p, n_bytes, write, pc);
    b.in_hook = false;
    if (b.preempt && b.random && b.draw() % uint64_t(b.preempt) == 0) reschedule();
}

namespace {
// Entry points without "unaligned" in their name promise natural alignment; a misaligned access would fault on a GPU.
void check_natural_alignment(const void* p, size_t n_bytes, uintptr_t pc) {
    if (reinterpret_cast<uintptr_t>(p) % n_bytes == 0 || !in_kernel() || !block().racecheck || block().in_hook) return;
    block().in_hook = true;
    report("memcheck", pc, 6, [&] {
        return "misaligned " + std::to_string(n_bytes) + "-byte access at " + object_name(p) + " by " +
               agent_name(int(self().lin)) + " [" + place(pc) + "]";
    });
    block().in_hook = false;
}
template <class T>
T load(const void* p, uintptr_t pc) {
    memory_hook(p, sizeof(T), false, false, pc);
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class T>
void store(void* p, T v, uintptr_t pc) {
    memory_hook(p, sizeof(T), true, false, pc);
    std::memcpy(p, &v, sizeof v);
}
}  // namespace

Bytes8 load_bytes8(const void* p) { return load<Bytes8>(p, CALLER_PC()); }
Bytes16 load_bytes16(const void* p) { return load<Bytes16>(p, CALLER_PC()); }
void store_bytes8(void* p, Bytes8 v) { store(p, v, CALLER_PC()); }
void store_bytes16(void* p, Bytes16 v) { store(p, v, CALLER_PC()); }
}  // namespace emulator

using emulator::memory_hook;

#define HOOK(p, n, write) memory_hook(p, n, write, false, CALLER_PC())
#define ACCESS_HOOKS(N)                                           \
    void __tsan_read##N(void* p) {                                \
        emulator::check_natural_alignment(p, N, CALLER_PC());     \
        HOOK(p, N, false);                                        \
    }                                                             \
    void __tsan_write##N(void* p) {                               \
        emulator::check_natural_alignment(p, N, CALLER_PC());     \
        HOOK(p, N, true);                                         \
    }                                                             \
    void __tsan_unaligned_read##N(void* p) { HOOK(p, N, false); } \
    void __tsan_unaligned_write##N(void* p) { HOOK(p, N, true); } \
    void __tsan_volatile_read##N(void* p) { HOOK(p, N, false); }  \
    void __tsan_volatile_write##N(void* p) { HOOK(p, N, true); }  \
    void __tsan_read_write##N(void* p) {                          \
        HOOK(p, N, false);                                        \
        HOOK(p, N, true);                                         \
    }                                                             \
    void __tsan_unaligned_read_write##N(void* p) {                \
        HOOK(p, N, false);                                        \
        HOOK(p, N, true);                                         \
    }

// Atomics of host code, such as a static variable's guard.  Kernels use CUDA's atomics, functions of the emulator.
#define ATOMIC_HOOKS(BITS, T)                                                                                         \
    T __tsan_atomic##BITS##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }           \
    void __tsan_atomic##BITS##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }           \
    T __tsan_atomic##BITS##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); } \
    T __tsan_atomic##BITS##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
    T __tsan_atomic##BITS##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); } \
    T __tsan_atomic##BITS##_fetch_or(volatile T* p, T v, int) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }   \
    T __tsan_atomic##BITS##_fetch_and(volatile T* p, T v, int) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); } \
    int __tsan_atomic##BITS##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) {                    \
        return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                \
    }                                                                                                                 \
    int __tsan_atomic##BITS##_compare_exchange_weak(volatile T* p, T* expected, T v, int, int) {                      \
        return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                \
    }                                                                                                                 \
    T __tsan_atomic##BITS##_compare_exchange_val(volatile T* p, T expected, T v, int, int) {                          \
        __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                      \
        return expected;                                                                                              \
    }

extern "C" {
// Called by each instrumented file before main: this program's kernels have the hooks.
void __tsan_init() { emulator::config().racecheck = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
ACCESS_HOOKS(1)
ACCESS_HOOKS(2)
ACCESS_HOOKS(4)
ACCESS_HOOKS(8)
ACCESS_HOOKS(16)
void __tsan_read_range(void* p, unsigned long n) { HOOK(p, n, false); }
void __tsan_write_range(void* p, unsigned long n) { HOOK(p, n, true); }
void* __tsan_memcpy(void* to, const void* from, size_t n) {
    HOOK(from, n, false);
    HOOK(to, n, true);
    return std::memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
    HOOK(from, n, false);
    HOOK(to, n, true);
    return std::memmove(to, from, n);
}
void* __tsan_memset(void* to, int v, size_t n) {
    HOOK(to, n, true);
    return std::memset(to, v, n);
}
ATOMIC_HOOKS(8, unsigned char)
ATOMIC_HOOKS(16, unsigned short)
ATOMIC_HOOKS(32, unsigned)
ATOMIC_HOOKS(64, unsigned long)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}
}
