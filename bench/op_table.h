// The ops that `./train bench` measures: the ops of one training step, each alone, at the shapes of a model.
//
// A Trainer takes one step with the recording backend (kernels/recorder.h), so the list is the step's own.  Ops of
// equal name and shape share a row, which times the first of them; small vectors, such as a bias gradient, may differ.
// Rows with 0 calls are parts of another row, or ops that this step does not use.
#pragma once
#include <string>
#include <vector>

#include "bench/timing.h"
#include "kernels/cost.h"
#include "trainer/trainer.h"

struct OpRow {
    std::string name;  // "layernorm forward"; ", +=" follows where the op adds to gradients
    std::string part;  // of the step: "layer products", "head", "attention", "layernorm", "loss", "embedding",
                       // "optimizer", "other"
    std::string shape;
    int calls;  // per step
    Cost cost;
    AnyOp op;  // with the recorder's buffers
};
struct StepRecord {
    std::vector<OpRow> rows;  // in the step's order
    int n_micro;              // micro-batches of the step
};
StepRecord record_step(const TrainerOptions& options);

// A call of `op` on new buffers that `bench` keeps: the largest model's ops do not fit into memory together.
bench::Bench::Run prepare(bench::Bench& bench, AnyOp op);
