// Tests that run under mpirun -np 1..5.  Every rank runs every check; a failure on any rank fails the job.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/hash.h"
#include "test/mpi/world.h"

namespace {
Comm* the_world = nullptr;
}

Comm& world() { return *the_world; }

bool same_everywhere(const void* data, size_t n_bytes) {
    const uint64_t h = hash64(data, n_bytes);
    std::vector<uint64_t> all(size_t(world().size()));
    world().all_gather(&h, all.data(), sizeof h);
    return std::all_of(all.begin(), all.end(), [h](uint64_t a) { return a == h; });
}

int main(int argc, char** argv) {
    MpiSession mpi(&argc, &argv);
    the_world = &mpi.world();
    doctest::Context context(argc, argv);
    context.setOption("minimal", world().rank() != 0);
    if (world().rank() != 0) context.setOption("duration", false);  // lines of several ranks would mix
    const int failed = context.run();
    std::vector<int> all(static_cast<size_t>(world().size()));
    world().all_gather(&failed, all.data(), sizeof failed);
    return mpi.end(std::accumulate(all.begin(), all.end(), 0) != 0);
}
