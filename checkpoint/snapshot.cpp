#include "checkpoint/snapshot.h"

#include <algorithm>
#include <cstring>

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
    CHECK_THAT(kind == Kind::copy || k.host_addressable || std::ranges::all_of(state, &StateTensor::on_host),
               "the host cannot read the memory of the {} backend", k.name);
    if (kind == Kind::view) return;
    memory_.emplace(reserve(k, n_bytes(state_)));
    char* to = memory_->as<char>();
    for (StateTensor& t : tensors_) {
        t.data.data = to, t.on_host = true;
        to += t.data.n_bytes();
    }
}

void Snapshot::take(Stream s) {
    for (size_t i = 0; memory_ && i < state_.size(); i++) {
        const Buf from = state_[i].data, to = tensors_[i].data;
        if (state_[i].on_host)
            std::memcpy(to.data, from.data, from.n_bytes());
        else
            k_.download(to.data, from.data, from.n_bytes(), s);
    }
    k_.synchronize(s);
}
