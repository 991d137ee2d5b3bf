#include "kernels/recorder.h"

#include <atomic>
#include <cstring>
#include <utility>

namespace {
thread_local Recording* current = nullptr;  // the table of a backend has no state

void* reserve(size_t n_bytes) {
    static std::atomic<uintptr_t> next{Arena::kAlign};
    const size_t n_whole = (n_bytes / Arena::kAlign + 1) * Arena::kAlign;
    return reinterpret_cast<void*>(next.fetch_add(n_whole));
}
}  // namespace

template <class Op>
void record(const Op& op, Stream) {
    if (current) current->ops_.push_back(op);
}

Recording::Recording() : outer_(std::exchange(current, this)) {}
Recording::~Recording() { current = outer_; }

const Backend& recorder_backend() {
    static const Backend table = [] {
        Backend t = cpu_backend();  // for its streams and marks: all work is done when a call returns
        t.name = "recorder";
        t.host_addressable = false;
        t.memory = {.alloc = reserve, .free = [](void*) {}};
        t.zero = [](void*, size_t, Stream) {};
        t.upload = t.copy = [](void*, const void*, size_t, Stream) {};
        t.download = [](void* to_host, const void*, size_t n_bytes, Stream) { std::memset(to_host, 0, n_bytes); };
#define OP_ENTRY(function, Op) t.function = checked<Op, record<Op>>;
        KILN_OPS(OP_ENTRY)
#undef OP_ENTRY
        return t;
    }();
    return table;
}

#define OP_CALL(function, Op) \
    static void give(const Backend& k, const Op& op, Stream s) { k.function(op, s); }
KILN_OPS(OP_CALL)
#undef OP_CALL
void give(const Backend& k, const AnyOp& op, Stream s) {
    std::visit([&](const auto& one) { give(k, one, s); }, op);
}
