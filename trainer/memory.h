// All that a Trainer keeps in its backend's memory: planned first, so that it can be printed, held against what is free
// and refused before anything is taken; then one allocation.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "comm/topology.h"
#include "kernels/owners.h"
#include "trainer/options.h"

// The micro-batches of one step on this rank, laid out alike on the host and on the device: one copy moves all.
struct StepBatch {
    Arena arena;
    Buf inputs, targets;  // (n_micro, B, T) i32
    Buf order;            // (n_micro, B*T)  i32: see EmbeddingGrad
    Buf where;            // (n_micro, 2)    u32: see DropoutMask
    StepBatch(const char* name, int n_micro, size_t BT);
};

class TrainerMemory {
  public:
    // Plans.  n_grads: gradient buffers, see RunFold.
    TrainerMemory(const TrainerOptions& options, int n_micro, int n_grads);
    TrainerMemory(const TrainerMemory&) = delete;
    TrainerMemory& operator=(const TrainerMemory&) = delete;

    // Error(Exit::memory) when the plan does not fit into what is free, with the changes of micro_batch_size and
    // recompute that would, for `size` ranks.
    void require(const MemoryState& now, int size) const;
    // Takes the memory, zeroed.  The stream that is given to must be waited for before others use it.
    void allocate(const Backend& k, Stream s);

    size_t n_bytes() const;
    std::string table() const;    // a line for each kind of tensor
    std::string summary() const;  // "parameters 237 MiB, gradients 475 MiB, ..."
    Buf flat_masters() const { return has_masters() ? master_arena.flat(DType::f32) : param_arena.flat(o_.real); }
    Buf flat_moments() const { return moment_arena.flat(stat()); }
    // What ops read where that is a rounded copy of the masters; else absent.
    Buf flat_copy() const { return has_masters() ? param_arena.flat(o_.real) : Buf(); }
    // The sum of all micro-batches, where the runs' sums end that were folded.
    Buf gradient() const { return flat_gradient(0); }
    Buf flat_gradient(int buffer) const { return grad_arenas[size_t(buffer)].flat(stat()); }
    size_t n_params() const { return param_arena.n_bytes() / dtype_bytes(o_.real); }  // padding included
    bool has_masters() const { return o_.real == DType::bf16; }
    DType stat() const { return o_.real == DType::f64 ? DType::f64 : DType::f32; }

    Arena param_arena, master_arena, moment_arena, act_arena{"activations"}, scalar_arena{"scalars and scratch"};
    std::vector<Arena> grad_arenas;  // (n_grads)
    const std::vector<ParamInfo> param_list;
    Tensors params;              // real: what the ops read
    Tensors masters;             // f32; absent where `params` are the masters
    std::vector<Tensors> grads;  // (n_grads) stat
    const ActivationShape act_shape;
    Tensors acts;              // of act_shape; among them:
    Buf logits;                // (BT, Vp) real
    Buf loss, correct;         // (BT) stat, i32
    StepBatch batch, staging;  // of this step; of the next, on its way to the device
    Buf losses;                // (n_micro * B) stat: sum over each sequence
    Buf clip, norm;            // (1), (1) stat
    Buf norm_scratch;          // (grad_norm_scratch(n)) stat
    Buf hash;                  // (2) u32

  private:
    std::vector<Arena*> arenas();
    std::vector<const Arena*> arenas() const;

    const TrainerOptions o_;
    std::optional<DeviceBuffer> memory_;
};

// Numbers in host memory - f32, f64 or bf16 - as doubles.
std::vector<double> as_doubles(const Buf& host);
