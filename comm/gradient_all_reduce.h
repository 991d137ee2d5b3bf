// The all-reduce of a gradient that lies in a backend's memory.  The host waits for it by group.device().wait().
#pragma once
#include <memory>

#include "comm/all_reduce.h"
#include "comm/group.h"

// One per rank; all ranks make the same kind and call sum() the same number of times.
class GradientAllReduce {
  public:
    virtual ~GradientAllReduce() = default;
    // grad (at most n) f32, in memory of the backend: the sum over all ranks, in place, the same bits everywhere.  The
    // sum includes work given to the stream before; work given afterwards sees the sum.  sum() may return before the
    // stream has done any of it.
    virtual void sum(Buf grad, Stream s) = 0;
    virtual const char* name() const = 0;  // "nccl", "ordered through host memory", ...
    // Plans the memory of the backend that sum() needs; the caller places it before the first sum().
    virtual void plan(Arena&) {}
    // True: in sum() the host waits for the device and takes part, so a graph cannot record it (Backend::begin_graph).
    virtual bool needs_host() const { return false; }
};

// For gradients of up to n elements in memory of the group's backend; the group outlives what is made.
//   one rank                  nothing is done
//   host-addressable memory   all_reduce() (comm/all_reduce.h) in place
//   nccl                      one all_reduce_sum() of the whole buffer, in NCCL's order; needs a group whose carrier
//                             works from device to device
//   ordered, in such a group  devices exchange shards, the backend sums them by the balanced tree: all_reduce()'s bits
//   else                      pieces go through pinned host memory and all_reduce()
// Payload::bf16 is for ordered and ring in a group whose messages go through the host.
// longest_shard bounds the scratch memory where devices exchange shards: size() times as many elements; 0 chooses.
std::unique_ptr<GradientAllReduce> make_gradient_all_reduce(const Group& group, AllReduce how, size_t n,
                                                            Payload payload = Payload::fp32, size_t longest_shard = 0);
