// The memory of a model in a backend: planned first, so that it can be printed, held against what is free and refused
// before anything is taken; then one allocation.  A trainer adds its gradients and optimizer to the plan.
#pragma once
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "kernels/owners.h"
#include "model/architecture.h"
#include "model/state.h"

// An arena that holds a number per parameter.  A tensor begins at the same element in each, whatever its dtype, and no
// block of kDecayBlock elements straddles two tensors.
Arena make_param_arena(const char* name, DType t);
// A tensor of `t` for each line of a list.
void plan(Arena& arena, Tensors& tensors, const std::vector<ParamInfo>& list, DType t);

// Flat buffers that a ModelMemory has of all parameters.  A part of one is planned by the class that needs it.
struct WholeBuffers {
    bool params = true, masters = true;
};

class ModelMemory {
  public:
    // Plans parameters and activations.  `shape` has the batch, and the dtype of what ops read.
    ModelMemory(const ModelConfig& config, const ActivationShape& shape, WholeBuffers whole = {});
    ModelMemory(const ModelMemory&) = delete;
    ModelMemory& operator=(const ModelMemory&) = delete;

    // Error(Exit::memory) when the plan does not fit into what is free.  The message has what_fits(bytes that the plan
    // may have): changes that would fit, or "".
    void require(const MemoryState& now, const std::function<std::string(size_t n_bytes)>& what_fits) const;
    // Takes the memory, zeroed.  Clearing is asynchronous: synchronize `s` before another stream uses this memory.
    void allocate(const Backend& k, Stream s);

    size_t n_bytes() const;
    std::string table() const;    // a line for each kind of tensor
    std::string summary() const;  // "parameters 237 MiB, gradients 475 MiB, ..."

    size_t n_params() const { return n_params_; }  // padding included
    bool has_masters() const { return master_arena.n_bytes() > 0; }
    DType real() const { return act_shape.real; }
    DType stat() const { return real() == DType::f64 ? DType::f64 : DType::f32; }
    // f32 also where ops read bf16.  After writing to them: round_masters().
    Buf flat_masters() const { return has_masters() ? master_arena.flat(DType::f32) : flat_params(); }
    // The parameters that ops read; not where only some blocks are there at a time.
    Buf flat_params() const { return param_arena.flat(real()).slice(0, n_params_); }
    const Tensors& master_tensors() const { return has_masters() ? masters : params; }
    std::vector<StateTensor> parameters() const;  // the masters, as a checkpoint keeps them
    void round_masters(const Backend& k, Stream s);
    uint64_t weights_hash(const Backend& k, Stream s);  // of the masters

    // The forward pass; block by block with before_block().
    void forward(const Pass& pass) const;
    // Where only some blocks are there at a time: brings the parameters of `block` and begins to bring those of `next`,
    // -1 or config.L for none.  Called before each pass of a block.
    std::function<void(int block, int next, Stream s)> before_block;

    const ModelConfig config;
    const ActivationShape act_shape;
    const std::vector<ParamInfo> param_list;
    Arena param_arena, master_arena, act_arena{"activations"}, scalar_arena{"scalars and scratch"};
    Tensors params;     // real: what ops read
    Tensors masters;    // f32; absent where `params` are the masters
    Tensors acts;       // of act_shape; among them:
    Buf logits;         // (BT, Vp) real
    Buf loss, correct;  // (BT) stat, i32
    Buf hash;           // (2) u32

  protected:
    // In the order of table() and of the allocation: parameters first; a derived class adds the others.
    std::vector<Arena*> arenas_;

  private:
    size_t n_params_;
    std::optional<DeviceBuffer> memory_;
};

// "train.micro_batch_size: 8, or 16 with train.recompute: gelu": the largest micro-batches up to B whose plan fits into
// n_bytes, at `level` and at the levels that keep less; "" for none.  planned(B, level): a plan's size; 0: impossible.
std::string what_fits(int B, Recompute level, size_t n_bytes, const std::function<size_t(int B, Recompute)>& planned);

// Numbers in host memory - f32, f64 or bf16 - as doubles.
std::vector<double> as_doubles(const Buf& host);
