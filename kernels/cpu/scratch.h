// Working memory of an op on the host, one block per thread, kept between calls.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <memory>

#include "common/error.h"

namespace cpu {
// n elements of T on a 64-byte boundary, contents undefined, valid until this thread asks again.
template <class T>
T* scratch(size_t n) {
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    static thread_local std::unique_ptr<void, Free> block;
    static thread_local size_t n_bytes = 0;
    if (const size_t wanted = (n * sizeof(T) + 63) / 64 * 64; wanted > n_bytes) {
        block.reset(std::aligned_alloc(64, wanted));
        n_bytes = block ? wanted : 0;
        if (!block) fail(Exit::memory, "out of memory: the host has no {} bytes left for an op's scratch", wanted);
    }
    return static_cast<T*>(block.get());
}
// A row of n elements rounded up to whole 64-byte lines.
template <class T>
constexpr size_t padded(size_t n) {
    return (n * sizeof(T) + 63) / 64 * 64 / sizeof(T);
}
}  // namespace cpu
