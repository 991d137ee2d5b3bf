#include "checkpoint/snapshot.h"

namespace {
size_t n_bytes(const std::vector<StateTensor>& state) {
    size_t n = 0;
    for (const StateTensor& t : state) n += t.data.n_bytes();
    return n;
}

HostBuffer reserve(const Backend& k, size_t n_bytes) {
    try {
        return HostBuffer(k, n_bytes);
    } catch (const Error& e) {
        if (e.code != Exit::memory) throw;
        fail(Exit::memory,
             "checkpoints need {} of pinned host memory, which the host has not; free memory, use a smaller model, or "
             "set checkpoint.interval: 0",
             human_bytes(n_bytes));
    }
}
}  // namespace

Snapshot::Snapshot(const Backend& k, const std::vector<StateTensor>& state, Kind kind)
    : k_(k), state_(state), tensors_(state) {
    for (const StateTensor& t : state_)
        CHECK_THAT(t.data.count == t.count(), "{} has {} elements, its slice {}", t.name, t.data.count, t.count());
    CHECK_THAT(kind == Kind::copy || k.host_addressable, "the host cannot read the memory of the {} backend", k.name);
    if (kind == Kind::view) return;
    memory_.emplace(reserve(k, n_bytes(state_)));
    char* to = memory_->as<char>();
    for (StateTensor& t : tensors_) {
        t.data.data = to;
        to += t.data.n_bytes();
    }
}

void Snapshot::take(Stream s) {
    for (size_t i = 0; memory_ && i < state_.size(); i++)
        k_.download(tensors_[i].data.data, state_[i].data.data, state_[i].data.n_bytes(), s);
    k_.synchronize(s);
}
