#include "comm/grid.h"

#include "common/error.h"

Grid make_grid(int n_ranks, int tensor, int pipeline) {
    const int model = tensor * pipeline;  // ranks that share one copy of the model
    if (n_ranks % model == 0) return {.data = n_ranks / model, .tensor = tensor, .pipeline = pipeline};
    const int below = n_ranks / model * model;
    fail(
        Exit::usage,
        "{} ranks = data x {} x {} has no solution: parallel.tensor * parallel.pipeline = {} * {} = {} does not divide "
        "{}; use {}{} ranks, or change one of the two keys",
        n_ranks, tensor, pipeline, tensor, pipeline, model, n_ranks, below > 0 ? fmt::format("{} or ", below) : "",
        below + model);
}
