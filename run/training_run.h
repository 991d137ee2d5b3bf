// A training run from its config to its last checkpoint.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bench/peak.h"
#include "checkpoint/checkpoint.h"
#include "comm/comm.h"
#include "common/clock.h"
#include "common/config.h"
#include "data/loader.h"
#include "data/tokenizer.h"
#include "run/context.h"
#include "run/nvml.h"
#include "run/run_dir.h"
#include "trainer/evaluate.h"
#include "trainer/schedule.h"
#include "trainer/trainer.h"

class TrainingRun {
  public:
    // Opens data, takes memory, opens or resumes the run directory, and puts equal parameters on every rank.
    TrainingRun(const Context& x, OpenMode mode);
    // Runs to the end (Exit::complete) or to run.max_minutes (Exit::stopped), with the last checkpoint saved.
    Exit run();

  private:
    void start(OpenMode mode);
    void initialize();
    void resume_from(const fs::path& checkpoint);
    void announce();
    void announce_peak();
    void record_step(const StepResult& r, double learning_rate, double ms, Traffic traffic, bool last);
    void step(const Trainer::NextMicroBatch& next);
    void check_memory();
    void bad_step(const StepResult& r);
    bool out_of_time();
    void evaluate_and_sample();
    void record_evaluation(const EvalResult& r);
    void sample();
    void save();
    Exit finish(Exit code);
    uint64_t tokens_per_step() const;

    const Context& x_;
    TokenStream train_;
    std::optional<TokenStream> val_;
    std::optional<Tokenizer> tokenizer_;
    const int64_t total_steps_;
    const Schedule schedule_;
    const Peak peak_;  // measured before the trainer takes its memory
    Trainer trainer_;
    LibraryBytes libraries_;                        // rank 0
    std::unique_ptr<RunDirectory> dir_;             // rank 0
    std::optional<Snapshot> parameters_, moments_;  // rank 0, of a run that saves; reserved before step 0
    std::optional<GpuMonitor> gpu_;                 // rank 0, on a GPU
    RunState state_;
    Stopwatch run_clock_;
    int64_t first_step_ = 0;  // at which this process began
    int bad_steps_ = 0;
    bool peak_is_doubted_ = false;
};
