// The mean over ranks of vectors of f32 in host memory, packed on their way (comm/quantized.h).
//
// Element i of n belongs to rank i / ceil(n / ranks).  Its owner gets it from all others, adds in the order of TreeSum
// (kernels/ops.h; with any number of parts: a part without a partner stays as it is), divides by the number of ranks,
// and sends the mean to all: 2 (ranks - 1) / ranks * packed_bytes(n) bytes leave each rank, as in a ring all-reduce.
//
// Packing rounds twice: the elements that a rank sends to their owners, and the owner's means.  With error feedback both
// keep what they left out and add it to the next vector, so that the sum of all that was sent stays within one rounding
// of the sum of all that was meant.
#pragma once
#include <span>
#include <vector>

#include "comm/comm.h"
#include "comm/quantized.h"

class RankMean {
  public:
    RankMean(Comm& comm, OuterDtype dtype) : comm_(comm), dtype_(dtype) {}

    // x (n) becomes the mean over ranks, the same bits on every rank.  error (n) begins as zeros and belongs to this
    // vector: of elements that the rank owns it has what the mean's rounding left out, of others that of its own
    // numbers' rounding.  Empty: what rounding leaves out is lost.
    void mean(std::span<float> x, std::span<float> error);

  private:
    Comm& comm_;
    const OuterDtype dtype_;
    std::vector<std::byte> send_, recv_;  // (ranks, packed_bytes(piece))
    std::vector<float> parts_;            // (ranks, piece)
};
