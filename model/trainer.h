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
#include "comm/reducer.h"
#include "comm/run_fold.h"
#include "comm/topology.h"
#include "common/clock.h"
#include "kernels/owners.h"
#include "model/gpt2.h"

struct TrainerOptions {
    GPT2Config model;
    int global_batch_size = 0, micro_batch_size = 0;  // sequences
    Reduction reduction = Reduction::ordered;
    OptimizerUpdate optimizer;  // its scalars: kind, betas, eps, weight_decay, momentum
    float grad_clip = 0;        // 0: off
    uint64_t seed = 0;
    DType real = DType::f32;  // bf16: activations and the parameters that ops read; f64: the double instance, for tests
    NcclComm* nccl = nullptr;  // where every rank has a GPU of its own
    bool inference = false;    // no gradients, moments or backward activations: evaluate() and next_logits() only
};

struct StepResult {
    double loss = 0;       // mean over the tokens of the global batch, before the update
    double grad_norm = 0;  // before clipping
    bool updated = true;   // false: norm not finite, parameters left as they were
    struct Phases {
        double data = 0;  // of the host, to get the tokens; the others are the device's
        double forward = 0, backward = 0, reduce = 0, optimizer = 0;
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
    ~Trainer();

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
    const GPT2Config& config() const { return o_.model; }
    const char* reduction() const;     // how gradients are summed: "ordered through host memory"
    std::string memory_table() const;  // a line for each kind of tensor, and the sum
    // Test hook: sees this rank's gradient (n) just before the reduction, and may change it.
    std::function<void(std::span<double>)> before_reduce;

  private:
    // Pinned host memory that a micro-batch is sent from; reused when the device has come past `sent`.
    struct Slot {
        HostBuffer inputs, targets, order;  // (B, T), (B, T), (B*T) i32
        HostBuffer where;                   // (2) u32
        MarkOwner sent;
        Slot(const Backend& k, size_t BT)
            : inputs(k, BT * 4), targets(k, BT * 4), order(k, BT * 4), where(k, 8), sent(k) {}
    };
    // The points of a step that its phases are measured between.
    struct Marks {
        std::vector<MarkOwner> start, forward, backward;  // (n_micro)
        MarkOwner reduced, end;
        Marks(const Backend& k, int n_micro);
    };

    std::vector<const Arena*> arenas() const;
    void plan_memory();
    void plan_io(size_t n_params);
    void allocate();
    void mark_decay();
    bool has_masters() const { return o_.real == DType::bf16; }
    GPT2Params& masters() { return has_masters() ? masters_ : params_; }
    Buf flat_masters() const;
    Buf flat_moments() const;
    Buf flat_gradient(int buffer) const;
    void send(const Tokens& tokens, const Slot& slot, int64_t step, int micro);
    void accumulate_micro_batches(int64_t step, const NextMicroBatch& next, StepResult& result);
    void show_gradient(Buf grad);
    double gather_loss(const std::vector<double>& mine);
    void update(double learning_rate, Buf grad);
    void collect(StepResult& result);
    GPT2Batch batch() const;
    std::vector<StateTensor> list(GPT2Params& p, const std::string& prefix);

    const Backend& k_;
    Comm& comm_;
    const TrainerOptions o_;
    const BatchShare share_;
    const StreamOwner stream_owner_;
    const Stream stream_;
    RunFold fold_;
    uint64_t updates_ = 0;

    Arena param_arena_, master_arena_, moment_arena_, act_arena_{"activations"}, io_arena_{"batch and scalars"};
    std::vector<Arena> grad_arena_;  // one for each buffer of the fold
    GPT2Params params_;              // what the ops read
    GPT2Params masters_;             // f32; absent where params_ are the masters
    GPT2Params m_, v_;
    std::vector<GPT2Params> grads_;
    GPT2Acts acts_;
    Buf inputs_, targets_;    // (B, T) i32
    Buf order_;               // (B*T) i32: rows sorted by token
    Buf where_;               // (2) u32
    Buf losses_;              // (n_micro * B) stat: sum over each sequence
    Buf decay_;               // (n/64) u8
    Buf rate_, clip_, norm_;  // (3), (1), (1) stat
    Buf norm_scratch_;        // (grad_norm_scratch(n)) stat
    Buf hash_;                // (2) u32
    std::unique_ptr<Reducer> reducer_;
    std::vector<Slot> slots_;                        // (2): one is filled while the other is on its way
    std::optional<Marks> marks_;                     // absent when only evaluating
    std::optional<HostBuffer> rate_host_, outcome_;  // pinned: rate_ on its way there, losses_ and norm_ back
};

// Numbers in host memory - f32, f64 or bf16 - as doubles.
std::vector<double> as_doubles(const Buf& host);

// Shapes kiln cannot run, named before any memory is taken: Error(Exit::usage).
void check_model(const GPT2Config& c, DType real);
