// Lane: messages of a group of ranks beside the computation, in the order in which they are given.
//
//   memory that the host addresses    a thread, with messages of its own (Comm::split)
//   from device to device             a second stream, also in a recording (Backend::begin_graph)
//   through host memory               nothing runs beside the computation
//
// All ranks give their lanes the same work in the same order.
#pragma once
#include <functional>
#include <memory>

#include "comm/group.h"

class Lane {
  public:
    using Work = std::function<void(Stream)>;
    virtual ~Lane() = default;
    // The group whose messages the work uses; nobody else uses these between give() and join().
    virtual const Group& group() const = 0;
    // At the start of each step, on the host.  A step that calls give() forgets the work of the step before; a step that
    // does not, because Trainer replays it, repeats that work.
    virtual void begin_step() {}
    // The work begins when `compute` has done all that it was given so far.
    virtual void give(Work work, Stream compute) = 0;
    // All that `compute` is given from now on begins when the work is done.  Throws what the work has thrown.
    virtual void join(Stream compute) = 0;
    // The host takes part in join(), so that a graph cannot record it.
    virtual bool needs_host() const = 0;
};

// Where nothing runs beside the computation, the computing stream gets the work when it is given to the lane, or in
// join().
enum class Otherwise { at_give, at_join };
// `beside`: false: as through host memory.  `group` outlives the lane.
std::unique_ptr<Lane> make_lane(const Group& group, bool beside, Otherwise otherwise);
