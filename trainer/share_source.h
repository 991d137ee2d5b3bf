// A method whose ranks do not step together: where a rank gets its work from, and the counts of those that serve it.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "common/error.h"

// Share k is the k-th part of the run's sequences, cut into global_batch_size / workers sequences each.  A Trainer of
// such a method has a group of one rank, and a share is its step.
class ShareSource {
  public:
    virtual ~ShareSource() = default;
    virtual int shares_per_step() const = 0;
    // The share to compute next, after the one before is pushed.  nullopt: on rank 0, that all shares below the end are
    // applied and its memory has the parameters; on other ranks, that the run is over.
    virtual std::optional<int64_t> next_share() = 0;
    // On other ranks than 0, of a run that is over.
    virtual Exit exit_code() const = 0;

    // Rank 0.  Shares from `first` to `end` may be dealt; those below `first` are applied.
    virtual void open(int64_t first, int64_t end) = 0;
    // Rank 0.  Steps that have not begun do not begin: the new end.
    virtual int64_t close_early() = 0;
    // Rank 0.  The workers that are lost, as of the last answer.
    virtual const std::vector<int>& lost() const = 0;
};

// The counts of one server, which has checked that every share of the run is applied to its shard exactly once.
struct ServerReport {
    int rank = 0;
    uint64_t first = 0, count = 0;   // its shard of the flat parameters
    uint64_t n_repeated = 0;         // pushes of a share that was applied before; only after a worker was lost
    uint64_t n_skipped = 0;          // updates whose norm is not finite
    uint64_t largest_staleness = 0;  // in steps
    std::vector<uint64_t> applied;   // (workers) pushes
};
