#include "trainer/memory.h"

#include <algorithm>

#include "comm/run_fold.h"

namespace {
ActivationShape activation_shape(const TrainerOptions& o) {
    return {.B = o.train.micro_batch_size,
            .T = o.model.T,
            .real = o.real,
            .recompute = o.train.recompute,
            .backward = true};
}

// Bytes of the plan for these options, without the part that a GradientSync plans; 0 where the ranks could not share
// the batch so.
size_t planned_bytes(const TrainerOptions& o, int size) {
    if (o.train.global_batch_size % (int64_t(o.train.micro_batch_size) * size) != 0) return 0;
    try {
        const BatchShare share = batch_share(o.train.global_batch_size, o.train.micro_batch_size, 0, size,
                                             o.allreduce == AllReduce::ordered && o.parallel.zero < 2);
        return TrainerMemory(o, share.n_micro, RunFold(share.n_runs).n_buffers(), size).n_bytes();
    } catch (const Error&) { return 0; }
}
}  // namespace

StepBatch::StepBatch(const char* name, int n_micro, size_t BT) : arena(name) {
    const size_t n = size_t(n_micro) * BT;
    arena.add(inputs, "inputs", n, DType::i32);
    arena.add(targets, "targets", n, DType::i32);
    arena.add(order, "order", n, DType::i32);
    arena.add(where, "where", size_t(n_micro) * 2, DType::u32);
}

TrainerMemory::TrainerMemory(const TrainerOptions& options, int n_micro, int n_grads, int size)
    : ModelMemory(options.model, activation_shape(options),
                  {.params = options.parallel.zero < 3, .masters = options.parallel.zero < 1}),
      moment_arena(make_param_arena("optimizer state", stat())),
      grads(size_t(n_grads)),
      batch("tokens of a step", n_micro, size_t(options.train.micro_batch_size) * options.model.T),
      staging("tokens of the next step", n_micro, size_t(options.train.micro_batch_size) * options.model.T),
      o_(options) {
    grad_arenas.reserve(grads.size());
    for (Tensors& g : grads) {
        grad_arenas.push_back(make_param_arena("gradients", stat()));
        if (o_.parallel.zero < 2) plan(grad_arenas.back(), g, param_list, stat());
    }
    if (o_.parallel.zero > 0) plan_shards(size);
    scalar_arena.add(losses, "losses", size_t(n_micro) * size_t(o_.train.micro_batch_size), stat());
    scalar_arena.add(clip, "clip", 1, stat());
    scalar_arena.add(norm, "norm", 1, stat());
    scalar_arena.add(norm_scratch, "norm_scratch", grad_norm_scratch(n_params()), stat());
    for (Arena& a : grad_arenas) arenas_.push_back(&a);
    arenas_.insert(arenas_.end(),
                   {&shard_arena, &moment_arena, &act_arena, &batch.arena, &staging.arena, &scalar_arena});
}

// Rows: a sixteenth of all parameters, so that most of a padded buffer is used; from stage 2 on an eighth of a block.
void TrainerMemory::plan_shards(int size) {
    const std::vector<FlatParam> flat = ::flat_params(param_list);
    const int L = config.L, stage = o_.parallel.zero;
    layout.emplace(n_params(), size, stage == 1 ? n_params() / 16 : block_ranges(flat, L).back().count / 8);
    const size_t padding = layout->padded() - n_params();
    if (stage < 3) param_arena.add(param_padding_, "padding", padding, real());
    if (stage == 1) return grad_arenas.front().add(grad_padding_, "padding", padding, stat());
    // A window's sums can run beside the pass that writes the two below.
    grad_windows.emplace(flat, L, *layout, sums_beside() ? 3 : 2);
    grad_windows->plan(grad_arenas.front(), stat());
    if (stage < 3) return;
    param_windows.emplace(flat, L, *layout, 2);
    param_windows->plan(param_arena, real());
}

void TrainerMemory::allocate(const Backend& k, Stream s) {
    ModelMemory::allocate(k, s);
    if (grad_windows) grad_windows->bind(grads.front());
    if (param_windows) param_windows->bind(params);
}

void TrainerMemory::require(const MemoryState& now, int size) const {
    const auto planned = [&](int B, Recompute level) {
        TrainerOptions changed = o_;
        changed.train.micro_batch_size = B, changed.train.recompute = level;
        return planned_bytes(changed, size);
    };
    ModelMemory::require(now, [&](size_t n_free) {
        const size_t own = planned(o_.train.micro_batch_size, o_.train.recompute),
                     sync = n_bytes() - std::min(n_bytes(), own);
        return what_fits(o_.train.micro_batch_size, o_.train.recompute, n_free - std::min(n_free, sync), planned);
    });
}
