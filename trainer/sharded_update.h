// ZeRO: each rank owns a shard of the flat buffers (trainer/shards.h) and updates the parameters in it.
//
//   parallel.zero   masters, moments   gradient                             parameters that ops read
//   1               of the shard       whole, summed into the shard         whole
//   2               of the shard       of a few blocks, summed into the     whole
//                                      shard when a block's are final
//   3               of the shard       as 2                                 of two blocks: gathered one block ahead
//
// The embedding has memory of its own in stages 2 and 3, because a pass begins and ends with it.
// Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".
#pragma once
#include <optional>

#include "comm/gradient_reduce_scatter.h"
#include "comm/lane.h"
#include "trainer/gradient_sync.h"
#include "trainer/shards.h"
#include "trainer/windows.h"

class ShardedUpdate final : public GradientSync {
  public:
    ShardedUpdate(const Group& group, const TrainerOptions& options, TrainerMemory& memory);
    const char* name() const override { return name_.c_str(); }
    void start(Stream s) override;

    void begin_step(int64_t step, double learning_rate) override;
    void begin_backward(Stream s) override;
    void gradient_ready(Range part, Stream s) override;
    void finish_step(StepGraphs& graphs, Stream s) override;
    bool needs_host() const override { return group_.device().needs_host(); }
    bool sums_each_micro_batch() const override { return stage_ > 1; }
    Outcome wait(Stream s) override;
    double waited_ms() const override { return waited_ms_; }
    const Mark* summed() const override { return summed_.get(); }
    const Mark* updated() const override { return updated_.get(); }
    const Mark* gathered() const override { return gathered_.get(); }

    std::vector<StateTensor> parameters() override;
    std::vector<StateTensor> state() override;
    bool is_scattered() const override { return true; }
    uint64_t updates() const override { return optimizer_.updates(); }
    void set_updates(uint64_t n) override { optimizer_.set_updates(n); }
    void collect_state(Stream s) override;
    void distribute_state(Stream s) override;
    uint64_t weights_hash(Stream s) override;

  private:
    // Rank 0's copy of a flat buffer that is scattered over the ranks.
    using Whole = std::vector<float>;  // (n)

    void reduce_rows(int window, Stream s);
    void reduce_row(int row, Buf parts, bool add, Stream s);
    void hand_down(int window, Stream s);
    void clear(int window, Stream s);
    void sum_squares(Stream s);
    void update(Stream s);
    void gather_row(int row, Buf whole, Stream s);
    void gather_window(int window, Stream s);
    void gather_parameters(Stream s);
    void before_block(int block, int next, Stream s);
    void fetch(int window, Stream s);
    void give(Lane::Work work, Stream s);
    void join(Stream s);
    std::vector<Buf> kept() const;
    void make_wholes();
    std::vector<StateTensor> tensors_of(size_t whole, const std::string& prefix);
    template <class Copy>
    void for_each_place(int rank, std::vector<float>& shard, Whole& whole, Copy&& copy) const;
    void compare_parameters(Stream s);

    const Backend& k_;
    const Group& group_;
    TrainerMemory& memory_;
    const int stage_;
    const ShardLayout& layout_;
    const float max_norm_;  // 0: never clip
    const std::unique_ptr<Lane> lane_;
    const std::unique_ptr<GradientReduceScatter> reduce_;  // over lane_'s group
    const std::string name_;
    Optimizer optimizer_;
    const MarkOwner summed_, updated_, gathered_;
    const HostBuffer norm_;  // (1) stat, pinned
    StepGraphs::Piece squares_piece_, update_piece_;

    Buf masters_, gradient_;  // (shard) f32
    Buf rounded_;             // (shard) bf16; absent where ops read f32
    Buf addend_;              // (unit) f32: a further micro-batch's sum; absent in stage 1

    int next_row_ = 0;              // rows from here up have been summed
    int passes_ = 0;                // backward passes of this step
    double waited_ms_ = 0;          // in give() and join() during passes
    bool is_fetching_ = false;      // since the last join()
    std::vector<uint8_t> in_slot_;  // stage 3, (windows): the slot holds this window's parameters
    std::vector<Whole> wholes_;     // on rank 0: masters, then moments
};
