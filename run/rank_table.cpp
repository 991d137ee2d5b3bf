#include "run/rank_table.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

Grid grid_of(const Config& config, int n_ranks) {
    const Grid grid = make_grid(n_ranks, config.parallel.tensor, config.parallel.pipeline);
    if (grid.tensor > 1) fail(Exit::usage, "parallel.tensor = {} is not available in this build; use 1", grid.tensor);
    if (grid.pipeline > 1)
        fail(Exit::usage, "parallel.pipeline = {} is not available in this build; use 1", grid.pipeline);
    return grid;
}

std::vector<std::string> rank_table(Comm& comm, const RunDevice& device, const Grid& grid) {
    struct Line {
        char host[64], device[96];
    };
    Line mine{};
    gethostname(mine.host, sizeof mine.host - 1);
    const std::string name = device.bus_id.empty() ? device.name : fmt::format("{} at {}", device.name, device.bus_id);
    std::memcpy(mine.device, name.data(), std::min(name.size(), sizeof mine.device - 1));
    std::vector<Line> all(size_t(comm.size()));  // (ranks)
    comm.all_gather(&mine, all.data(), sizeof mine);
    if (comm.rank() > 0) return {};
    size_t host_width = 4, device_width = 6;
    for (const Line& line : all) {
        host_width = std::max(host_width, std::strlen(line.host));
        device_width = std::max(device_width, std::strlen(line.device));
    }
    std::vector<std::string> out = {fmt::format("{} rank(s) = data {} x tensor {} x pipeline {}", comm.size(),
                                                grid.data, grid.tensor, grid.pipeline),
                                    fmt::format("{:>4}  {:<{}}  {:<{}}  {:>4}  {:>6}  {:>8}", "rank", "host",
                                                host_width, "device", device_width, "data", "tensor", "pipeline")};
    for (int rank = 0; rank < comm.size(); rank++) {
        const Line& line = all[size_t(rank)];
        const Grid::Place at = grid.place_of(rank);
        out.push_back(fmt::format("{:>4}  {:<{}}  {:<{}}  {:>4}  {:>6}  {:>8}", rank, line.host, host_width,
                                  line.device, device_width, at.data, at.tensor, at.pipeline));
    }
    return out;
}
