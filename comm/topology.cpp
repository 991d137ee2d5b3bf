#include "comm/topology.h"

#include <algorithm>
#include <cstdint>

#include "common/error.h"

Runs split_runs(int n_micro_total) {
    Runs r{n_micro_total, 0};
    while (r.q % 2 == 0) r.q /= 2, r.k++;
    return r;
}

BatchShare batch_share(int global_batch_size, int micro_batch_size, int rank, int size, bool ordered) {
    const int64_t pass = int64_t(size) * micro_batch_size;  // sequences of one forward pass on all ranks
    if (global_batch_size % pass != 0)
        fail(Exit::usage,
             "train.global_batch_size = {} is not divisible by ranks * train.micro_batch_size = {} * {} = {}; change "
             "one of "
             "them or the number of ranks",
             global_batch_size, size, micro_batch_size, pass);
    const int total = global_batch_size / micro_batch_size, mine = total / size;
    const Runs runs = split_runs(total);
    if (!ordered) return {mine, rank * mine, mine, 1};
    if ((1 << runs.k) % size != 0) {
        std::string sizes;
        for (int s = 1; s <= (1 << runs.k); s *= 2) sizes += (s > 1 ? ", " : "") + std::to_string(s);
        fail(
            Exit::usage,
            "parallel.allreduce: ordered cannot run on {} ranks: global_batch_size / micro_batch_size = {} = 2^{} * {} "
            "micro-batches, so it works on {} ranks; use one of these or allreduce: mpi",
            size, total, runs.k, runs.q, sizes);
    }
    return {mine, rank * mine, runs.q, (1 << runs.k) / size};
}

int core_share(int n_cores, int place, int sharing) {
    const int extra = place < n_cores % sharing ? 1 : 0;
    return std::max(1, n_cores / sharing + extra);
}
