// Rank 0's numbers to all ranks.
#pragma once
#include "comm/comm.h"
#include "model/memory.h"

// `data` in the backend's memory becomes rank 0's on every rank, through host memory.  The host waits for the stream.
void broadcast_from_root(const Backend& k, Comm& comm, Buf data, Stream s);

// The same for a model's parameters.  Ranks then compare hashes: a difference is Error(Exit::internal) naming ranks.
void broadcast_parameters(const Backend& k, Comm& comm, ModelMemory& model, Stream s);
