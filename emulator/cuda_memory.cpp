// Memory of the emulated CUDA runtime.
//
//   - every pointer of a copy is looked up: the kind of memory, whether it is live, whether one allocation holds it all
//   - a copy from pinned memory reads when the stream gets there, a copy from pageable memory at the call
//   - memory begins as NaN, and is NaN again before it is freed
//   - an ASan build reports host code that touches device memory
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>

#include "cuda_state.h"

#if defined(__SANITIZE_ADDRESS__) || EMULATOR_ASAN
#define GUARD_DEVICE_MEMORY 1
#include <sanitizer/asan_interface.h>
#endif

namespace emulator::runtime {
namespace {
// The allocation that p lies in, or null.
const std::pair<const uintptr_t, Allocation>* owner(const State& s, const void* p) {
    auto it = s.memory.upper_bound(uintptr_t(p));
    if (it == s.memory.begin()) return nullptr;
    --it;
    return uintptr_t(p) < it->first + std::max<size_t>(it->second.n_bytes, 1) ? &*it : nullptr;
}
std::string hex(const void* p) {
    char text[32];
    std::snprintf(text, sizeof text, "%p", p);
    return text;
}
cudaError_t check_range(const State& s, const char* what, const void* p, size_t n_bytes, bool device) {
    if (n_bytes == 0) return cudaSuccess;
    const std::string where = std::string(what) + " " + hex(p);
    const auto* const a = owner(s, p);
    if (device && !a) return explain(cudaErrorInvalidValue, where + " is not device memory, or has been freed");
    if (device && a->second.pinned) return explain(cudaErrorInvalidValue, where + " is host memory, not the device's");
    if (!device && !p) return explain(cudaErrorInvalidValue, where + " is null");
    if (!device && !a) return cudaSuccess;  // pageable
    if (!device && !a->second.pinned)
        return explain(cudaErrorInvalidValue, where + " is device memory, not the host's");
    const size_t offset = uintptr_t(p) - a->first;
    if (n_bytes <= a->second.n_bytes - offset) return cudaSuccess;
    return explain(cudaErrorInvalidValue, where + " + " + std::to_string(n_bytes) + " bytes passes the end of its " +
                                              std::to_string(a->second.n_bytes) + " bytes, at byte " +
                                              std::to_string(offset));
}
bool is_pinned(const State& s, const void* p) { return owner(s, p) != nullptr; }

// In an ASan build the host may touch device memory only inside an operation.  Large blocks stay open: to open and
// close them at each call would take too long.
constexpr size_t kGuardedBytes = size_t(1) << 20;
#ifdef GUARD_DEVICE_MEMORY
constexpr bool kGuardsMemory = true;
#else
constexpr bool kGuardsMemory = false;
#endif
void guard([[maybe_unused]] const void* p, const Allocation& a, [[maybe_unused]] bool closed) {
    if (a.pinned || a.n_bytes > kGuardedBytes) return;
#ifdef GUARD_DEVICE_MEMORY
    if (closed)
        __asan_poison_memory_region(p, a.n_bytes);
    else
        __asan_unpoison_memory_region(p, a.n_bytes);
#endif
}

cudaError_t allocate(State& s, void** p, size_t n_bytes, bool pinned) {
    if (!p) return explain(cudaErrorInvalidValue, "no place for the pointer");
    if (const cudaError_t e = refuse_in_capture(s, "an allocation"); e != cudaSuccess) return e;
    *p = nullptr;
    if (n_bytes == 0) return cudaSuccess;
    size_t& used = s.used[current_device()];
    const size_t n_free = machine().memory_bytes - std::min(used, machine().memory_bytes);
    if (!pinned && n_bytes > n_free)
        return explain(cudaErrorMemoryAllocation, std::to_string(n_bytes) + " bytes asked, " + std::to_string(n_free) +
                                                      " of " + std::to_string(machine().memory_bytes) + " free");
    if (n_bytes > size_t(PTRDIFF_MAX) / 2) return cudaErrorMemoryAllocation;
    try {
        *p = dev_alloc(n_bytes);
    } catch (const std::bad_alloc&) {
        return explain(cudaErrorMemoryAllocation, "the host that emulates the device has not enough");
    }
    const Allocation a{.n_bytes = n_bytes, .pinned = pinned, .device = current_device()};
    s.memory[uintptr_t(*p)] = a;
    if (!pinned) used += n_bytes;
    if (!s.memory_is_open) guard(*p, a, true);
    return cudaSuccess;
}
// Waits for all work of the device first, like CUDA.
cudaError_t release(State& s, void* p, bool pinned) {
    if (!p) return cudaSuccess;
    if (const cudaError_t e = refuse_in_capture(s, "freeing memory"); e != cudaSuccess) return e;
    const auto it = s.memory.find(uintptr_t(p));
    if (it == s.memory.end() || it->second.pinned != pinned)
        return explain(cudaErrorInvalidValue, hex(p) + (pinned ? " is not the start of pinned host memory"
                                                               : " is not the start of device memory"));
    const Allocation a = it->second;
    run_all(s, a.device);
    guard(p, a, false);
    if (!pinned) s.used[a.device] -= a.n_bytes;
    s.memory.erase(uintptr_t(p));
    std::memset(p, 0xff, a.n_bytes);
    dev_free(p);
    return s.sticky;
}
// After a sticky error memory is given back without waiting for anything.
cudaError_t release_call(void* p, bool pinned) {
    const cudaError_t e = call([&](State& s) { return release(s, p, pinned); });
    if (e == cudaSuccess || t_inside_op) return e;
    State& s = state();
    const std::lock_guard<std::mutex> lock(s.mutex);
    if (s.sticky != cudaSuccess && s.memory.count(uintptr_t(p))) release(s, p, pinned);
    return e;
}

constexpr double kMoveUs = 5;  // duration of a copy or a fill on the nominal clock (Machine::has_clock)

cudaError_t copy(State& s, void* to, const void* from, size_t n_bytes, cudaMemcpyKind kind, CUstream_st& stream) {
    if (kind == cudaMemcpyDefault) {
        const auto on_device = [&](const void* p) { return owner(s, p) && !owner(s, p)->second.pinned; };
        kind = cudaMemcpyKind(2 * on_device(from) + on_device(to));
    }
    if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDeviceToDevice)
        return explain(cudaErrorInvalidValue, "kind of copy");
    if (n_bytes == 0) return cudaSuccess;
    const bool to_device = kind & 1, from_device = kind & 2;
    cudaError_t e = check_range(s, "the copy's destination", to, n_bytes, to_device);
    if (e == cudaSuccess) e = check_range(s, "the copy's source", from, n_bytes, from_device);
    if (e != cudaSuccess) return e;
    if (uintptr_t(to) < uintptr_t(from) + n_bytes && uintptr_t(from) < uintptr_t(to) + n_bytes)
        return explain(cudaErrorInvalidValue, "source and destination of the copy overlap");
    if (!from_device && to_device && !stream.capture && !is_pinned(s, from)) {
        const auto* const bytes = static_cast<const char*>(from);
        const auto staged = std::make_shared<std::vector<char>>(bytes, bytes + n_bytes);
        return enqueue(s, stream, [=] { return pass_us(kMoveUs), std::memcpy(to, staged->data(), n_bytes), true; });
    }
    e = enqueue(s, stream, [=] { return pass_us(kMoveUs), std::memcpy(to, from, n_bytes), true; });
    if (e != cudaSuccess || stream.capture) return e;
    if (!to_device && (!from_device || !is_pinned(s, to))) run_until(s, OpPtr(stream.last));
    return s.sticky;
}
cudaError_t fill(State& s, void* to, int value, size_t n_bytes, CUstream_st& stream) {
    if (n_bytes == 0) return cudaSuccess;
    if (const cudaError_t e = check_range(s, "the destination", to, n_bytes, true); e != cudaSuccess) return e;
    return enqueue(s, stream, [=] { return pass_us(kMoveUs), std::memset(to, value, n_bytes), true; });
}
}  // namespace

