// Rank 0's numbers to all ranks.
#pragma once
#include "comm/comm.h"
#include "kernels/ops.h"

// `data` in the backend's memory becomes rank 0's on every rank, through host memory.  The host waits for the stream.
void broadcast_from_root(const Backend& k, Comm& comm, Buf data, Stream s);
