// How every rank comes to use the same choices made by timing (Backend::choices).
#pragma once
#include <functional>
#include <string>

#include "comm/comm.h"
#include "common/log.h"
#include "kernels/ops.h"

// On rank 0 the choices of a checkpoint (`saved`, "" for none) win, then those of the per-user cache; tune() makes the
// rest, whose results are added to the cache.  All ranks use what rank 0 has then, and it is returned on all: "" where
// the backend makes no choices, and nothing was done.  tune() returns the backend's notes.
std::string agree_on_choices(const Backend& k, Comm& comm, Log& log, const std::string& saved,
                             const std::function<std::string()>& tune);
