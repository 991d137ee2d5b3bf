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
#include "run/records.h"
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
    Traffic traffic_since(Traffic before) const;
    void record_step(const StepResult& r, double learning_rate, StepSpeed speed, bool last);
    void record_sequences(const Loader::MicroBatch& m) const;
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

    // Of a run whose ranks do not step together (run/share_run.cpp):
    Exit run_shares(ShareSource& shares);
    int64_t next_stop() const;
    void compute_share(int64_t share, const Loader::Plan& plan);
    void record_share(int64_t share, const StepResult& r, double learning_rate, double ms, Traffic traffic);
    void record_lost(const std::vector<int>& lost);

    static constexpr int kMemorySteps = 3;  // after so many, everything made at first use exists, graphs too

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
    // Of a run by shares, on rank 0:
    struct Shares {
        int per_step = 1;
        int64_t first = 0;                      // dealt since all ranks were at state_.step
        uint64_t first_tokens = 0;              // state_.tokens then
        int64_t n_computed = 0, recorded = -1;  // by this rank; the last one in a record
        Stopwatch since_record;
        std::vector<int> lost;  // workers that are known to be lost
    } shares_;
};
