// The options of a Trainer: the model, two sections of the config as they are, and how a step is carried out.
#pragma once
#include "comm/all_reduce.h"
#include "common/config.h"
#include "model/architecture.h"

struct TrainerOptions {
    ModelConfig model;
    Config::Train train;
    Config::Optimizer optimizer;
    Config::Parallel parallel;  // parallel.allreduce is not read: `allreduce` is the one that a run gets
    AllReduce allreduce = AllReduce::ordered;
    size_t bucket_bytes = size_t(1) << 20;  // with parallel.overlap: the least that is summed by one call
    uint64_t seed = 0;
    DType real = DType::f32;  // bf16: activations and the parameters that ops read; f64: the double instance, for tests
    UseGraph graph = UseGraph::automatic;
    // Of a parameter server:
    Comm* link = nullptr;    // workers, then servers; outlives what is made with these options
    double timeout_s = 600;  // run.timeout_seconds
};
