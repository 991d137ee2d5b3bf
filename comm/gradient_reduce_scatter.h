// GradientReduceScatter: the sum of gradients over ranks of which each rank gets its block only; in a device's memory.
// GradientAllReduce (comm/gradient_all_reduce.h) is its counterpart for ranks that need the whole sum.
#pragma once
#include <memory>

#include "comm/all_reduce.h"
#include "comm/group.h"

class GradientReduceScatter {
  public:
    virtual ~GradientReduceScatter() = default;
    // parts (ranks, u) f32, u at most `longest`: the addends of this rank; undefined afterwards.  mine (u) f32 gets the
    // sum over ranks of their block of this rank's number.  Work on the stream, as in GradientAllReduce::sum.
    virtual void sum(Buf parts, Buf mine, Stream s) = 0;
    // Plans the memory of the backend that sum() needs; the caller places it before the first sum().
    virtual void plan(Arena&) {}
};

// The order of sums is that of all_reduce() (comm/all_reduce.h):
//   one rank     a copy
//   ordered      the blocks go to their owners, who add them by TreeSum
//   ring         size - 1 messages from rank r to r + 1, each the sum so far
//   mpi, nccl    reduce_scatter_sum() of the group's carrier
std::unique_ptr<GradientReduceScatter> make_gradient_reduce_scatter(const Group& group, AllReduce how, size_t longest);
