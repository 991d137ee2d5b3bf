// The ranks of a run: their places in the grid, and a table of them for the log.
#pragma once
#include <string>
#include <vector>

#include "comm/grid.h"
#include "run/device.h"

// The grid of n_ranks that train.  Error(Exit::usage) where the product is impossible, or an axis is not in this build.
Grid grid_of(const Config& config, int n_ranks);
// All ranks of `comm` call it; on rank 0 the lines: a title, then rank, host, device and coordinates of each.
std::vector<std::string> rank_table(Comm& comm, const RunDevice& device, const Grid& grid);
