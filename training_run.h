// A training run from its config to its last checkpoint, and the pieces that the other commands share.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/comm.h"
#include "common/clock.h"
#include "common/config.h"
#include "common/run_dir.h"
#include "data/loader.h"
#include "data/tokenizer.h"
#include "kernels/nvml.h"
#include "model/checkpoint.h"
#include "model/peak.h"
#include "model/schedule.h"
#include "model/trainer.h"
#include "run_device.h"

// How far a run has come, for the status that a failure leaves behind.
struct Place {
    fs::path run_dir;  // empty until it is open
    int64_t step = 0;
};

// What every command works with.
struct Context {
    RunDevice device;
    Comm& comm;
    Log& log;
    Config config;
    fs::path run_dir;
    int threads;         // of this rank
    std::string commit;  // of the source this binary was built from
    Place& place;
};

// Every host opens its own copy of the data: another file set would train on other tokens, or for another time.
constexpr const char* kOtherData = "data files other than rank 0's; give every host the same shards";

// What a model needs to run, and what more it needs to be trained.
TrainerOptions model_options(const Context& x);
TrainerOptions training_options(const Context& x);
TokenStream open_data(const Context& x, const char* key, const std::vector<std::string>& patterns);
// data.tokenizer, checked against model.vocab_size.
Tokenizer open_tokenizer(const Config& c);
// What a model is given to continue: the prompt, or end-of-text where it is empty.
std::vector<int32_t> prompt_tokens(const Tokenizer& tokenizer, const std::string& prompt);
EvalResult evaluate_on(const Context& x, Trainer& trainer, const TokenStream& val);

// Of the GPU's memory, taken by CUDA's libraries before the first step.
struct LibraryBytes {
    size_t all = 0, nccl = 0;  // that NCCL has of all
};

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
    void record_step(const StepResult& r, double learning_rate, double ms, bool last);
    void step(const Trainer::NextMicroBatch& next);
    void check_memory();
    void bad_step(const StepResult& r);
    bool out_of_time();
    void evaluate_and_sample();
    void record_evaluation(const EvalResult& r);
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
    LibraryBytes libraries_;             // rank 0
    std::unique_ptr<RunDirectory> dir_;  // rank 0
    std::optional<GpuMonitor> gpu_;      // rank 0, where it computes on a GPU
    RunState state_;
    Stopwatch run_clock_;
    int64_t first_step_ = 0;  // where this process began
    int bad_steps_ = 0;
    bool peak_is_doubted_ = false;
};
