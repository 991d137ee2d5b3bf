// Sums a gradient that lies in a backend's memory over all ranks.
#pragma once
#include <memory>

#include "comm/reduce.h"
#include "kernels/ops.h"

class NcclComm;

// One per rank; all ranks make the same kind and call sum() the same number of times.
class Reducer {
  public:
    virtual ~Reducer() = default;
    // grad (n) f32, in memory of the backend: the sum over all ranks, in place, the same bits everywhere.  Work given
    // to the stream before is summed; what is given to it afterwards sees the sum.  The host may not have waited for
    // either.
    virtual void sum(Buf grad, Stream s) = 0;
    // The host waits until the stream is done, like Backend::synchronize, but a lost rank is an Error, not a hang.
    virtual void wait(Stream s) = 0;
    virtual const char* name() const = 0;  // "nccl", "ordered through host memory", ...
    // Plans what sum() needs of the backend's memory; to be placed before the first sum().
    virtual void plan(Arena&) {}
    // sum() waits for the device and takes part itself, so it cannot be recorded (Backend::begin_graph).
    virtual bool needs_host() const { return false; }
};

// For gradients of n elements.  One rank: nothing is done.
//   CPU                 all_reduce() (comm/reduce.h) in place
//   nccl, with `nccl`   one ncclAllReduce of the whole buffer; its order of summing is NCCL's
//   ordered, `nccl`     NCCL only moves shards, the backend sums them by the balanced tree: the bits of all_reduce()
//   else                pieces go through pinned host memory and all_reduce()
// `nccl` may be null where Reduction::nccl is not asked for; it must outlive the reducer.  longest_shard bounds the
// scratch memory where NCCL moves shards: size() times as many elements; 0 chooses.
std::unique_ptr<Reducer> make_reducer(const Backend& k, Comm& comm, Reduction how, size_t n, NcclComm* nccl = nullptr,
                                      size_t longest_shard = 0);
