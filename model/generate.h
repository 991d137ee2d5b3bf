// Sampling text from a model.
#pragma once
#include <functional>
#include <span>
#include <vector>

#include "model/session.h"

struct SampleOptions {
    int max_tokens = 256;
    double temperature = 0.8;  // 0: always the most likely token
    int top_k = 0;             // keep the k most likely tokens; 0: all
    double top_p = 1;          // keep the smallest set with at least this probability
    uint64_t seed = 0;
    int32_t stop_token = -1;  // end after this token; -1: never
};

// One token from logits (V).  A pure function of (logits, options, position): Philox key = seed, counter = position.
int32_t sample_token(std::span<const float> logits, const SampleOptions& options, uint64_t position);

// Continues `prompt` (at least one token); each new token goes to on_token as it is drawn.  The model sees at most its
// last context_length tokens.
std::vector<int32_t> generate(Session& model, std::vector<int32_t> prompt, const SampleOptions& options,
                              const std::function<void(int32_t)>& on_token);
