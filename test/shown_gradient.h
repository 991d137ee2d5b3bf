// A way from gradient to new parameters that shows a test the gradient of this rank on its way.
#pragma once
#include <algorithm>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "trainer/replicated_update.h"

// Sees this rank's gradient (n) in host memory just before it is summed, and may change it.
using GradientHook = std::function<void(std::span<double>)>;

class ShownGradient final : public GradientSync {
  public:
    ShownGradient(const Backend& k, TrainerMemory& memory, std::unique_ptr<GradientSync> shown, GradientHook hook)
        : k_(k), memory_(memory), shown_(std::move(shown)), hook_(std::move(hook)) {}
    const char* name() const override { return shown_->name(); }
    void start(Stream s) override { shown_->start(s); }
    size_t library_bytes() const override { return shown_->library_bytes(); }
    void begin_step(int64_t step, double learning_rate) override { shown_->begin_step(step, learning_rate); }
    void gradient_ready(Range part, Stream s) override { shown_->gradient_ready(part, s); }
    void finish_step(StepGraphs& graphs, Stream s) override {
        show(s);
        shown_->finish_step(graphs, s);
    }
    bool needs_host() const override { return true; }
    Outcome wait(Stream s) override { return shown_->wait(s); }
    const Mark* summed() const override { return shown_->summed(); }
    const Mark* updated() const override { return shown_->updated(); }
    std::vector<StateTensor> state() override { return shown_->state(); }
    uint64_t updates() const override { return shown_->updates(); }
    void set_updates(uint64_t n) override { shown_->set_updates(n); }
    void broadcast_state(Stream s) override { shown_->broadcast_state(s); }

  private:
    void show(Stream s) {
        const Buf grad = memory_.gradient();  // (n) stat
        std::vector<char> raw(grad.n_bytes());
        k_.download(raw.data(), grad.data, grad.n_bytes(), s);
        k_.synchronize(s);
        std::vector<double> values = as_doubles(Buf(raw.data(), grad.count, grad.dtype));
        hook_(values);
        if (grad.dtype == DType::f64) std::ranges::copy(values, reinterpret_cast<double*>(raw.data()));
        if (grad.dtype == DType::f32) std::ranges::copy(values, reinterpret_cast<float*>(raw.data()));
        k_.upload(grad.data, raw.data(), grad.n_bytes(), s);
        k_.synchronize(s);
    }

    const Backend& k_;
    TrainerMemory& memory_;
    const std::unique_ptr<GradientSync> shown_;
    const GradientHook hook_;
};

// For the last argument of Trainer's constructor.
inline MakeGradientSync show_gradient(GradientHook hook) {
    return [hook](const Group& group, const TrainerOptions& options, TrainerMemory& memory) {
        return std::make_unique<ShownGradient>(group.backend(), memory, make_replicated_update(group, options, memory),
                                               hook);
    };
}
