// A rank that serves: it owns a shard of the parameters, with the optimizer's moments, in its backend's memory.
//
//   synchronous    A step is a round: every worker's gradient goes to a slot of its own.  When all are there, the slots
//                  are summed by the tree of AllReduce::ordered, filled up with zeros to a power of two; the servers
//                  exchange the sums of squares of their chunks, so that all have the norm and clip factor of the whole
//                  gradient; each updates its shard and sends it to all workers.  The bits are those of one rank.
//   asynchronous   A complete push is applied at once, with the clip factor that the worker sends along, at a rate for
//                  one share of a step.  The first server also deals the shares.  A worker that holds a share and is not
//                  heard of for timeout_s is lost: its share is dealt again, and the run goes on.  When it comes back, it
//                  is dealt shares again.
#pragma once
#include <chrono>
#include <functional>
#include <optional>
#include <vector>

#include "comm/group.h"
#include "trainer/optimizer.h"
#include "trainer/options.h"
#include "trainer/server_books.h"
#include "trainer/server_link.h"

class ParameterServer {
  public:
    // `servers`: those of options.link, in its order.
    ParameterServer(const Group& servers, const TrainerOptions& options);
    // Until rank 0 ends the run, whose exit code is returned.  progress(step) after each update, for a failure's report.
    Exit serve(const std::function<void(int64_t step)>& progress = {});
    // On the first server, after serve(): a worker was lost, and will not come to the end of the program.
    bool has_lost() const;

  private:
    using Kind = ServerMessage::Kind;
    using Clock = std::chrono::steady_clock;
    struct Worker {
        size_t n_received = 0;  // numbers of the push that is coming in
        Clock::time_point heard;
        std::optional<Clock::time_point> asked;  // for a share, and still waits
        bool lost = false;
        bool left = false;  // knows that the run is over
    };

    void take(const ServerLink::Incoming& in);
    void take_push(const ServerLink::Incoming& in);
    void update_by_all(const ServerMessage& push);
    void update_by_one(int worker, const ServerMessage& push);
    float norm_of_all();
    void update(Buf gradient, float norm, double learning_rate);
    void send_moments(int to);
    void send_to_all(ServerMessage m);
    void deal();
    void look_for_lost();
    [[noreturn]] void fail_lost(int worker, const char* why) const;
    bool is_over() const;
    bool deals() const { return !synchronous_ && group_.rank() == 0; }
    ServerReport report() const;
    void answer(int to, Kind kind);
    Buf slot(int worker) const { return slots_.slice(size_t(worker) * shard_.count, shard_.count); }
    Buf moments() const { return moment_arena_.flat(DType::f32); }

    const Backend& k_;
    const Group& group_;
    const TrainerOptions o_;
    const bool synchronous_;
    ServerLink link_;
    const size_t n_params_;
    const Range shard_;
    const int n_slots_;
    const StreamOwner stream_owner_;
    const Stream stream_;
    Arena master_arena_, moment_arena_, slot_arena_, scalar_arena_;
    Buf masters_;      // (n)
    Buf slots_;        // (n_slots, n) gradients of the workers; those behind the last worker are zeros
    Buf norm_, clip_;  // (1), (1)
    Buf my_sums_;      // (chunks of the shard) sums of squares
    Buf all_sums_;     // (chunks of all shards)
    Optimizer optimizer_;
    std::vector<Worker> workers_;
    std::optional<Clock::time_point> round_began_;  // synchronous: its first push came
    PushLog log_;
    ShareDealer dealer_;
    uint64_t n_skipped_ = 0;
    std::function<void(int64_t)> progress_;
    std::optional<Exit> closed_;
};
