// All that a Trainer keeps in its backend's memory.
#pragma once
#include <vector>

#include <optional>

#include "comm/topology.h"
#include "model/memory.h"
#include "trainer/options.h"
#include "trainer/shards.h"
#include "trainer/windows.h"

// The micro-batches of one step on this rank, laid out alike on the host and on the device: one copy moves all.
struct StepBatch {
    Arena arena;
    Buf inputs, targets;  // (n_micro, B, T) i32
    Buf order;            // (n_micro, B*T)  i32: see EmbeddingGrad
    Buf where;            // (n_micro, 2)    u32: see DropoutMask
    StepBatch(const char* name, int n_micro, size_t BT);
};

class TrainerMemory : public ModelMemory {
  public:
    // Plans, for `size` ranks.  n_grads: gradient buffers, see RunFold.
    TrainerMemory(const TrainerOptions& options, int n_micro, int n_grads, int size);
    void allocate(const Backend& k, Stream s);

    // Error(Exit::memory) when the plan does not fit into what is free, with the changes of micro_batch_size and
    // recompute that would, for `size` ranks.
    void require(const MemoryState& now, int size) const;

    Buf flat_moments() const { return moment_arena.flat(stat()); }
    // The rounded parameters that ops read; absent where ops read the masters.
    Buf flat_copy() const { return has_masters() ? flat_params() : Buf(); }
    // Gradient buffer 0, where RunFold leaves the sum of this rank's micro-batches.
    Buf gradient() const { return flat_gradient(0); }
    Buf flat_gradient(int buffer) const { return grad_arenas[size_t(buffer)].flat(stat()).slice(0, n_params()); }
    // The flat buffers to the end of the last row of `layout`, (layout->padded()).  Stages 1 and 2 of ZeRO have the first,
    // stage 1 has the second.
    Buf padded_params() const { return param_arena.flat(real()); }
    Buf padded_gradient() const { return grad_arenas.front().flat(stat()); }

    // ZeRO sums gradients beside the backward pass.  Stage 3 always does: a lane for its parameters is there anyway.
    bool sums_beside() const { return o_.parallel.overlap || o_.parallel.zero == 3; }
    std::optional<ShardLayout> layout;           // with parallel.zero
    std::optional<Windows> grad_windows;         // from stage 2 on; then grads[0] is in them
    std::optional<Windows> param_windows;        // in stage 3; then `params` is in them
    Arena shard_arena{"shard of the gradient"};  // with parallel.zero

    Arena moment_arena;
    std::vector<Arena> grad_arenas;  // (n_grads)
    std::vector<Tensors> grads;      // (n_grads) stat
    StepBatch batch, staging;        // of this step; of the next, on its way to the device
    Buf losses;                      // (n_micro * B) stat: sum over each sequence
    Buf clip, norm;                  // (1), (1) stat
    Buf norm_scratch;                // (grad_norm_scratch(n)) stat

  private:
    void plan_shards(int size);

    const TrainerOptions o_;
    Buf param_padding_, grad_padding_;  // behind the flat buffers, to the end of the last row
};
