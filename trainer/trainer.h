// One rank's share of training: memory, one optimizer step, evaluation.  Knows nothing of files or of where tokens come
// from.
#pragma once
#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "comm/comm.h"
#include "comm/gradient_all_reduce.h"
#include "comm/run_fold.h"
#include "common/clock.h"
#include "kernels/owners.h"
#include "trainer/step_graph.h"
#include "trainer/token_feed.h"

struct StepResult {
    double loss = 0;       // mean over the tokens of the global batch, before the update
    double grad_norm = 0;  // before clipping
    bool updated = true;   // false: norm not finite, parameters left as they were
    struct Phases {
        double data = 0;                                              // the device sat idle, waiting for tokens
        double forward = 0, backward = 0, reduce = 0, optimizer = 0;  // of the device
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
    using Tokens = TokenFeed::Tokens;
    using NextMicroBatch = TokenFeed::NextMicroBatch;
    using ReadSequence = std::function<void(uint64_t index, std::span<int32_t> inputs, std::span<int32_t> targets)>;

    Trainer(const Backend& k, Comm& comm, TrainerOptions options);
    Trainer(const Trainer&) = delete;
    Trainer& operator=(const Trainer&) = delete;
    ~Trainer();

    // Random parameters, moments zero.  The same on every rank and for every number of ranks.
    void initialize();
    // Rank 0's parameters and moments to all; then all compare hashes: a difference is Error(Exit::internal) naming
    // ranks.
    void broadcast_state();

    // tune_on_random_tokens() for a step of these shapes.  Nothing is summed over ranks, and nothing is updated.
    std::string tune();

    // `step` counts all global batches taken before, skipped updates included; it selects the dropout masks.  `next` is
    // called for each micro-batch of this rank.  `more`: the next call will be for step + 1, whose tokens are fetched
    // and sent while the device works on this one; what goes wrong with them is thrown by that call.
    StepResult step(int64_t step, double learning_rate, const NextMicroBatch& next, bool more = false);
    // Mean loss over sequences [0, n) without dropout: batches of micro_batch_size, dealt to ranks, summed in order.
    EvalResult evaluate(uint64_t n_sequences, const ReadSequence& read);
    // Logits of the token after `tokens` (at most T of them), (V).  Rank-local.
    std::vector<float> next_logits(std::span<const int32_t> tokens);

    // The masters: f32 also where ops read bf16.  After writing to them call parameters_changed().
    std::vector<StateTensor> parameters();
    void parameters_changed();
    std::vector<StateTensor> moments();  // "m.<name>", "v.<name>"
    uint64_t updates() const { return updates_; }
    void set_updates(uint64_t n) { updates_ = n; }  // Adam's bias correction, from a checkpoint
    uint64_t weights_hash();
    // Every parameter and moment is a finite number.
    bool finite();
    const BatchShare& share() const { return share_; }
    const ModelConfig& config() const { return o_.model; }
    const char* reduction() const;  // how gradients are summed: "ordered through host memory"
    // Of the device's memory, that the library which sums them has taken for itself.
    size_t reduction_bytes() const { return reduction_bytes_; }
    const TrainerMemory& memory() const { return memory_; }
    // Whether steps are replayed from graphs, and why not where they could have been.
    bool uses_graphs() const { return graphs_ && graphs_->used(); }
    std::string graph_note() const { return graphs_ ? graphs_->note() : ""; }
    // Test hook: sees this rank's gradient (n) just before the reduction, and may change it.
    std::function<void(std::span<double>)> before_reduce;

  private:
    // The points of a step that its phases are measured between.
    struct Marks {
        std::vector<MarkOwner> start, forward, backward;  // (n_micro)
        MarkOwner reduced, end;
        Marks(const Backend& k, int n_micro);
    };

    void mark_decay();
    void connect();
    bool has_masters() const { return memory_.has_masters(); }
    const Tensors& masters() const { return has_masters() ? memory_.masters : memory_.params; }
    void accumulate_micro_batches();
    void show_gradient(Buf grad);
    double gather_loss(const std::vector<double>& mine);
    void set_rates(double learning_rate);
    void update(Buf grad);
    void collect(StepResult& result);
    Batch batch(int micro) const;
    Pass pass(const Batch& batch) const;
    Pass training_pass(const Batch& batch, const Tensors& grads, bool accumulate) const;
    std::vector<StateTensor> list(const Tensors& tensors, const std::string& prefix) const;

    const Backend& k_;
    Comm& comm_;
    const TrainerOptions o_;
    const BatchShare share_;
    const StreamOwner stream_owner_;
    const Stream stream_;  // all work but the tokens' way to the device
    RunFold fold_;
    uint64_t updates_ = 0;

    TrainerMemory memory_;
    std::unique_ptr<GradientAllReduce> reducer_;
    size_t reduction_bytes_ = 0;
    TokenFeed feed_;
    std::optional<Marks> marks_;                     // absent when only evaluating
    std::optional<HostBuffer> rate_host_, outcome_;  // pinned: rate on its way there, losses and norm back
    // A step is one piece, or two around a reduction that needs the host.
    StepGraphs::Piece whole_, until_reduction_, after_reduction_;
    std::optional<StepGraphs> graphs_;  // absent when only evaluating
};

// Numbers in host memory - f32, f64 or bf16 - as doubles.
std::vector<double> as_doubles(const Buf& host);
