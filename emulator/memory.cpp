// Device and shared memory.  Everything starts as NaN (0xFF) and lies between red zones.
//
// Shared memory is one window of 256 KiB, aligned to 1024 bytes, with dynamic memory first and then each static array
// behind a gap, placed at its first use.  A shared address is an offset in the window, so the swizzles and descriptors
// of Hopper, which work on address bits, hold literally.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "state.h"

namespace emulator {
namespace {
constexpr size_t kSharedGap = 64;
constexpr int kPoison = 0xFF;

bool intact(const uint8_t* zone) {
    return std::all_of(zone, zone + kRedzone, [](uint8_t v) { return v == kPoison; });
}
}  // namespace

// ASan's own macros do nothing in a file that is not instrumented itself.
void poison([[maybe_unused]] const void* p, [[maybe_unused]] size_t n_bytes) {
#if EMULATOR_ASAN
    __asan_poison_memory_region(p, n_bytes);
#endif
}
void unpoison([[maybe_unused]] const void* p, [[maybe_unused]] size_t n_bytes) {
#if EMULATOR_ASAN
    __asan_unpoison_memory_region(p, n_bytes);
#endif
}

// ---- device memory ----
BufferTable& device_buffers() {
    static BufferTable* table = new BufferTable;  // outlives static objects that free device memory
    return *table;
}

void* dev_alloc(size_t n_bytes) {
    void* base = nullptr;
    if (posix_memalign(&base, 256, n_bytes + 2 * kRedzone)) throw std::bad_alloc();
    std::memset(base, kPoison, n_bytes + 2 * kRedzone);
    auto* p = static_cast<uint8_t*>(base) + kRedzone;
    poison(base, kRedzone);
    poison(p + n_bytes, kRedzone);
    auto allocation = std::make_unique<DeviceBuffer>();
    allocation->p = p;
    allocation->n_bytes = n_bytes;
    BufferTable& table = device_buffers();
    const std::lock_guard<std::mutex> lock(table.mutex);
    table.by_address[reinterpret_cast<uintptr_t>(p)] = std::move(allocation);
    return p;
}

void dev_free(void* p) {
    auto* base = static_cast<uint8_t*>(p) - kRedzone;
    {
        BufferTable& table = device_buffers();
        const std::lock_guard<std::mutex> lock(table.mutex);
        const auto it = table.by_address.find(reinterpret_cast<uintptr_t>(p));
        if (it == table.by_address.end()) return;
        unpoison(base, it->second->n_bytes + 2 * kRedzone);
        table.by_address.erase(it);
    }
    std::free(base);
}

// Reports an uninstrumented kernel's writes past a buffer, at the end of its launch.  ASan sees such writes itself.
void check_redzones() {
    if (EMULATOR_ASAN) return;
    BufferTable& table = device_buffers();
    const std::lock_guard<std::mutex> lock(table.mutex);
    for (auto& [address, a] : table.by_address) {
        uint8_t *before = a->p - kRedzone, *after = a->p + a->n_bytes;
        if (intact(before) && intact(after)) continue;
        const std::string size = std::to_string(a->n_bytes);
        add_report("memcheck", "memcheck: the kernel wrote " +
                                   std::string(intact(after) ? "in front of" : "past the end of") +
                                   " a device buffer of " + size + " bytes");
        std::memset(before, kPoison, kRedzone);
        std::memset(after, kPoison, kRedzone);
    }
}

// ---- shared memory ----
void prepare_arena(Block& b, size_t n_shared_bytes) {
    if (!b.arena) {
        constexpr size_t kAlign = 1024;
        void* memory = mmap(nullptr, kArenaBytes + kAlign, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        b.arena = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory) + kAlign - 1) & ~(kAlign - 1));
    }
    b.n_dynamic_shared = n_shared_bytes;
    b.n_static_shared = 0;
    b.arena_used = kSharedBase + n_shared_bytes;
    b.static_arrays.clear();
    poison(b.arena, kArenaBytes);
    unpoison(b.arena + kSharedBase, n_shared_bytes);
    std::memset(b.arena + kSharedBase, kPoison, n_shared_bytes);
}

void* dyn_shared() { return block().arena + kSharedBase; }

