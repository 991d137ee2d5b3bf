// A run's config: a YAML file plus --set overrides.  Defaults are the initialisers below; config_words.h has the
// words, config_keys.cpp ranges and meanings, and README.md a table of all three.  An unknown or duplicate key,
// a wrong type or an impossible value is Error(Exit::usage) with file:line, the value, what is allowed and, for a near
// miss, "did you mean".  A known key or value whose feature is not built yet is "not available in this build".
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "common/config_words.h"

struct Config {
    struct Run {
        std::string name;  // required; one path component
        std::string out_dir = "runs";
        uint64_t seed = 1337;
        double max_minutes = 0;                   // 0: no limit; else save and exit 85
        double timeout_seconds = 600;             // a rank that another one waits for longer is lost: exit 75
        OnBadStep on_bad_step = OnBadStep::skip;  // where a loss or gradient is not finite
    } run;
    struct Device {
        DeviceKind kind = DeviceKind::automatic;
        Precision dtype = Precision::fp32;                 // of activations and matrix products
        int threads = 0;                                   // 0: auto, this rank's share of the host's cores
        UseAttention attention = UseAttention::automatic;  // the kernels of attention on a GPU
        UseGraph graph = UseGraph::automatic;              // replay a GPU's step from a CUDA graph
        UseTuning tuning = UseTuning::on;                  // choose algorithms of a GPU's matrix products by timing
    } device;
    struct Model {
        std::string architecture = "gpt2";
        int n_layer = 0, n_head = 0, n_embd = 0, context_length = 0, vocab_size = 0;  // required
        double dropout = 0;
        bool bias = true;
        std::string init_from;  // directory; empty: random
    } model;
    struct Data {
        std::vector<std::string> train, val;  // train required; globs
        bool shuffle = true;
        std::string tokenizer;  // file; only for generate and samples
        ShardFormat format = ShardFormat::automatic;
    } data;
    struct Train {
        int64_t max_steps = 0;  // exactly one of max_steps and max_epochs is given
        double max_epochs = 0;
        int global_batch_size = 0, micro_batch_size = 0;  // required; sequences
        double grad_clip = 1.0;                           // 0: off
        Recompute recompute = Recompute::none;
    } train;
    struct Optimizer {
        OptimizerKind name = OptimizerKind::adamw;
        double learning_rate = 0;  // required
        double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, momentum = 0;
    } optimizer;
    struct Schedule {
        ScheduleKind name = ScheduleKind::constant;
        int64_t warmup_steps = 0;
        int64_t decay_steps = 0;  // 0: "all"
        double min_learning_rate = 0;
    } schedule;
    struct Eval {
        int64_t interval = 0;  // 0: never
        int64_t tokens = 0;    // 0: "all"
        std::vector<std::string> sample_prompts;
    } eval;
    struct Checkpoint {
        int64_t interval = 0;  // 0: never
        int keep = 3;
    } checkpoint;
    struct LogKeys {
        int64_t interval = 1;
    } log;
    struct Parallel {
        ParallelMethod method = ParallelMethod::allreduce;
        int servers = 1, staleness = 0;  // of a parameter server; 0: synchronous
        UseAllReduce allreduce = UseAllReduce::automatic;
        bool overlap = false;                      // sum gradients beside the backward pass
        Precision reduce_dtype = Precision::fp32;  // of gradients on the wire
        int zero = 0;                              // stage of ZeRO
        int tensor = 1, pipeline = 1;
        // Of diloco:
        int64_t sync_interval = 50;
        double outer_learning_rate = 0.7, outer_momentum = 0.9;
        OuterDtype outer_dtype = OuterDtype::fp32;
        bool streaming = false;
    } parallel;
};

// Reads and checks the file, then applies each "section.key=value" (value in YAML).
Config load_config(const std::string& path, const std::vector<std::string>& overrides);
// The same from text in memory; `name` stands for the file in messages.
Config parse_config(const std::string& text, const std::string& name, const std::vector<std::string>& overrides);
// The resolved config as YAML that load_config reads back to the same values: config.yaml of a run.
std::string to_yaml(const Config& config);
// For messages: value_of(c, "model.n_layer") is "4", value_of(c, "data.train") "[a.bin, b.bin]".
std::string value_of(const Config& config, const std::string& key);
// The table of keys in README.md, as Markdown.
std::string config_table();
// Names every key whose value differs ("optimizer.learning_rate"), for resume.
std::vector<std::string> differing_keys(const Config& a, const Config& b);
// The keys of that list that a resume may change (design: sizes of the run, not of the model).
bool may_change_on_resume(const std::string& key);
