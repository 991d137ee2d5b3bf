// Fibers: stacks and the switch between them.  A switch costs about 2 ns on x86-64, ucontext's about 180.
#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>

#include "state.h"
#if EMULATOR_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#if !EMULATOR_UCONTEXT
extern "C" void emulator_switch(void** save, void* load);
// The last jump is not a `ret`: the processor predicts returns by a stack of calls, which a switch breaks every time.
asm(R"(
.text
.globl emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size emulator_switch,.-emulator_switch
)");
#endif

namespace emulator {
__thread Fiber* t_cur = nullptr;
__thread BlockInfo* t_blk = nullptr;
thread_local Block* t_block = nullptr;

// Instrumented frames are several times larger.  Pages are only taken when touched.
const size_t kStackBytes = EMULATOR_ASAN ? 512 * 1024 : 128 * 1024;

void make_stack(Thread& t) {
    constexpr size_t kGuard = 4096;
    void* memory =
        mmap(nullptr, kStackBytes + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);
    t.stack = static_cast<uint8_t*>(memory) + kGuard;
}

void reset_fiber(Thread& t, void (*entry)()) {
    unpoison(t.stack, kStackBytes);
    t.fake_stack = nullptr;
    t.fresh = false;
#if EMULATOR_UCONTEXT
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = kStackBytes;
    makecontext(&t.context, entry, 0);
#else
    // Stacks lie at strides of a power of two: without an offset all their tops would share one set of the cache.
    const size_t colour = size_t(t.lin % 61) * 192 + 64;
    const auto top = reinterpret_cast<uintptr_t>(t.stack + kStackBytes - colour) & ~uintptr_t(15);
    void** stack = reinterpret_cast<void**>(top);
    *--stack = nullptr;  // keeps the alignment that a call leaves behind
    *--stack = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--stack = nullptr;  // the registers that a switch restores
    t.stack_pointer = stack;
#endif
}

void note_main_stack([[maybe_unused]] Block& b) {
#if EMULATOR_ASAN
    struct Stack {
        void* start;
        size_t n_bytes;
        Stack() {
            pthread_attr_t attributes;
            pthread_getattr_np(pthread_self(), &attributes);  // reads /proc/self/maps: slow
            pthread_attr_getstack(&attributes, &start, &n_bytes);
            pthread_attr_destroy(&attributes);
        }
    };
    thread_local const Stack stack;  // of this OS thread
    b.main_stack = stack.start, b.main_stack_bytes = stack.n_bytes;
#endif
}

void enter_fiber() {
#if EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void switch_fiber(Thread& from, Thread& to) {
    Block& b = block();
    b.stats.switches++;
#if EMULATOR_ASAN
    const bool home = &to == &b.main;
    __sanitizer_start_switch_fiber(&from.fake_stack, home ? b.main_stack : to.stack,
                                   home ? b.main_stack_bytes : kStackBytes);
#endif
    t_cur = &to;
#if EMULATOR_UCONTEXT
    swapcontext(&from.context, &to.context);
#else
    emulator_switch(&from.stack_pointer, to.stack_pointer);
#endif
#if EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}
}  // namespace emulator
