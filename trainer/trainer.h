// One rank's share of training: one optimizer step after the other.  Knows nothing of files or of where
// tokens come from.
#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "comm/group.h"
#include "kernels/owners.h"
#include "model/session.h"
#include "trainer/gradient_sync.h"
#include "trainer/step_graph.h"
#include "trainer/token_feed.h"

struct StepResult {
    double loss = 0;       // mean over the tokens of the global batch, before the update
    double grad_norm = 0;  // before clipping
    bool updated = true;   // false: norm not finite, parameters left as they were
    struct Phases {
        double data = 0;  // the device sat idle, waiting for tokens
        double forward = 0, backward = 0, reduce = 0, optimizer = 0, gather = 0;  // of the device
        double waited = 0;  // a part of forward and backward: for messages that the host moves
    } ms;
};

class Trainer {
  public:
    using Tokens = TokenFeed::Tokens;
    using NextMicroBatch = TokenFeed::NextMicroBatch;

    // make_sync chooses the way from gradient to new parameters.
    Trainer(const Group& group, TrainerOptions options, const MakeGradientSync& make_sync = make_gradient_sync);
    Trainer(const Trainer&) = delete;
    Trainer& operator=(const Trainer&) = delete;
    ~Trainer();

    // Random parameters, moments zero.  The same on every rank and for every number of ranks.
    void initialize();
    // Rank 0's parameters and state to all; see GradientSync.
    void distribute_state() { sync_->distribute_state(stream_); }
    void collect_state() { sync_->collect_state(stream_); }

    // tune_on_random_tokens() for a step of these shapes.  Nothing is summed over ranks, and nothing is updated.
    std::string tune();

    // `step` counts all global batches taken before, skipped updates included; it selects the dropout masks.  `next` is
    // called for each micro-batch of this rank.  `more`: the next call will be for step + 1, whose tokens are fetched
    // and sent while the device works on this one; what goes wrong with them is thrown by that call.
    StepResult step(int64_t step, double learning_rate, const NextMicroBatch& next, bool more = false);
    // The model as it is, to be evaluated or to write text: a view, for use between steps.
    Session& session() { return *session_; }
    // Between these two calls session() has the parameters that a checkpoint keeps.
    void enter_evaluation() { sync_->enter_evaluation(stream_); }
    void leave_evaluation() { sync_->leave_evaluation(stream_); }
    // See GradientSync.
    ShareSource* shares() { return sync_->shares(); }
    std::vector<ServerReport> server_reports() { return sync_->server_reports(); }
    void close(Exit code) { sync_->close(code); }

    // The masters: f32 also where ops read bf16, on rank 0 where they are scattered.  After writing to them call
    // parameters_changed().
    std::vector<StateTensor> parameters() { return sync_->parameters(); }
    void parameters_changed();
    std::vector<StateTensor> moments() { return sync_->state(); }
    std::string accept(const std::vector<std::string>& saved) { return sync_->accept(saved); }  // see GradientSync
    uint64_t updates() const { return sync_->updates(); }
    void set_updates(uint64_t n) { sync_->set_updates(n); }  // from a checkpoint
    // See GradientSync.
    uint64_t weights_hash() { return sync_->weights_hash(stream_); }
    // Every parameter and moment of all ranks is a finite number; all ranks call it.
    bool finite();
    const BatchShare& share() const { return share_; }
    const ModelConfig& config() const { return o_.model; }
    const GradientSync& sync() const { return *sync_; }
    const TrainerMemory& memory() const { return memory_; }
    Stream stream() const { return stream_; }  // all work but the tokens' way to the device
    // Whether steps are replayed from graphs, and why not where they could have been.
    bool uses_graphs() const { return graphs_->used(); }
    const std::string& graph_note() const { return graphs_->note(); }

  private:
    // Points of a step, between which its phases are timed.
    struct Marks {
        std::vector<MarkOwner> start, forward, backward;  // (n_micro)
        Marks(const Backend& k, int n_micro);
    };

    bool own_state_is_finite();
    void accumulate_micro_batches();
    void finish_gradient(const Pass& last, const std::vector<std::pair<int, int>>& folds);
    double gather_loss(const std::vector<double>& mine);
    void finish_step();
    void collect(StepResult& result);
    Batch batch(int micro) const;
    Pass training_pass(const Batch& batch, const Tensors& grads, bool accumulate) const;

    const Backend& k_;
    const Group& group_;
    const TrainerOptions o_;
    const BatchShare share_;
    const StreamOwner stream_owner_;
    const Stream stream_;  // all work but the tokens' way to the device
    TrainerMemory memory_;
    TokenFeed feed_;
    const std::unique_ptr<GradientSync> sync_;
    const Marks marks_;
    const std::vector<Range> block_ranges_;  // (L) of the flat gradient
    const HostBuffer losses_;                // (n_micro * B) stat, pinned: on their way back
    StepGraphs::Piece piece_;  // a whole step, or what comes before finish_step() where that needs the host
    // Once there is memory:
    std::optional<StepGraphs> graphs_;
    std::optional<Session> session_;
};
