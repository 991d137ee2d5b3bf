// The state of a run in host memory, taken between two steps: a checkpoint is written from it, while the device may do
// something else and without the trainer.  It takes as much pinned host memory as the tensors have bytes: 12 per
// parameter for weights and AdamW's moments.
#pragma once
#include <vector>

#include "kernels/owners.h"
#include "model/state.h"

class Snapshot {
  public:
    // Copies the tensors' data, and waits for it.  Error(Exit::memory) where the host has not enough.
    Snapshot(const Backend& k, const std::vector<StateTensor>& state);
    // As they were, with the data in host memory.
    const std::vector<StateTensor>& tensors() const { return tensors_; }

  private:
    HostBuffer memory_;
    std::vector<StateTensor> tensors_;
};
