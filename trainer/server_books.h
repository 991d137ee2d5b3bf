// The books of a server: which pushes are applied, and which shares of the work are dealt.  They know nothing of messages
// and clocks.
//
// Each global batch is cut into as many shares as there were workers at the start.  Share k belongs to step k / workers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <vector>

// The shares whose gradients one server has applied.  A broken promise is Error(Exit::internal) naming the numbers.
class PushLog {
  public:
    explicit PushLog(int n_workers) : next_(size_t(n_workers)), applied_(size_t(n_workers)) {}

    // Shares below `first` are applied, and none above: true of a fresh log, checked of any other.
    void begin_at(int64_t first);
    // A push of this worker begins.  Its number counts the worker's pushes to this server: a duplicate or a gap is an
    // error.
    void receive(int worker, uint64_t sequence);
    // A worker is about to compute a share with the parameters as they are: an error where a share of a step before its
    // own step - bound is not applied.
    void expect_fresh(int64_t share, int bound);
    // The worker's push is complete.  True: it is to be applied now.  False: its share was applied before.
    bool apply(int worker, int64_t share);

    bool is_applied(int64_t share) const { return share < floor_ || above_.contains(share); }
    bool is_fresh() const { return fresh_; }
    int64_t floor() const { return floor_; }             // every share below is applied
    uint64_t n_repeated() const { return n_repeated_; }  // pushes that apply() refused
    uint64_t largest_staleness() const { return largest_; }
    const std::vector<uint64_t>& applied() const { return applied_; }  // (workers)

  private:
    int64_t n_workers() const { return int64_t(next_.size()); }

    std::vector<uint64_t> next_, applied_;  // (workers)
    uint64_t n_repeated_ = 0, largest_ = 0;
    bool fresh_ = true;
    int64_t floor_ = 0;
    std::set<int64_t> above_;
};

// Deals shares in ascending order to whoever asks, so that a fast worker computes more of them than a slow one.  A share
// of step t is dealt only when every share of the steps before t - staleness is applied.  The share of a lost worker is
// dealt again, to another one.
class ShareDealer {
  public:
    ShareDealer(int shares_per_step, int staleness) : shares_per_step_(shares_per_step), staleness_(staleness) {}

    // From now on shares below `end` are dealt, beginning with `first`.  Only while drained().
    void open(int64_t first, int64_t end);
    // No step begins that has not begun: returns the new end.
    int64_t close_early();

    // A share for this worker, which holds none; nullopt: none may be started now.
    std::optional<int64_t> deal(int worker);
    // The worker's share is applied.  Nothing happens where it was lost, and no longer holds the share.
    void done(int worker, int64_t share);
    // The worker's share, if it holds one, will be dealt again.
    void lose(int worker);
    std::optional<int64_t> held_by(int worker) const;
    // Every share below the end is applied.
    bool drained() const { return held_.empty() && returned_.empty() && next_ == end_; }

  private:
    int64_t oldest() const;  // share that is not applied

    const int64_t shares_per_step_, staleness_;
    int64_t next_ = 0, end_ = 0;
    std::map<int64_t, int> held_;  // share -> worker
    std::set<int64_t> returned_;   // by lost workers
};
