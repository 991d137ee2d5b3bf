// The ops of one training step, each by itself, at the shapes of a model: what `./train bench` measures.
//
// Bytes are what an op cannot avoid moving between memory and chip: every operand once, twice where it is read and
// written, and for the two products of a linear layer's gradient dy twice.  FLOP are the useful ones of the matrix
// products: 2 per multiply-add, attention's causal half, with the scores computed again in its backward.  `calls` is
// how often one training step calls the op; rows with 0 are parts of another row, or ops that this step has no use for.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "bench/timing.h"
#include "model/architecture.h"

// How much of what one optimizer step consists of, on one rank.
struct StepShape {
    ModelConfig model;
    int B = 0;               // sequences of a micro-batch
    int n_micro = 1;         // micro-batches
    int n_accumulating = 0;  // of them those whose gradients are added to the one before's
    int n_folds = 0;         // gradient buffers that are added to another one (comm/run_fold.h)
    OptimizerKind optimizer = OptimizerKind::adamw;
    int BT() const { return B * model.T; }
};

struct OpRow {
    std::string shape;
    double n_bytes, flop;
    bench::Bench::Run run;
};

// An op takes its buffers only when its turn comes, and they are released after it: the largest model's do not fit
// together.
struct TimedOp {
    std::string name;  // "layernorm forward"
    std::string part;  // of the step: "layer products", "head", "attention", "layernorm", "loss", "embedding",
                       // "optimizer", "other"
    int calls;
    std::function<OpRow(bench::Bench&)> make;
};
std::vector<TimedOp> step_ops(const StepShape& z);
