// Each rank's share of the batch and of the cores: pure functions of (rank, size, shape of the batch).
//
// The global batch of G sequences is M = G / micro_batch_size micro-batches, numbered by their place.  M = 2^k q with q
// odd: 2^k runs of q consecutive micro-batches.  A rank owns consecutive micro-batches; with the ordered reduction also
// whole runs, so that M alone fixes the order of every sum, and not the number of ranks.
#pragma once

struct BatchShare {
    int n_micro;      // micro-batches of this rank
    int first_micro;  // place of the first in the global batch, counted in micro-batches
    int run_length;   // q: consecutive micro-batches that are summed in place
    int n_runs;       // runs of this rank (n_micro / run_length); a power of two
};

// Largest odd divisor, and the power of two that is left: M = 2^k q.
struct Runs {
    int q, k;
};
Runs split_runs(int n_micro_total);

// The part of the global batch that `rank` of `size` processes.  Throws Error(Exit::usage) when global is not divisible
// by size * micro, or when `ordered` and size does not divide 2^k: the message shows the arithmetic and sizes that
// work. Not ordered: one run of all the rank's micro-batches.
BatchShare batch_share(int global_batch_size, int micro_batch_size, int rank, int size, bool ordered);

// Cores for the rank at `place` of `sharing` ranks that share n_cores: an even share, at least one.
int core_share(int n_cores, int place, int sharing);
