// A backend that computes nothing: it keeps what it is asked to compute.
//
//     const Group one_rank(recorder_backend());
//     Trainer trainer(one_rank, ...);
//     Recording recording;
//     trainer.step(...);
//     for (const AnyOp& op : recording.ops()) ...     // the ops of a step, in order
//
// Whatever runs over a backend can so be listed by its own code.  A buffer of this backend is an address and no memory:
// it may be of any size, and what an op holds can be read but not followed.  Sizes are checked as by every backend.
// Host memory is real; what is downloaded into it is zero.
#pragma once
#include <variant>
#include <vector>

#include "kernels/ops.h"

template <class, class... Op>
struct AnyOf {
    using type = std::variant<Op...>;
};
#define OP_ALTERNATIVE(function, Op) , Op
using AnyOp = AnyOf<void KILN_OPS(OP_ALTERNATIVE)>::type;
#undef OP_ALTERNATIVE

const Backend& recorder_backend();

// The ops that this thread gives to the recorder's functions, from now on until the end of the scope.
class Recording {
  public:
    Recording();
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;
    ~Recording();
    const std::vector<AnyOp>& ops() const { return ops_; }

  private:
    template <class Op>
    friend void record(const Op& op, Stream);
    std::vector<AnyOp> ops_;
    Recording* const outer_;  // whose turn it is again afterwards
};

// Gives an op to a backend, as k.layernorm_forward(op, s) does where it is a LayerNorm.
void give(const Backend& k, const AnyOp& op, Stream s);