void open_memory(State& s) {
    if (kGuardsMemory)
        for (const auto& [address, a] : s.memory) guard(reinterpret_cast<void*>(address), a, false);
    s.memory_is_open = true;
}
void close_memory(State& s) {
    if (kGuardsMemory)
        for (const auto& [address, a] : s.memory) guard(reinterpret_cast<void*>(address), a, true);
    s.memory_is_open = false;
}
}  // namespace emulator::runtime

using namespace emulator::runtime;
using emulator::machine;

namespace emulator {
cudaError_t check_device_range(const void* p, size_t n_bytes) {
    State& s = state();
    if (t_inside_op) return check_range(s, "the buffer", p, n_bytes, true);  // the lock is held
    const std::lock_guard<std::mutex> lock(s.mutex);
    return check_range(s, "the buffer", p, n_bytes, true);
}
}  // namespace emulator

cudaError_t cudaMalloc(void** p, size_t n_bytes) {
    return call([&](State& s) { return allocate(s, p, n_bytes, false); });
}
cudaError_t cudaMallocHost(void** p, size_t n_bytes) {
    return call([&](State& s) { return allocate(s, p, n_bytes, true); });
}
cudaError_t cudaFree(void* p) { return release_call(p, false); }
cudaError_t cudaFreeHost(void* p) { return release_call(p, true); }
cudaError_t cudaMemGetInfo(size_t* n_free, size_t* n_total) {
    return call([&](State& s) {
        *n_total = machine().memory_bytes;
        *n_free = *n_total - std::min(s.used[current_device()], *n_total);
        return cudaSuccess;
    });
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n_bytes, cudaMemcpyKind kind, cudaStream_t handle) {
    return call([&](State& s) {
        CUstream_st* const stream = find_stream(s, handle);
        return stream ? copy(s, to, from, n_bytes, kind, *stream) : cudaErrorInvalidResourceHandle;
    });
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t n_bytes, cudaMemcpyKind kind) {
    return call([&](State& s) -> cudaError_t {
        cudaError_t e = refuse_in_capture(s, "cudaMemcpy");
        CUstream_st& stream = *find_stream(s, nullptr);
        if (e == cudaSuccess) e = copy(s, to, from, n_bytes, kind, stream);
        if (e == cudaSuccess && stream.last) run_until(s, OpPtr(stream.last));
        return e == cudaSuccess ? s.sticky : e;
    });
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t n_bytes, cudaStream_t handle) {
    return call([&](State& s) {
        CUstream_st* const stream = find_stream(s, handle);
        return stream ? fill(s, to, value, n_bytes, *stream) : cudaErrorInvalidResourceHandle;
    });
}
cudaError_t cudaMemset(void* to, int value, size_t n_bytes) {
    return call([&](State& s) -> cudaError_t {
        const cudaError_t e = refuse_in_capture(s, "cudaMemset");
        return e == cudaSuccess ? fill(s, to, value, n_bytes, *find_stream(s, nullptr)) : e;
    });
}
