// A way from gradient to new parameters that shows a test the gradient of this rank on its way.
#pragma once
#include <algorithm>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "test/decorated_sync.h"
#include "trainer/replicated_update.h"

// Sees this rank's gradient (n) in host memory just before it is summed, and may change it.
using GradientHook = std::function<void(std::span<double>)>;

class ShownGradient final : public DecoratedSync {
  public:
    ShownGradient(const Backend& k, TrainerMemory& memory, std::unique_ptr<GradientSync> inner, GradientHook hook)
        : DecoratedSync(std::move(inner)), k_(k), memory_(memory), hook_(std::move(hook)) {}
    void finish_step(StepGraphs& graphs, Stream s) override {
        show(s);
        DecoratedSync::finish_step(graphs, s);
    }
    bool needs_host() const override { return true; }

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
    const GradientHook hook_;
};

// For the last argument of Trainer's constructor.
inline MakeGradientSync show_gradient(GradientHook hook) {
    return [hook](const Group& group, const TrainerOptions& options, TrainerMemory& memory) {
        return std::make_unique<ShownGradient>(group.backend(), memory, make_replicated_update(group, options, memory),
                                               hook);
    };
}
