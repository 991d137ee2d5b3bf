// The grid of a run's ranks: world = data x tensor x pipeline.  Pure arithmetic.
//
// Ranks of one tensor group follow each other, so that they share a host where its ranks do: their messages are the most
// frequent.  Then come the data groups; the stages of a pipeline lie furthest apart.
#pragma once
#include <string>

struct Grid {
    int data = 1, tensor = 1, pipeline = 1;
    int size() const { return data * tensor * pipeline; }

    struct Place {  // coordinates of a rank
        int data = 0, tensor = 0, pipeline = 0;
        bool operator==(const Place&) const = default;
    };
    Place place_of(int rank) const {
        return {.data = rank / tensor % data, .tensor = rank % tensor, .pipeline = rank / (tensor * data)};
    }
    int rank_at(Place p) const { return (p.pipeline * data + p.data) * tensor + p.tensor; }
};

// All ranks that tensor and pipeline leave go to the data axis.  Error(Exit::usage), with the arithmetic, where n_ranks
// is no multiple of tensor * pipeline.
Grid make_grid(int n_ranks, int tensor, int pipeline);
