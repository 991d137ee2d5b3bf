// Sums of one flat f32 gradient buffer over all ranks, in place, one call per step.
#pragma once
#include <span>
#include <vector>

#include "comm/comm.h"
#include "common/buf.h"

enum class Reduction { ordered, nccl, mpi, ring };
const char* reduction_name(Reduction r);

// All ranks end with the same sum, bit for bit.
//   ordered  all-to-all of shards, each summed by the balanced binary tree over rank numbers, all-gather.  With
//            buffers that are sums of a power-of-two number of runs, the bits are those of one rank.  size must be a
//            power of two.
//   nccl     not for host memory: see comm/reducer.h
//   mpi      MPI_Allreduce
//   ring     reduce-scatter and all-gather around the ring 0 -> 1 -> ... -> 0 by send_recv; any size, any length
void all_reduce(Comm& comm, std::span<float> data, Reduction how);

// all_reduce() over `size` ranks works through a buffer in pieces of this many elements: one call per piece gives the
// same bits as one call for the whole buffer.
size_t reduction_piece(int size);
