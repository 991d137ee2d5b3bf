// One rank's share of training: memory, one optimizer step, evaluation.  Knows nothing of files or of where tokens come
// from.
#pragma once
#include <array>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "comm/comm.h"
#include "comm/reduce.h"
#include "comm/run_fold.h"
#include "comm/topology.h"
#include "common/clock.h"
#include "model/gpt2.h"

struct TrainerOptions {
    GPT2Config model;
    int global_batch_size = 0, micro_batch_size = 0;  // sequences
    Reduction reduction = Reduction::ordered;
    OptimizerUpdate optimizer;  // its scalars: kind, betas, eps, weight_decay, momentum
    float grad_clip = 0;        // 0: off
    uint64_t seed = 0;
    DType real = DType::f32;  // f64: the double instance, for tests
    bool inference = false;   // no gradients, moments or backward activations: evaluate() and next_logits() only
};

struct StepResult {
    double loss = 0;       // mean over the tokens of the global batch, before the update
    double grad_norm = 0;  // before clipping
    bool updated = true;   // false: loss or norm not finite, parameters left as they were
    struct Phases {
        double data = 0, forward = 0, backward = 0, reduce = 0, optimizer = 0;
    } ms;
};

struct EvalResult {
    double loss = 0;      // mean over tokens, nats
    double accuracy = 0;  // share of tokens whose largest logit is the target
    uint64_t tokens = 0;
};

// A tensor of the training state that a checkpoint keeps, in backend memory.
struct StateTensor {
    std::string name;
    std::vector<size_t> shape;  // as saved: V rows of wte, not Vp
    Buf data;                   // (product of shape)
};

class Trainer {
  public:
    // Inputs and targets of one micro-batch, (B, T) each; valid until the next call.
    struct Tokens {
        std::span<const int32_t> inputs, targets;
    };
    using NextMicroBatch = std::function<Tokens()>;
    using ReadSequence = std::function<void(uint64_t index, std::span<int32_t> inputs, std::span<int32_t> targets)>;

    Trainer(const Backend& k, Comm& comm, TrainerOptions options);
    Trainer(const Trainer&) = delete;
    Trainer& operator=(const Trainer&) = delete;

    // Random parameters, moments zero.  The same on every rank and for every number of ranks.
    void initialize();
    // Rank 0's parameters and moments to all; then all compare hashes: a difference is Error(Exit::internal) naming
    // ranks.
    void broadcast_state();

    // `step` counts all global batches taken before, skipped updates included; it selects the dropout masks.
    StepResult step(int64_t step, double learning_rate, const NextMicroBatch& next);
    // Mean loss over sequences [0, n) without dropout: batches of micro_batch_size, dealt to ranks, summed in order.
    EvalResult evaluate(uint64_t n_sequences, const ReadSequence& read);
    // Logits of the token after `tokens` (at most T of them), (V).  Rank-local.
    std::vector<float> next_logits(std::span<const int32_t> tokens);

    std::vector<StateTensor> parameters();
    std::vector<StateTensor> moments();  // "m.<name>", "v.<name>"
    uint64_t updates() const { return updates_; }
    void set_updates(uint64_t n) { updates_ = n; }  // Adam's bias correction, from a checkpoint
    uint64_t weights_hash();
    // Every parameter and moment is a finite number.
    bool finite();
    const BatchShare& share() const { return share_; }
    const GPT2Config& config() const { return o_.model; }
    std::string memory_table() const;  // a line for each kind of tensor, and the sum
    // Test hook: called with this rank's gradient (n) just before the reduction.
    std::function<void(std::span<float>)> before_reduce;

  private:
    std::vector<const Arena*> arenas() const;
    void plan_memory();
    void plan_io(size_t n_params);
    void mark_decay();
    void accumulate_micro_batches(int64_t step, const NextMicroBatch& next, StepResult& result);
    double gather_loss();
    void update(double learning_rate);
    GPT2Batch batch() const;
    std::vector<StateTensor> list(GPT2Params& p, const std::string& prefix);

    const Backend& k_;
    Comm& comm_;
    const TrainerOptions o_;
    const BatchShare share_;
    const Stream stream_ = nullptr;
    RunFold fold_;
    uint64_t updates_ = 0;

    Arena param_arena_{"parameters"}, moment_arena_{"optimizer state"}, act_arena_{"activations"},
        io_arena_{"batch and scalars"};
    std::vector<Arena> grad_arena_;  // one for each buffer of the fold
    GPT2Params params_, m_, v_;
    std::vector<GPT2Params> grads_;
    GPT2Acts acts_;
    Buf inputs_, targets_;    // (B, T) i32
    Buf where_;               // (2) u32
    Buf losses_;              // (n_micro * B) stat: sum over each sequence
    Buf decay_;               // (n/64) u8
    Buf rate_, clip_, norm_;  // (3), (1), (1) stat
    Buf norm_scratch_;        // (grad_norm_scratch(n)) stat
};

// Shapes kiln cannot run, named before any memory is taken: Error(Exit::usage).
void check_model(const GPT2Config& c);
