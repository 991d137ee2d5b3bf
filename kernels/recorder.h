// A backend that computes nothing: it keeps what it is asked to compute.
//
//     const Group one_rank(recorder_backend());
//     Trainer trainer(one_rank, ...);
//     Recording recording;
//     trainer.step(...);
//     for (const AnyOp& op : recording.ops()) ...     // the ops of a step, in order
//
// So the code that runs over a backend lists its own ops.  A buffer of this backend is an address without memory: its
// size is free, and nobody may read through its pointer.  Sizes are checked as by every backend.
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
    Recording* const outer_;  // the enclosing recording; it resumes when this one ends
};

// Gives an op to a backend, as k.layernorm_forward(op, s) does where it is a LayerNorm.
void give(const Backend& k, const AnyOp& op, Stream s);
