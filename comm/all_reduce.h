// Sums of f32 vectors in host memory over the ranks of a communicator, in place.
#pragma once
#include <span>

#include "comm/comm.h"

// Algorithms of an all-reduce; the words of parallel.allreduce.
enum class AllReduce { ordered, nccl, mpi, ring };
const char* all_reduce_name(AllReduce how);

// Numbers as messages carry them.  bf16 is half the bytes, for ordered and ring: each is rounded to nearest even when it
// is sent, sums are in fp32, and the result is rounded once.
enum class Payload { fp32, bf16 };

// All ranks end with the same sum, bit for bit.
//   ordered  all-to-all of shards, each summed by the balanced binary tree over rank numbers (TreeSum in
//            kernels/ops.h), all-gather.  With buffers that are sums of a power-of-two number of runs, the bits are
//            those of one rank.  The number of ranks must be a power of two.
//   nccl     is for device memory: Error(Exit::internal); see comm/gradient_all_reduce.h
//   mpi      MPI_Allreduce
//   ring     reduce-scatter and all-gather around the ring 0 -> 1 -> ... -> 0 by send_recv; any size, any length
//
// With Payload::bf16 `ordered` is the same tree over rounded addends, also a rank's own: its error is at most
// 2^-8 (2 + 2^-8) of the sum of magnitudes, and fp32's.  `ring` rounds a partial sum at every rank: at most
// size * 2^-8 (1 + 2^-8)^size.  One rank sends nothing and rounds nothing.
void all_reduce(Comm& comm, std::span<float> data, AllReduce how, Payload payload = Payload::fp32);

// all_reduce() over `size` ranks works through a buffer in pieces of this many elements: one call per piece gives the
// same bits as one call for the whole buffer.
size_t all_reduce_piece(int size);
