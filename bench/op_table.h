// The ops of one training step, each by itself, at the shapes of a model: what `./train bench` measures.
//
// A Trainer takes one step over the recorder (kernels/recorder.h), so the list is the step's own.  Ops of one name and
// shape are one row, timed as the first of them: they may differ in small vectors, a bias gradient that is taken along.
// Rows with 0 calls are parts of another row, or ops that this step has no use for.
#pragma once
#include <string>
#include <vector>

#include "bench/timing.h"
#include "kernels/cost.h"
#include "trainer/trainer.h"

struct OpRow {
    std::string name;  // "layernorm forward"; ", +=" follows where gradients are added to others
    std::string part;  // of the step: "layer products", "head", "attention", "layernorm", "loss", "embedding",
                       // "optimizer", "other"
    std::string shape;
    int calls;  // by one step
    Cost cost;
    AnyOp op;  // buffers are the recorder's
};
struct StepRecord {
    std::vector<OpRow> rows;  // in the order in which a step comes to them
    int n_micro;              // micro-batches of the step
};
StepRecord record_step(const TrainerOptions& options, Comm& comm);

// The op on buffers of its own, which `bench` keeps: the largest model's ops do not fit into memory together.
bench::Bench::Run prepare(bench::Bench& bench, AnyOp op);
