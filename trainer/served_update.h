// The worker's side of a parameter server: servers own the optimizer and the parameters; a worker has the parameters
// that its ops read, and no moments (trainer/server_link.h has the messages).
//
// Synchronous (parallel.staleness 0): finish_step pushes the gradient to the servers and waits for the parameters.
// Asynchronous: the gradient is that of this worker's share, as a mean over it.  Before a share the worker pulls the
// parameters, and after it pushes the gradient, with a clip factor by the norm of this gradient alone.
#pragma once
#include "comm/group.h"
#include "trainer/gradient_sync.h"
#include "trainer/server_link.h"

class ServedUpdate final : public GradientSync, private ShareSource {
  public:
    // group: of workers that step together, all or, where asynchronous, this one alone.
    ServedUpdate(const Group& group, const TrainerOptions& options, TrainerMemory& memory);
    const char* name() const override { return name_.c_str(); }
    void start(Stream s) override { stream_ = s; }

    void begin_step(int64_t step, double learning_rate) override;
    void gradient_ready(Range, Stream) override {}  // finish_step sends all parts
    void finish_step(StepGraphs& graphs, Stream s) override;
    bool needs_host() const override { return true; }
    Outcome wait(Stream s) override;
    const Mark* summed() const override { return summed_.get(); }
    const Mark* updated() const override { return updated_.get(); }

    std::vector<StateTensor> parameters() override;
    std::vector<StateTensor> state() override;
    bool is_scattered() const override { return true; }
    uint64_t updates() const override { return updates_; }
    void set_updates(uint64_t n) override { updates_ = n; }
    void collect_state(Stream s) override;
    void distribute_state(Stream s) override;
    uint64_t weights_hash(Stream s) override { return memory_.weights_hash(k_, s); }

    ShareSource* shares() override { return synchronous_ ? nullptr : this; }
    std::vector<ServerReport> server_reports() override;
    void close(Exit code) override;

  private:
    using Kind = ServerMessage::Kind;
    int shares_per_step() const override { return link_.n_workers(); }
    std::optional<int64_t> next_share() override;
    void open(int64_t first, int64_t end) override;
    int64_t close_early() override;
    const std::vector<int>& lost() const override { return lost_; }
    Exit exit_code() const override { return exit_code_; }

    bool is_root() const { return link_.rank() == 0; }
    Range shard(int server) const;
    void push(ServerMessage m, Stream s);
    void tell_servers(const ServerMessage& m);
    // Takes messages until every server has sent `count(server)` numbers of this kind; at least one message of each.
    ServerMessage gather(Kind kind, const char* what, const std::function<size_t(int server)>& count,
                         const std::function<void(int server, const ServerLink::Incoming&)>& take);
    void wait_for_all(Kind kind, const char* what);
    void pull();
    void receive_parameters(Stream s);
    Buf saved(size_t tensor);  // 0: the parameters, then the moments, (n_params) f32
    std::vector<StateTensor> tensors_of(size_t tensor, const std::string& prefix);

    const Backend& k_;
    const Group& group_;
    const TrainerOptions o_;
    TrainerMemory& memory_;
    const bool synchronous_;
    ServerLink link_;
    const std::string name_;
    const MarkOwner summed_, updated_;
    Stream stream_ = nullptr;
    uint64_t updates_ = 0, n_pushed_ = 0;
    int64_t share_ = -1;  // that is computed; -1: none
    int64_t done_ = -1;   // that is pushed, and the dealer does not know
    int64_t end_ = 0;     // shares below are the run's so far
    double learning_rate_ = 0;
    Outcome outcome_;
    std::vector<int> lost_;
    Exit exit_code_ = Exit::complete;
    // In host memory, of rank 0: what a checkpoint keeps.
    Arena saved_arena_;
    std::vector<Tensors> saved_;  // the parameters, then the moments
};
std::unique_ptr<GradientSync> make_served_update(const Group& group, const TrainerOptions& options,
                                                 TrainerMemory& memory);
