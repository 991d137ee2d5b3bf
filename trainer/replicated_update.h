// Every rank has the sum of the whole gradient and updates every parameter, so nothing has to be gathered.
//
// The gradient is summed in buckets: whole parts, in the order in which they become ready, joined until they are
// bucket_bytes long.  With parallel.overlap a bucket's sum runs beside the rest of the backward pass; otherwise one
// bucket is everything.
#pragma once
#include "comm/gradient_all_reduce.h"
#include "comm/lane.h"
#include "trainer/gradient_sync.h"

class ReplicatedUpdate final : public GradientSync {
  public:
    ReplicatedUpdate(const Group& group, const TrainerOptions& options, TrainerMemory& memory);
    const char* name() const override { return name_.c_str(); }
    void start(Stream s) override;
    size_t connection_bytes() const override { return connection_bytes_; }

    void begin_step(int64_t step, double learning_rate) override;
    void gradient_ready(Range part, Stream s) override;
    void finish_step(StepGraphs& graphs, Stream s) override;
    bool needs_host() const override { return lane_->needs_host(); }
    Outcome wait(Stream s) override;
    const Mark* summed() const override { return summed_.get(); }
    const Mark* updated() const override { return updated_.get(); }

    std::vector<StateTensor> parameters() override { return memory_.parameters(); }
    std::vector<StateTensor> state() override { return optimizer_.state(); }
    uint64_t updates() const override { return optimizer_.updates(); }
    void set_updates(uint64_t n) override { optimizer_.set_updates(n); }
    void distribute_state(Stream s) override;
    uint64_t weights_hash(Stream s) override { return memory_.weights_hash(k_, s); }

  private:
    void update(Stream s);

    const Backend& k_;
    const Group& group_;
    TrainerMemory& memory_;
    const float max_norm_;  // 0: never clip
    const size_t bucket_elements_;
    const std::unique_ptr<Lane> lane_;
    const std::unique_ptr<GradientAllReduce> all_reduce_;  // over the lane's group
    const std::string name_;
    size_t bucket_end_ = 0;  // parts from here on have been given to the lane
    Optimizer optimizer_;
    size_t connection_bytes_ = 0;
    const MarkOwner summed_, updated_;
    StepGraphs::Piece after_sum_;
    const HostBuffer norm_;  // (1) stat, pinned: on its way back
};
std::unique_ptr<GradientSync> make_replicated_update(const Group& group, const TrainerOptions& options,
                                                     TrainerMemory& memory);
