// The loss of a model on held-out sequences, shared out over ranks.
#pragma once
#include <cstdint>
#include <functional>
#include <span>

#include "comm/comm.h"
#include "model/session.h"

struct EvalResult {
    double loss = 0;      // mean over tokens, nats
    double accuracy = 0;  // share of tokens whose largest logit is the target
    uint64_t tokens = 0;
};
using ReadSequence = std::function<void(uint64_t index, std::span<int32_t> inputs, std::span<int32_t> targets)>;

// Mean loss over sequences [0, n) without dropout: batches of the session's B, dealt to ranks, summed in order, so that
// the bits depend on B but not on the number of ranks.  Every rank has the same parameters, and calls it.
EvalResult evaluate(Session& model, Comm& comm, uint64_t n_sequences, const ReadSequence& read);
