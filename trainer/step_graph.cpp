#include "trainer/step_graph.h"

#include <utility>

namespace {
constexpr int64_t kMostLaunches = 1 << 16;  // a step of more is long enough to hide what its launches cost

class Set {  // holds a flag up for a scope
  public:
    explicit Set(bool& flag) : flag_(flag) { flag_ = true; }
    Set(const Set&) = delete;
    Set& operator=(const Set&) = delete;
    ~Set() { flag_ = false; }

  private:
    bool& flag_;
};
}  // namespace

StepGraphs::StepGraphs(const Backend& k, UseGraph use, int64_t n_launches, bool between_devices,
                       std::shared_ptr<TrafficCounter> counter)
    : k_(k),
      use_(use),
      between_devices_(between_devices),
      counter_(std::move(counter)),
      used_(use != UseGraph::off && k.can_record()) {
    if (use_ == UseGraph::on && !used_)
        fail(Exit::usage, "device.graph: on needs a GPU, and KILN_CUDA_SYNC not set; use device.graph: auto");
    if (use_ == UseGraph::automatic && used_ && n_launches > kMostLaunches) {
        used_ = false;
        note_ = fmt::format("steps of about {} launches are not recorded as a graph", n_launches);
    }
}

void StepGraphs::run(Piece& piece, Stream s, const std::function<void()>& work) {
    if (!used_ || inside_) return work();
    const Set inside(inside_);
    if (!std::exchange(piece.has_run, true)) return work();
    if (piece.graph) {
        counter_->add(piece.traffic);
    } else {
        const Traffic before = counter_->total();
        try {
            piece.graph.emplace(k_, s, work);
        } catch (const Error& e) {
            if (use_ == UseGraph::on) throw;
            // A failure inside NCCL ends it, and other ranks would wait for the messages that this rank did not record.
            if (between_devices_)
                fail(e.code, "a step could not be recorded as a graph: {}; use --resume --set device.graph=off",
                     e.what());
            used_ = false;
            note_ = fmt::format("steps are not replayed from a graph, which failed: {}", e.what());
            return work();
        }
        const Traffic now = counter_->total();  // the recording has counted the messages of the first launch
        piece.traffic = {now.sent - before.sent, now.received - before.received};
    }
    piece.graph->launch(s);
}
