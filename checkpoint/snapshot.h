// The state of a run in host memory, taken between two steps.  A checkpoint is written from a snapshot, without the
// device and without the trainer.
#pragma once
#include <optional>
#include <vector>

#include "kernels/owners.h"
#include "model/state.h"

class Snapshot {
  public:
    // `view`: no copy, for a backend whose memory is the host's; nobody changes the tensors while a checkpoint is
    // written.  `copy`: pinned host memory for all data, reserved now; 12 bytes per parameter for weights and AdamW's
    // moments together.
    enum class Kind { view, copy };
    // The tensors stay where they are as long as the snapshot.  Error(Exit::memory) where the host has not enough.
    Snapshot(const Backend& k, const std::vector<StateTensor>& state, Kind kind);
    // Copies the data after all work given to `s`, and waits for the copy.  A view only waits.
    void take(Stream s);
    // The tensors, with their data in host memory.
    const std::vector<StateTensor>& tensors() const { return tensors_; }

  private:
    const Backend& k_;
    const std::vector<StateTensor> state_;
    std::optional<HostBuffer> memory_;  // of a copy
    std::vector<StateTensor> tensors_;
};
// The kind for checkpoints that are written before the next step: the host reads its own memory, or a copy.
inline Snapshot::Kind snapshot_kind(const Backend& k) {
    return k.host_addressable ? Snapshot::Kind::view : Snapshot::Kind::copy;
}
