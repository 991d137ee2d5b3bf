// The `run`, `step` and `eval` records of metrics.jsonl; README.md explains the fields that measure speed.
#pragma once
#include <nlohmann/json.hpp>
#include <optional>

#include "bench/peak.h"
#include "checkpoint/checkpoint.h"
#include "run/context.h"
#include "run/nvml.h"
#include "trainer/evaluate.h"
#include "trainer/trainer.h"

// The first record of each process of a run: source, devices, model, memory and peak rate.
nlohmann::ordered_json run_record(const Context& x, const Trainer& trainer, const RunState& state, const Peak& peak,
                                  const LibraryBytes& libraries, int64_t total_steps);

struct StepSpeed {
    double ms, tokens_per_s;
    std::optional<double> mfu;  // absent where share_of() (bench/peak.h) has none
    Traffic traffic;            // of this rank
};
nlohmann::ordered_json step_record(const RunState& after, const StepResult& r, double learning_rate,
                                   const StepSpeed& speed, const std::optional<GpuSample>& gpu);

nlohmann::ordered_json eval_record(int64_t step, const EvalResult& r);
