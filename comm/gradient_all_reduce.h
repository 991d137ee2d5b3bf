// The all-reduce of a gradient that lies in a backend's memory.
#pragma once
#include <memory>

#include "comm/all_reduce.h"
#include "comm/device_comm.h"

// One per rank; all ranks make the same kind and call sum() the same number of times.
class GradientAllReduce {
  public:
    virtual ~GradientAllReduce() = default;
    // grad (n) f32, in memory of the backend: the sum over all ranks, in place, the same bits everywhere.  The sum
    // includes work given to the stream before; work given afterwards sees the sum.  sum() may return before the stream
    // has done any of it.
    virtual void sum(Buf grad, Stream s) = 0;
    // The host waits until the stream is done, like Backend::synchronize, but a lost rank is an Error, not a hang.
    virtual void wait(Stream s) = 0;
    virtual const char* name() const = 0;  // "nccl", "ordered through host memory", ...
    // Plans the memory of the backend that sum() needs; the caller places it before the first sum().
    virtual void plan(Arena&) {}
    // True: in sum() the host waits for the device and takes part, so a graph cannot record it (Backend::begin_graph).
    virtual bool needs_host() const { return false; }
};

// For gradients of n elements.  One rank: nothing is done.
//   host-addressable memory   all_reduce() (comm/all_reduce.h) in place
//   nccl, with `nccl`         one ncclAllReduce of the whole buffer; its order of summing is NCCL's
//   ordered, with `nccl`      NCCL only moves shards, the backend sums them by the balanced tree: all_reduce()'s bits
//   else                      pieces go through pinned host memory and all_reduce()
// `nccl` may be null where AllReduce::nccl is not asked for; it must outlive what is made.  longest_shard bounds the
// scratch memory where NCCL moves shards: size() times as many elements; 0 chooses.
std::unique_ptr<GradientAllReduce> make_gradient_all_reduce(const Backend& k, Comm& comm, AllReduce how, size_t n,
                                                            DeviceComm* nccl = nullptr, size_t longest_shard = 0);
