// A GradientSync around another one.  Each call goes on to the inner one; a test overrides the calls that it watches.
#pragma once
#include <memory>
#include <utility>
#include <vector>

#include "trainer/gradient_sync.h"

class DecoratedSync : public GradientSync {
  public:
    explicit DecoratedSync(std::unique_ptr<GradientSync> inner) : inner_(std::move(inner)) {}
    const char* name() const override { return inner_->name(); }
    float gradient_scale() const override { return inner_->gradient_scale(); }
    void start(Stream s) override { inner_->start(s); }
    size_t connection_bytes() const override { return inner_->connection_bytes(); }
    void begin_step(int64_t step, double learning_rate) override { inner_->begin_step(step, learning_rate); }
    bool sums_each_micro_batch() const override { return inner_->sums_each_micro_batch(); }
    void begin_backward(Stream s) override { inner_->begin_backward(s); }
    void gradient_ready(Range part, Stream s) override { inner_->gradient_ready(part, s); }
    void finish_step(StepGraphs& graphs, Stream s) override { inner_->finish_step(graphs, s); }
    bool needs_host() const override { return inner_->needs_host(); }
    Outcome wait(Stream s) override { return inner_->wait(s); }
    double waited_ms() const override { return inner_->waited_ms(); }
    const Mark* summed() const override { return inner_->summed(); }
    const Mark* updated() const override { return inner_->updated(); }
    const Mark* gathered() const override { return inner_->gathered(); }
    std::vector<StateTensor> parameters() override { return inner_->parameters(); }
    std::vector<StateTensor> state() override { return inner_->state(); }
    bool is_scattered() const override { return inner_->is_scattered(); }
    std::string accept(const std::vector<std::string>& saved) override { return inner_->accept(saved); }
    uint64_t updates() const override { return inner_->updates(); }
    void set_updates(uint64_t n) override { inner_->set_updates(n); }
    void collect_state(Stream s) override { inner_->collect_state(s); }
    void distribute_state(Stream s) override { inner_->distribute_state(s); }
    uint64_t weights_hash(Stream s) override { return inner_->weights_hash(s); }
    void enter_evaluation(Stream s) override { inner_->enter_evaluation(s); }
    void leave_evaluation(Stream s) override { inner_->leave_evaluation(s); }

  private:
    const std::unique_ptr<GradientSync> inner_;
};
