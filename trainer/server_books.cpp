#include "trainer/server_books.h"

#include <algorithm>

#include "common/error.h"

// ---- PushLog.

void PushLog::begin_at(int64_t first) {
    if (fresh_) floor_ = first;
    fresh_ = false;
    CHECK_THAT(floor_ == first && above_.empty(),
               "every share below {} should be applied, and none above: {} below {} are, and {} above", first, floor_,
               floor_, above_.size());
}

void PushLog::receive(int worker, uint64_t sequence) {
    uint64_t& next = next_[size_t(worker)];
    CHECK_THAT(sequence == next, "push {} of worker {} is {}: the server expects push {}", sequence, worker,
               sequence < next ? "a duplicate" : "behind a gap", next);
    next++;
}

void PushLog::expect_fresh(int64_t share, int bound) {
    const int64_t behind = share / n_workers() - floor_ / n_workers();
    CHECK_THAT(behind <= bound, "step {} would begin with parameters of step {}, {} steps behind; the bound is {}",
               share / n_workers(), floor_ / n_workers(), behind, bound);
    largest_ = std::max(largest_, uint64_t(std::max<int64_t>(0, behind)));
}

bool PushLog::apply(int worker, int64_t share) {
    if (is_applied(share)) {
        n_repeated_++;
        return false;
    }
    above_.insert(share);
    for (; !above_.empty() && *above_.begin() == floor_; floor_++) above_.erase(above_.begin());
    applied_[size_t(worker)]++;
    return true;
}

// ---- ShareDealer.

void ShareDealer::open(int64_t first, int64_t end) {
    CHECK_THAT(drained() && end >= first, "shares {} to {} opened at share {} of {}", first, end, next_, end_);
    next_ = first;
    end_ = end;
}

int64_t ShareDealer::close_early() {
    const int64_t begun = (next_ + shares_per_step_ - 1) / shares_per_step_;
    return end_ = std::min(end_, begun * shares_per_step_);
}

int64_t ShareDealer::oldest() const {
    int64_t oldest = next_;
    if (!held_.empty()) oldest = std::min(oldest, held_.begin()->first);
    if (!returned_.empty()) oldest = std::min(oldest, *returned_.begin());
    return oldest;
}

std::optional<int64_t> ShareDealer::deal(int worker) {
    CHECK_THAT(!held_by(worker), "worker {} asks for a share and holds share {}", worker, *held_by(worker));
    const int64_t share = returned_.empty() ? next_ : *returned_.begin();
    if (share >= end_ || share / shares_per_step_ - oldest() / shares_per_step_ > staleness_) return std::nullopt;
    if (returned_.empty())
        next_++;
    else
        returned_.erase(returned_.begin());
    held_[share] = worker;
    return share;
}

void ShareDealer::done(int worker, int64_t share) {
    if (const auto held = held_.find(share); held != held_.end() && held->second == worker) held_.erase(held);
}

void ShareDealer::lose(int worker) {
    const std::optional<int64_t> share = held_by(worker);
    if (!share) return;
    held_.erase(*share);
    returned_.insert(*share);
}

std::optional<int64_t> ShareDealer::held_by(int worker) const {
    for (const auto& [share, holder] : held_)
        if (holder == worker) return share;
    return std::nullopt;
}
