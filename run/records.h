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

// Of a parameter server, at the end of a run: the `event` record, and a line for the log.
nlohmann::ordered_json servers_event(int64_t step, const std::vector<ServerReport>& servers,
                                     const std::vector<int>& lost);
std::string servers_summary(const std::vector<ServerReport>& servers, const std::vector<int>& lost);
