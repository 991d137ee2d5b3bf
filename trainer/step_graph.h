// The work of a step, replayed from graphs where the backend can record it (kernels/ops.h, begin_graph).
#pragma once
#include <functional>
#include <optional>
#include <string>

#include "comm/comm.h"
#include "kernels/owners.h"
#include "trainer/options.h"

class StepGraphs {
  public:
    // A stretch of a step that gives a stream the same work in every step and needs nothing from the host meanwhile.
    struct Piece {
        bool has_run = false;
        std::optional<GraphOwner> graph;
        Traffic traffic;  // of each launch
    };

    // `n_launches` of a whole step decide whether UseGraph::automatic records.  `between_devices`: the work holds
    // messages between devices, so that all ranks must record or none.
    // Messages that a graph replays are added to `counter`.
    StepGraphs(const Backend& k, UseGraph use, int64_t n_launches, bool between_devices,
               std::shared_ptr<TrafficCounter> counter = std::make_shared<TrafficCounter>());

    // Gives `work` to the stream: the first time as it is, because a first use may make what cannot be made in a
    // recording; the second time it is recorded, and launched from then on.  A piece inside the work of another one is
    // part of that.
    void run(Piece& piece, Stream s, const std::function<void()>& work);

    bool used() const { return used_; }
    // The reason why steps are not replayed where the backend could; empty: they are, or the backend cannot.
    const std::string& note() const { return note_; }

  private:
    const Backend& k_;
    const UseGraph use_;
    const bool between_devices_;
    const std::shared_ptr<TrafficCounter> counter_;
    bool used_ = false, inside_ = false;
    std::string note_;
};
