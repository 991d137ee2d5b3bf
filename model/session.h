// A model that only runs forward: what evaluation and text generation need of it.  No gradients, no optimizer.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "model/memory.h"

class Session {
  public:
    // A model of its own, with parameters zero and memory for batches of shape.B x shape.T.  `shape.recompute` is that
    // of the training whose bits are wanted; nothing is kept for a backward pass.  Throws Error(Exit::usage) for sizes
    // that cannot be run, and Error(Exit::memory), with what would fit, where memory is short.
    Session(const Backend& k, const ModelConfig& config, const ActivationShape& shape);
    // A view of another's model, and of its memory for one batch.  All of it outlives the session, and is used in `s`.
    Session(const Backend& k, ModelMemory& memory, Buf inputs, Buf targets, Buf losses, Stream s);
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    ~Session();

    const ModelConfig& config() const { return memory_->config; }
    const ActivationShape& shape() const { return memory_->act_shape; }

    // Every pass gathers parameters from all ranks, so that all must make the same number of passes.
    bool needs_all_ranks() const { return bool(memory_->before_block); }
    // Logits of the token after `tokens` (at most shape().T of them), (V).
    std::vector<float> next_logits(std::span<const int32_t> tokens);
    // Each sequence of a batch of inputs and targets, (B, T) each, without dropout.
    struct Score {
        double loss = 0, correct = 0;  // sums over its tokens: nats, and tokens whose largest logit is the target
    };
    std::vector<Score> score(std::span<const int32_t> inputs, std::span<const int32_t> targets);

    // The parameters, for reading and writing; after writing call parameters_changed().
    ModelMemory& memory() { return *memory_; }
    void parameters_changed() { memory_->round_masters(k_, stream_); }
    Stream stream() const { return stream_; }

  private:
    struct Own;

    const Backend& k_;
    std::unique_ptr<Own> own_;  // absent for a view
    ModelMemory* memory_;
    Buf inputs_, targets_;  // (B, T) i32
    Buf losses_;            // (B) stat
    Stream stream_;
};
