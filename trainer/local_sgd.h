// Local SGD and DiLoCo: ranks exchange parameters every `sync_interval` (H) steps, and no gradients.
//
// Every rank is a worker: it trains its own replica on its share of each global batch, with its own inner optimizer and
// clipping, by the gradient of the mean over its share.  An exchange makes the mean of all replicas, and the outer
// optimizer (trainer/outer_optimizer.h) moves the outer parameters, which all ranks hold with equal bits.  The outer
// parameters are the model: they are evaluated, and a checkpoint's model.safetensors has them.
//
//   H steps     after each step s with (s + 1) mod H = 0 the new outer parameters replace the replicas.  Steps are those
//               of the run, so that a resume changes nothing.  The inner optimizer keeps its moments
//   streaming   (Douillard et al. 2025, arXiv 2501.18512) the flat parameters are cut into up to 8 fragments of equal
//               size.  Fragment p is exchanged in steps s with s mod H = p H / fragments: a thread with a communicator
//               of its own sends it as it was before step s, while the device computes step s.  After step s the
//               fragment of the replica becomes the mean of itself and of its outer parameters.  Nothing is on its way
//               between two steps, and the time of arrival changes no bit
//
// outer_dtype fp32 sends parameters; bf16 and int4 send their differences to the outer parameters, with error feedback
// (comm/rank_mean.h).
//
// The outer state lies in host memory.  It is used once in H steps, messages need it there, the GPU's memory stays free,
// and CPU and GPU get the same bits.  Beside the outer parameters a checkpoint has:
//
//   m.<parameter>, v.<parameter>   worker 0's moments: those that a run of another method goes on with
//   outer.<parameter>              the outer optimizer's momentum
//   worker.<r>                     of each worker: the flat vectors of its replica, its moments and its errors
//
// With as many ranks as workers a run goes on bit for bit.  With more or fewer, or after another method, all ranks go on
// from the outer parameters with worker 0's moments.
#pragma once
#include <future>
#include <string>
#include <vector>

#include "comm/rank_mean.h"
#include "trainer/gradient_sync.h"
#include "trainer/outer_optimizer.h"

class LocalSgd final : public GradientSync {
  public:
    LocalSgd(const Group& group, const TrainerOptions& options, TrainerMemory& memory);
    const char* name() const override { return name_.c_str(); }
    float gradient_scale() const override { return float(group_.size()); }
    void start(Stream s) override { optimizer_.start(s); }

    void begin_step(int64_t step, double learning_rate) override;
    void gradient_ready(Range, Stream) override {}
    void finish_step(StepGraphs& graphs, Stream s) override;
    bool needs_host() const override { return true; }
    Outcome wait(Stream s) override;
    const Mark* summed() const override { return agreed_.get(); }
    const Mark* updated() const override { return updated_.get(); }
    const Mark* gathered() const override { return exchanged_.get(); }

    std::vector<StateTensor> parameters() override;
    std::vector<StateTensor> state() override;
    std::string accept(const std::vector<std::string>& saved) override;
    bool is_scattered() const override { return true; }
    uint64_t updates() const override { return optimizer_.updates(); }
    void set_updates(uint64_t n) override { optimizer_.set_updates(n); }
    void collect_state(Stream s) override;
    void distribute_state(Stream s) override;
    uint64_t weights_hash(Stream s) override;
    void enter_evaluation(Stream s) override;
    void leave_evaluation(Stream s) override;

  private:
    struct Fragment {
        Range range;
        int64_t remainder;  // of the steps that exchange it
    };

    void agree(StepGraphs& graphs, Stream s);
    void exchange(Range range);
    void send_ahead();
    void receive(Stream s);
    void fetch_replica(Range range, Stream s);
    void put_replica(Range range, const Buf& from, Stream s);
    std::vector<float> image(Stream s);
    void load_image(const std::vector<float>& image, Stream s);
    size_t n_image() const { return 2 * n_ + memory_.flat_moments().count; }

    const Backend& k_;
    const Group& group_;
    TrainerMemory& memory_;
    const Config::Parallel parallel_;
    const OuterRule rule_;
    const float max_norm_;  // 0: never clip
    const size_t n_;        // elements of a flat vector
    const std::string name_;
    const std::unique_ptr<Comm> own_comm_;  // streaming: of the thread that exchanges
    RankMean mean_;
    std::vector<Fragment> fragments_;  // streaming
    Optimizer optimizer_;
    const MarkOwner agreed_, updated_, exchanged_;
    const StreamOwner downloads_;  // of fragments, before a step
    StepGraphs::Piece norm_piece_, update_piece_;
    const HostBuffer norm_;  // (1) f32, pinned
    const HostBuffer host_;  // (4, n) f32, pinned: the next four
    const Buf outer_;        // (n)
    const Buf momentum_;     // (n)
    const Buf error_;        // (n) see RankMean; zero in fp32
    const Buf replica_;      // (n) the worker's, on its way to and from an exchange, and during an evaluation

    int64_t step_ = 0;
    Outcome outcome_;
    Range sent_;  // elements that are on their way; none: {}
    std::future<void> arrival_;
    // On rank 0, between two steps: each worker's image, (replica (n), moments, error (n)).
    std::vector<std::vector<float>> images_;             // (ranks), or one, or none
    bool takes_momentum_ = true, takes_workers_ = true;  // of a checkpoint
};
std::unique_ptr<GradientSync> make_local_sgd(const Group& group, const TrainerOptions& options, TrainerMemory& memory);
