// From the gradient of each rank to the new parameters of all ranks: one interface, a file for each method.
//
// Trainer calls in every step, on every rank alike:
//
//     begin_step        on the host, before it gives the stream any work of the step
//     gradient_ready    when the stream has all work that writes a part of the flat gradient: that of a block's
//                       parameters (block_ranges() in trainer/flat_params.h).  Parts come in the order of the backward
//                       pass, last block first; together they are all elements, each once
//     finish_step       sum over ranks, norm and clip, update, and gather where the parameters are scattered
//     wait              on the host, after finish_step
//
// gradient_ready() and finish_step() give work to streams.  Trainer may record this work and replay it in later steps
// (trainer/step_graph.h): then it does not call them again, so they must do nothing else.  They may use a second stream
// between two marks.  With needs_host() Trainer calls finish_step() in every step, outside of the recording, and
// finish_step() may wait for the device and talk to other ranks.
//
// How the known methods implement the three calls:
//
//   replicated update (trainer/replicated_update.h)
//       gradient_ready joins parts to buckets, which a lane (comm/lane.h) sums.  finish_step waits for the lane; every
//       rank then updates every parameter.
//   ZeRO (trainer/sharded_update.h)
//       Each rank owns a shard of the flat buffers.  gradient_ready sums rows of the part into their owners.  finish_step
//       sums the squares of all shards for the norm, updates the shard, and gathers the parameters that the ops read.
//   parameter server (trainer/served_update.h, trainer/parameter_server.h)
//       gradient_ready does nothing.  finish_step, which needs the host, sends the gradient to the servers, receives the
//       new parameters and uploads them.  The servers have the optimizers; collect_state fetches their moments.
//       Asynchronous: shares() deals the work, begin_step receives the parameters, and finish_step only sends.
//   local SGD
//       (trainer/local_sgd.h) finish_step makes norm and update from the gradient of this rank alone, scaled by the
//       number of ranks.  In every H-th step it also exchanges parameters, and takes a step of an outer optimizer
//       (DiLoCo).  Its work differs between steps, so it needs the host; it gives `graphs` one piece for the norm and
//       one for the update.  state() also has the outer momentum, and every rank's replica and moments.
#pragma once
#include <functional>
#include <memory>

#include "comm/group.h"
#include "trainer/memory.h"
#include "trainer/optimizer.h"
#include "trainer/share_source.h"
#include "trainer/step_graph.h"

class GradientSync {
  public:
    struct Outcome {
        double norm = 0;      // of the gradient of the global batch, before clipping
        bool updated = true;  // false: the norm is not finite; parameters and state are as before
    };

    virtual ~GradientSync() = default;
    virtual const char* name() const = 0;  // for the log: "ordered through host memory"
    // The factor of the gradient that a rank computes.  1: a part of the mean over the global batch, to be summed.
    virtual float gradient_scale() const { return 1; }

    // Once, before the first step, when memory is placed and zero: writes constants and connects the ranks.
    virtual void start(Stream s) = 0;
    // Device memory that a library took for the connections, beyond the plan.
    virtual size_t connection_bytes() const { return 0; }

    // `step` counts all global batches before, as in Trainer::step.
    virtual void begin_step(int64_t step, double learning_rate) = 0;
    // True: gradient_ready() is called in every micro-batch, whose gradients the passes write, never add to.  False: the
    // passes sum micro-batches, and it is called in the last one.
    virtual bool sums_each_micro_batch() const { return false; }
    // Before each backward pass that gradient_ready() is called in.
    virtual void begin_backward(Stream) {}
    virtual void gradient_ready(Range part, Stream s) = 0;
    // Gives `graphs` the pieces of its work that can be recorded, whether or not Trainer records the whole step.
    virtual void finish_step(StepGraphs& graphs, Stream s) = 0;
    // finish_step() waits for the device, or its work differs between steps.
    virtual bool needs_host() const = 0;
    // The host waits until the stream is done.  A lost rank is an Error, not a hang.
    virtual Outcome wait(Stream s) = 0;
    // Of the last step's passes: the host waited so long for messages.  The waits of a device are not seen.
    virtual double waited_ms() const { return 0; }
    // Points in the stream, between which the phases of the last step are timed.
    virtual const Mark* summed() const = 0;
    virtual const Mark* updated() const = 0;
    // When the parameters that ops read are there; absent where updated() says so.
    virtual const Mark* gathered() const { return nullptr; }

    // What a checkpoint keeps, as whole tensors that rank 0 reads and writes: the parameters, the tensors beside them,
    // and the number of updates that were not skipped.  With is_scattered() no rank has all of them: rank 0's tensors are
    // in host memory, and good between collect_state(), or the first call of parameters() or state(), and the next step.
    virtual std::vector<StateTensor> parameters() = 0;
    virtual std::vector<StateTensor> state() = 0;
    virtual bool is_scattered() const { return false; }
    // On rank 0, before state() is read from a checkpoint that has tensors of these names: state() then has those that
    // the method takes.  Returns why the run goes on, but not bit for bit; empty: it does.
    virtual std::string accept(const std::vector<std::string>&) { return {}; }
    virtual uint64_t updates() const = 0;
    virtual void set_updates(uint64_t n) = 0;
    // All ranks call these.  collect_state: rank 0's tensors get what all ranks keep.  distribute_state: rank 0's
    // parameters, state and updates, such as a checkpoint's, go to all ranks that keep a part of them; then all compare
    // hashes of what they hold in common: a difference is Error(Exit::internal) naming ranks.
    virtual void collect_state(Stream) {}
    virtual void distribute_state(Stream s) = 0;
    // Of the masters, padding included; all ranks call it where the method is_scattered(), and only rank 0 learns it.
    virtual uint64_t weights_hash(Stream s) = 0;
    // Between these two calls the parameters in memory are those that a checkpoint keeps, to be evaluated.
    virtual void enter_evaluation(Stream) {}
    virtual void leave_evaluation(Stream) {}

    // A method whose ranks do not step together says what each of them computes; else null.
    virtual ShareSource* shares() { return nullptr; }
    // Rank 0, after the last step, where ranks serve others: their counts, then their end, with the run's exit code, when
    // no rank needs them any more.
    virtual std::vector<ServerReport> server_reports() { return {}; }
    virtual void close(Exit) {}
};

// Makes a method, which plans its memory in `memory`: not allocated yet; it outlives the method.
using MakeGradientSync = std::function<std::unique_ptr<GradientSync>(const Group& group, const TrainerOptions& options,
                                                                     TrainerMemory& memory)>;
// The method that options.parallel names (trainer/methods.cpp).
std::unique_ptr<GradientSync> make_gradient_sync(const Group& group, const TrainerOptions& options,
                                                 TrainerMemory& memory);
