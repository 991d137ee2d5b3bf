#include "trainer/replicated_update.h"

#include <algorithm>
#include <cmath>

#include "trainer/broadcast.h"

namespace {
Payload payload_of(const TrainerOptions& options) {
    switch (options.parallel.reduce_dtype) {
        case Precision::fp32:
            break;
        case Precision::bf16:
            return Payload::bf16;
    }
    return Payload::fp32;
}
}  // namespace

ReplicatedUpdate::ReplicatedUpdate(const Group& group, const TrainerOptions& options, TrainerMemory& memory)
    : k_(group.backend()),
      group_(group),
      memory_(memory),
      max_norm_(float(options.train.grad_clip)),
      bucket_elements_(options.parallel.overlap ? options.bucket_bytes / sizeof(float) : SIZE_MAX),
      lane_(make_lane(group, options.parallel.overlap, Otherwise::at_join)),
      all_reduce_(make_gradient_all_reduce(lane_->group(), options.allreduce, memory.n_params(), payload_of(options))),
      name_(
          fmt::format("{}{}", options.parallel.overlap && group.size() > 1 ? "overlapped " : "", all_reduce_->name())),
      optimizer_(k_, {{options.optimizer, flat_params(memory.param_list)}}, memory.stat()),
      summed_(k_),
      updated_(k_),
      norm_(k_, sizeof(double)) {
    optimizer_.plan(memory.moment_arena, memory.scalar_arena);
    all_reduce_->plan(memory.scalar_arena);
}

// At its first call of a size NCCL connects the ranks and takes memory.  start() makes this call while the gradient is
// zero.
void ReplicatedUpdate::start(Stream s) {
    optimizer_.start(s);
    if (all_reduce_->needs_host()) return;
    const size_t before = k_.memory_state().n_free;
    all_reduce_->sum(memory_.gradient(), s);
    group_.device().wait(s);
    connection_bytes_ = before - std::min(before, k_.memory_state().n_free);
}

void ReplicatedUpdate::begin_step(int64_t, double learning_rate) {
    optimizer_.set_rate(learning_rate);
    lane_->begin_step();
    bucket_end_ = memory_.n_params();
}

void ReplicatedUpdate::gradient_ready(Range part, Stream s) {
    const size_t count = bucket_end_ - part.first;
    if (part.first > 0 && count < bucket_elements_) return;
    const Buf bucket = memory_.gradient().slice(part.first, count);  // (count)
    lane_->give([this, bucket](Stream on) { all_reduce_->sum(bucket, on); }, s);
    bucket_end_ = part.first;
}

void ReplicatedUpdate::finish_step(StepGraphs& graphs, Stream s) {
    lane_->join(s);
    graphs.run(after_sum_, s, [&] { update(s); });
}

// Norm, clip and optimizer.  A norm that is not finite makes the clip factor NaN, and nothing is updated.
void ReplicatedUpdate::update(Stream s) {
    const Buf grad = memory_.gradient();
    k_.set_mark(summed_.get(), s);
    k_.grad_norm({.norm = memory_.norm,
                  .clip = memory_.clip,
                  .grad = grad,
                  .scratch = memory_.norm_scratch,
                  .max_norm = max_norm_},
                 s);
    optimizer_.update(
        {.param = memory_.flat_masters(), .copy = memory_.flat_copy(), .grad = grad, .clip = memory_.clip}, s);
    k_.set_mark(updated_.get(), s);
    k_.download(norm_.as<void>(), memory_.norm.data, memory_.norm.n_bytes(), s);
}

GradientSync::Outcome ReplicatedUpdate::wait(Stream s) {
    group_.device().wait(s);
    const double norm = as_doubles(Buf(norm_.as<void>(), 1, memory_.norm.dtype))[0];
    const bool updated = std::isfinite(norm);
    optimizer_.set_updates(optimizer_.updates() + updated);
    return {norm, updated};
}

void ReplicatedUpdate::distribute_state(Stream s) {
    broadcast_parameters(k_, group_.host(), memory_, s);
    uint64_t n = updates();
    group_.host().broadcast(&n, sizeof n, 0);
    set_updates(n);
    const Buf moments = memory_.flat_moments();
    if (n > 0)
        broadcast_from_root(k_, group_.host(), moments, s);
    else  // a fresh run: zeros, which are not worth gigabytes of messages
        k_.zero(moments.data, moments.n_bytes(), s);
}

std::unique_ptr<GradientSync> make_replicated_update(const Group& group, const TrainerOptions& options,
                                                     TrainerMemory& memory) {
    return std::make_unique<ReplicatedUpdate>(group, options, memory);
}
