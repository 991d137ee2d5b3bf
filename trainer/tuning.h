// Choices made by timing (Backend::choices): where they are made, and how all ranks come to use the same ones.
#pragma once
#include <functional>
#include <string>

#include "comm/comm.h"
#include "common/log.h"
#include "model/architecture.h"

// The work of a step and of an evaluation, with the backend tuning, so that every kind of matrix product is met.  The
// batch of `training` is overwritten with random tokens, and its gradients and activations are left as noise.
// `accumulates`: a step also has backward passes that add to a gradient.  Rank-local; call it between steps.  Returns
// the backend's notes.
std::string tune_on_random_tokens(const Pass& training, bool accumulates);

// On rank 0 the choices of a checkpoint (`saved`, "" for none) win, then those of the per-user cache; tune() makes the
// rest, whose results are added to the cache.  All ranks use what rank 0 has then, and it is returned on all: "" where
// the backend makes no choices, and nothing was done.  tune() returns the backend's notes.
std::string agree_on_choices(const Backend& k, Comm& comm, Log& log, const std::string& saved,
                             const std::function<std::string()>& tune);