void* static_shared(const void* tag, size_t n_bytes, size_t align) {
    Block& b = block();
    for (const StaticShared& s : b.static_arrays)
        if (s.tag == tag) return b.arena + s.offset;
    const size_t a = std::max(align, size_t(16)), offset = (b.arena_used + kSharedGap + a - 1) / a * a;
    if (offset + n_bytes > kArenaBytes) fail("memcheck", "the block's shared memory exceeds the window");
    b.static_arrays.push_back({tag, offset, n_bytes});
    // On a GPU dynamic memory begins behind the static arrays, at the alignment that SIMT_DYN_SHARED declares.
    b.n_static_shared += n_bytes;
    const size_t pad = b.n_dynamic_shared ? 1024 : 1;
    if ((b.n_static_shared + pad - 1) / pad * pad + b.n_dynamic_shared > b.shared_limit)
        fail("memcheck", std::to_string(b.n_static_shared) + " bytes of static and " +
                             std::to_string(b.n_dynamic_shared) + " of dynamic shared memory, more than the " +
                             std::to_string(b.shared_limit) +
                             " that the launch may use: no such launch starts on a GPU");
    b.arena_used = offset + n_bytes;
    unpoison(b.arena + offset, n_bytes);
    std::memset(b.arena + offset, kPoison, n_bytes);
    return b.arena + offset;
}

uint32_t cvta_shared(const void* p) {
    if (!block().in_arena(p)) fail("memcheck", "a pointer that is not to shared memory is used as a shared address");
    return uint32_t(block().offset(p));
}

uint8_t* shared_pointer(uint32_t address) {
    if (address < kSharedBase || address >= kArenaBytes)
        fail("memcheck", "shared address " + std::to_string(address) + " is outside the window");
    return block().arena + address;
}

bool inside_shared_array(size_t offset, size_t n_bytes) {
    const Block& b = block();
    if (offset >= kSharedBase && offset + n_bytes <= kSharedBase + b.n_dynamic_shared) return true;
    for (const StaticShared& s : b.static_arrays)
        if (offset >= s.offset && offset + n_bytes <= s.offset + s.n_bytes) return true;
    return false;
}

// ---- checks that need no instrumentation ----
// The buffer that begins at or before p.  The caller holds the table's lock.
static DeviceBuffer* buffer_below(const void* p) {
    const auto& table = device_buffers().by_address;
    const auto it = table.upper_bound(reinterpret_cast<uintptr_t>(p));
    return it == table.begin() ? nullptr : std::prev(it)->second.get();
}

const DeviceBuffer* find_buffer(const void* p, size_t n_bytes) {
    Block& b = block();
    const auto* first = static_cast<const uint8_t*>(p);
    const auto holds = [&](const DeviceBuffer* a) {
        return a && first >= a->p && first + n_bytes <= a->p + a->n_bytes;
    };
    for (const DeviceBuffer* a : b.recent)
        if (holds(a)) return a;
    const std::lock_guard<std::mutex> lock(device_buffers().mutex);
    DeviceBuffer* a = buffer_below(p);
    if (!holds(a)) return nullptr;
    return b.recent[b.n_recent++ % 4] = a;
}

void check_bounds(const void* p, size_t n_bytes, const char* what) {
    Block& b = block();
    if (b.in_arena(p)) {
        if (!inside_shared_array(b.offset(p), n_bytes))
            fail("memcheck",
                 std::string(what) + " of " + std::to_string(n_bytes) + " bytes out of bounds at " + object_name(p));
        return;
    }
    if (find_buffer(p, n_bytes)) return;
    const auto* first = static_cast<const uint8_t*>(p);
    std::unique_lock<std::mutex> lock(device_buffers().mutex);
    const DeviceBuffer* a = buffer_below(p);
    std::string text = std::string(what) + " uses an address that is not device memory";
    if (a && first <= a->p + a->n_bytes + kRedzone)
        text = std::string(what) + " of " + std::to_string(n_bytes) + " bytes reaches past a device buffer of " +
               std::to_string(a->n_bytes) + " bytes, at +" + std::to_string(first - a->p);
    lock.unlock();
    fail("memcheck", text);
}

void fail_misaligned(const void* p, size_t n_bytes) {
    fail("memcheck", "misaligned " + std::to_string(n_bytes) + "-byte access at " + object_name(p) + " [" +
                         place(CALLER_PC()) + "]");
}
}  // namespace emulator
