// Compares kiln's all-reduces of host memory with MPI_Allreduce, in turn so that drift cancels, and times the shortest
// messages.  Prints a JSON object per size; times are medians of the slowest rank's.
//
//     mpirun.mpich -np 2 bench_all_reduce --mib 32 128 --repeats 15
#include <mpi.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "comm/all_reduce.h"
#include "common/clock.h"

namespace {
struct Way {
    std::string name;
    std::function<void(std::span<float>)> sum;
    std::vector<double> us = {};
};

double median(std::vector<double> v) {
    std::ranges::sort(v);
    return v[v.size() / 2];
}

// The time of the slowest rank, which all ranks wait for before they begin.
double time_us(Comm& world, const std::function<void()>& f) {
    world.barrier();
    const Stopwatch watch;
    f();
    const double mine = watch.ms() * 1e3;
    std::vector<double> all(size_t(world.size()));
    world.all_gather(&mine, all.data(), sizeof mine);
    return *std::ranges::max_element(all);
}

void report(Comm& world, const std::string& size, const std::vector<Way>& ways) {
    if (world.rank() != 0) return;
    fmt::print("{{\"ranks\": {}, {}", world.size(), size);
    for (const Way& w : ways) fmt::print(", \"{}_us\": {:.1f}", w.name, median(w.us));
    fmt::print("}}\n");
    std::fflush(stdout);
}

void sums(Comm& world, size_t n, int repeats) {
    const auto by = [&](AllReduce how) { return [&world, how](std::span<float> v) { all_reduce(world, v, how); }; };
    std::vector<Way> ways = {{"MPI_Allreduce",
                              [](std::span<float> v) {
                                  MPI_Allreduce(MPI_IN_PLACE, v.data(), int(v.size()), MPI_FLOAT, MPI_SUM,
                                                MPI_COMM_WORLD);
                              }},
                             {"mpi", by(AllReduce::mpi)},
                             {"ring", by(AllReduce::ring)}};
    if ((world.size() & (world.size() - 1)) == 0) ways.push_back({"ordered", by(AllReduce::ordered)});
    std::vector<float> v(n);
    for (int r = -1; r < repeats; r++)  // the first is not counted
        for (Way& w : ways) {
            std::ranges::fill(v, float(world.rank()));  // sums of sums would overflow
            const double us = time_us(world, [&] { w.sum(v); });
            if (r >= 0) w.us.push_back(us);
        }
    report(world, fmt::format("\"bytes\": {}", n * sizeof(float)), ways);
}

// Half of the time of a message there and back, between ranks 0 and 1.
void message(Comm& world, int repeats) {
    Way there{"message", nullptr};
    int x = 0;
    for (int r = 0; r < repeats; r++) {
        const double us = time_us(world, [&] {
            for (int i = 0; i < 100 && world.rank() < 2; i++) {
                if (world.rank() == 0) world.send(&x, sizeof x, 1);
                world.recv(&x, sizeof x, 1 - world.rank());
                if (world.rank() == 1) world.send(&x, sizeof x, 0);
            }
        });
        there.us.push_back(us / 200);
    }
    report(world, fmt::format("\"bytes\": {}", sizeof x), {there});
}
}  // namespace

int main(int argc, char** argv) {
    MpiSession mpi(&argc, &argv);
    std::vector<size_t> mib = {32, 128};
    int repeats = 15;
    CLI::App app("sums over the ranks: ring and ordered beside MPI_Allreduce");
    app.add_option("--mib", mib, "lengths")->capture_default_str();
    app.add_option("--repeats", repeats)->check(CLI::PositiveNumber)->capture_default_str();
    CLI11_PARSE(app, argc, argv);
    if (mpi.world().size() == 1) {
        fmt::print(stderr, "one rank sums nothing; start it with mpirun -np 2\n");
        return int(Exit::usage);
    }
    message(mpi.world(), 50 * repeats);
    for (const size_t n : {1, 256, 1 << 14}) sums(mpi.world(), n, 50 * repeats);
    for (const size_t m : mib) sums(mpi.world(), m << 18, repeats);
}
