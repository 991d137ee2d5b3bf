// The options of a Trainer: the model, the batch, the optimizer, and how a step is carried out.
#pragma once
#include "comm/all_reduce.h"
#include "model/architecture.h"

struct TrainerOptions {
    ModelConfig model;
    int global_batch_size = 0, micro_batch_size = 0;  // sequences
    Recompute recompute = Recompute::none;
    AllReduce allreduce = AllReduce::ordered;
    OptimizerUpdate optimizer;  // its scalars: kind, betas, eps, weight_decay, momentum
    float grad_clip = 0;        // 0: off
    uint64_t seed = 0;
    DType real = DType::f32;  // bf16: activations and the parameters that ops read; f64: the double instance, for tests
    UseGraph graph = UseGraph::automatic;
};
