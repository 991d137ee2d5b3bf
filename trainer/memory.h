// All that a Trainer keeps in its backend's memory.
#pragma once
#include <vector>

#include "comm/topology.h"
#include "model/memory.h"
#include "trainer/options.h"

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
    // Plans.  n_grads: gradient buffers, see RunFold.
    TrainerMemory(const TrainerOptions& options, int n_micro, int n_grads);

    // Error(Exit::memory) when the plan does not fit into what is free, with the changes of micro_batch_size and
    // recompute that would, for `size` ranks.
    void require(const MemoryState& now, int size) const;

    Buf flat_moments() const { return moment_arena.flat(stat()); }
    // The rounded parameters that ops read; absent where ops read the masters.
    Buf flat_copy() const { return has_masters() ? param_arena.flat(real()) : Buf(); }
    // Gradient buffer 0, where RunFold leaves the sum of this rank's micro-batches.
    Buf gradient() const { return flat_gradient(0); }
    Buf flat_gradient(int buffer) const { return grad_arenas[size_t(buffer)].flat(stat()); }

    Arena moment_arena;
    std::vector<Arena> grad_arenas;  // (n_grads)
    std::vector<Tensors> grads;      // (n_grads) stat
    StepBatch batch, staging;        // of this step; of the next, on its way to the device
    Buf losses;                      // (n_micro * B) stat: sum over each sequence
    Buf clip, norm;                  // (1), (1) stat
    Buf norm_scratch;                // (grad_norm_scratch(n)) stat

  private:
    const TrainerOptions o_;
};
