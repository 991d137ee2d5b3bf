#include "checkpoint/snapshot.h"

namespace {
size_t n_bytes(const std::vector<StateTensor>& state) {
    size_t n = 0;
    for (const StateTensor& t : state) n += t.data.n_bytes();
    return n;
}
}  // namespace

Snapshot::Snapshot(const Backend& k, const std::vector<StateTensor>& state)
    : memory_(k, n_bytes(state)), tensors_(state) {
    char* to = memory_.as<char>();
    for (StateTensor& t : tensors_) {
        CHECK_THAT(t.data.count == t.count(), "{} has {} elements, its slice {}", t.name, t.data.count, t.count());
        k.download(to, t.data.data, t.data.n_bytes(), nullptr);
        t.data.data = to;
        to += t.data.n_bytes();
    }
    k.synchronize(nullptr);
}
