#include "trainer/trainer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "comm/run_fold.h"
#include "common/clock.h"
#include "kernels/cost.h"
#include "trainer/tuning.h"

namespace {
TrainerOptions checked(TrainerOptions o, int size) {
    o.model.architecture->check(o.model, o.real);
    CHECK_THAT(o.real != DType::f64 || size == 1, "the double instance runs on one rank, not {}", size);
    return o;
}

// Launches of a forward and a backward pass on a GPU, about.
int64_t launches_of(const Pass& x) {
    const Recording recording;
    const Pass recorded = x.on(recorder_backend());
    x.config.architecture->forward(recorded);
    x.config.architecture->backward(recorded);
    int64_t n = 0;
    for (const AnyOp& op : recording.ops()) n += cost(op).launches;
    return n;
}
}  // namespace

Trainer::Marks::Marks(const Backend& k, int n_micro) {
    for (auto* marks : {&start, &forward, &backward})
        for (int i = 0; i < n_micro; i++) marks->emplace_back(k);
}

Trainer::Trainer(const Group& group, TrainerOptions options, const MakeGradientSync& make_sync)
    : k_(group.backend()),
      group_(group),
      o_(checked(std::move(options), group.size())),
      share_(batch_share(o_.train.global_batch_size, o_.train.micro_batch_size, group.rank(), group.size(),
                         o_.allreduce == AllReduce::ordered && o_.parallel.zero < 2)),
      stream_owner_(k_),
      stream_(stream_owner_.get()),
      memory_(o_, share_.n_micro, RunFold(share_.n_runs).n_buffers(), group.size()),
      feed_(k_, o_, share_, memory_.staging, memory_.batch),
      sync_(make_sync(group, o_, memory_)),
      marks_(k_, share_.n_micro),
      block_ranges_(block_ranges(flat_params(memory_.param_list), o_.model.L)),
      losses_(k_, size_t(share_.n_micro) * size_t(o_.train.micro_batch_size) * sizeof(double)) {
    k_.take_workspace(stream_);  // before the plan is held against what is free
    memory_.require(k_.memory_state(), group.size());
    memory_.allocate(k_, stream_);
    const int64_t n_launches = share_.n_micro * launches_of(training_pass(batch(0), memory_.grads[0], false));
    // Messages that the host moves during a backward pass cannot be recorded.
    const bool host_in_passes = sync_->sums_each_micro_batch() && sync_->needs_host();
    if (host_in_passes && o_.graph == UseGraph::on)
        fail(Exit::usage,
             "device.graph: on with parallel.zero: {} needs messages from GPU to GPU; use device.graph: auto",
             o_.parallel.zero);
    graphs_.emplace(k_, host_in_passes ? UseGraph::off : o_.graph, n_launches,
                    group.size() > 1 && !group.device().needs_host(), group.host().counter());
    k_.synchronize(stream_);
    sync_->start(stream_);
    const Batch first = batch(0);
    session_.emplace(k_, memory_, first.inputs, first.targets, memory_.losses.slice(0, size_t(first.B)), stream_);
}

// After an error the device may still use this memory: an error can leave a step in its middle.
Trainer::~Trainer() {
    try {
        k_.synchronize(stream_);
    } catch (const std::exception&) {}  // the step that met the error has told it
}

void Trainer::initialize() {
    if (sync_->is_scattered()) {
        Tensors masters;
        for (const StateTensor& t : sync_->parameters()) masters.push_back(t.data);
        return init_params(o_.model, cpu_backend(), masters, o_.seed, nullptr);
    }
    init_params(o_.model, k_, memory_.master_tensors(), o_.seed, stream_);
    parameters_changed();
}

// Where masters are scattered, distribute_state() rounds them.
void Trainer::parameters_changed() {
    if (!sync_->is_scattered()) memory_.round_masters(k_, stream_);
}

bool Trainer::finite() {
    uint8_t mine = own_state_is_finite();
    std::vector<uint8_t> all(size_t(group_.size()));
    group_.host().all_gather(&mine, all.data(), 1);
    return std::ranges::all_of(all, [](uint8_t each) { return each; });
}

bool Trainer::own_state_is_finite() {
    const Buf params = memory_.flat_masters(), moments = memory_.flat_moments();
    std::vector<Buf> parts = {params};
    for (size_t i = 0; i < moments.count; i += params.count)
        parts.push_back(moments.slice(i, std::min(params.count, moments.count - i)));
    for (const Buf& part : parts) {  // any infinity or NaN shows in the norm; so does a norm that itself overflows
        if (part.count == 0) continue;
        k_.grad_norm({.norm = memory_.norm,
                      .clip = memory_.clip,
                      .grad = part,
                      .scratch = memory_.norm_scratch.slice(0, grad_norm_scratch(part.count))},
                     stream_);
        std::vector<char> norm(memory_.norm.n_bytes());
        k_.download(norm.data(), memory_.norm.data, norm.size(), stream_);
        k_.synchronize(stream_);
        if (!std::isfinite(as_doubles(Buf(norm.data(), 1, memory_.norm.dtype))[0])) return false;
    }
    return true;
}

std::string Trainer::tune() {
    return tune_on_random_tokens(training_pass(batch(0), memory_.grads[0], false), share_.run_length > 1);
}

Batch Trainer::batch(int micro) const {
    const size_t BT = size_t(o_.train.micro_batch_size) * o_.model.T, i = size_t(micro);
    return {.inputs = memory_.batch.inputs.slice(i * BT, BT),
            .targets = memory_.batch.targets.slice(i * BT, BT),
            .order = memory_.batch.order.slice(i * BT, BT),
            .B = o_.train.micro_batch_size,
            .T = o_.model.T,
            .where = memory_.batch.where.slice(i * 2, 2),
            .seed = o_.seed};
}

Pass Trainer::training_pass(const Batch& batch, const Tensors& grads, bool accumulate) const {
    return {.k = k_,
            .config = o_.model,
            .params = memory_.params,
            .acts = memory_.acts,
            .grads = &grads,
            .batch = batch,
            .recompute = o_.train.recompute,
            .train = true,
            .grad_scale = sync_->gradient_scale() / (float(o_.train.global_batch_size) * float(o_.model.T)),
            .accumulate = accumulate,
            .stream = stream_};
}

void Trainer::accumulate_micro_batches() {
    const int B = o_.train.micro_batch_size;
    const Architecture& model = *o_.model.architecture;
    const bool each = sync_->sums_each_micro_batch();
    RunFold fold(share_.n_runs);
    for (int i = 0; i < share_.n_micro; i++) {
        const Tensors& grads = memory_.grads[size_t(each ? 0 : fold.working())];
        const Pass x = training_pass(batch(i), grads, !each && i % share_.run_length != 0);
        k_.set_mark(marks_.start[size_t(i)].get(), stream_);
        memory_.forward(x);
        // memory_.loss is the activation `loss`, one of each token, that the forward pass has written.
        const Buf sums = memory_.losses.slice(size_t(i) * B, size_t(B));  // (B)
        k_.row_sum({.y = sums, .x = memory_.loss, .B = B, .T = o_.model.T}, stream_);
        k_.set_mark(marks_.forward[size_t(i)].get(), stream_);

        std::vector<std::pair<int, int>> folds;  // gradient buffers (into, from) to add after the backward pass
        if (!each && (i + 1) % share_.run_length == 0)
            fold.push([&](int into, int from) { folds.emplace_back(into, from); });
        if (!each && i + 1 < share_.n_micro) {
            model.backward(x);
            for (const auto& [into, from] : folds)
                k_.add({.y = memory_.flat_gradient(into), .x = memory_.flat_gradient(from)}, stream_);
        } else {
            finish_gradient(x, folds);
        }
        k_.set_mark(marks_.backward[size_t(i)].get(), stream_);
    }
    CHECK_THAT(each || fold.result() == 0, "the gradient's sum is in buffer {}, expected 0", fold.result());
}

// The backward pass of the last micro-batch, or of each, block by block.  After each block a part of the gradient is
// final, and the GradientSync may send this part while the pass goes on.
void Trainer::finish_gradient(const Pass& last, const std::vector<std::pair<int, int>>& folds) {
    sync_->begin_backward(stream_);
    for (int l = o_.model.L - 1; l >= 0; l--) {
        if (memory_.before_block) memory_.before_block(l, l - 1, stream_);
        Pass block = last;
        block.first_layer = l, block.last_layer = l + 1;
        o_.model.architecture->backward(block);
        const Range part = block_ranges_[size_t(l)];
        for (const auto& [into, from] : folds)
            k_.add({.y = memory_.flat_gradient(into).slice(part.first, part.count),
                    .x = memory_.flat_gradient(from).slice(part.first, part.count)},
                   stream_);
        sync_->gradient_ready(part, stream_);
    }
}

// Gathers the sums of all ranks; the mean loss of a token of the global batch.
double Trainer::gather_loss(const std::vector<double>& mine) {
    std::vector<double> all(mine.size() * size_t(group_.size()));
    group_.host().all_gather(mine.data(), all.data(), mine.size() * sizeof(double));
    double sum = 0;
    for (double l : all) sum += l;  // rank order is global sequence order
    return sum / (double(o_.train.global_batch_size) * o_.model.T);
}

// Gives the stream the end of a step: from the gradient to new parameters, and the copy of the losses to the host.
void Trainer::finish_step() {
    sync_->finish_step(*graphs_, stream_);
    k_.download(losses_.as<void>(), memory_.losses.data, memory_.losses.n_bytes(), stream_);
}

StepResult Trainer::step(int64_t step, double learning_rate, const NextMicroBatch& next, bool more) {
    StepResult result;
    Stopwatch clock;
    feed_.take(step, next, stream_);
    result.ms.data = clock.lap_ms();
    sync_->begin_step(step, learning_rate);
    const bool needs_host = sync_->needs_host();
    graphs_->run(piece_, stream_, [&] {
        accumulate_micro_batches();
        if (!needs_host) finish_step();
    });
    const double given_ms = clock.ms();
    if (more) feed_.fetch_ahead(step + 1, next);
    const double fetched_ms = clock.ms();
    if (needs_host) finish_step();
    collect(result);
    // While tokens were fetched the device had work for busy_ms.
    const double busy_ms =
        result.ms.forward + result.ms.backward + (needs_host ? 0 : result.ms.reduce + result.ms.optimizer);
    result.ms.data += std::max(0.0, fetched_ms - std::max(given_ms, busy_ms));
    return result;
}

// Waits for the step and reads what came of it: the only wait of a step on a GPU with a communicator of its own.
void Trainer::collect(StepResult& result) {
    const GradientSync::Outcome outcome = sync_->wait(stream_);
    result.grad_norm = outcome.norm;
    result.updated = outcome.updated;
    const Buf losses = memory_.losses;
    result.loss = gather_loss(as_doubles(Buf(losses_.as<void>(), losses.count, losses.dtype)));
    if (result.updated && !std::isfinite(result.loss))
        fail(Exit::numeric,
             "loss {} with a finite gradient norm of {}: logits overflowed; lower optimizer.learning_rate", result.loss,
             result.grad_norm);
    for (size_t i = 0; i < size_t(share_.n_micro); i++) {
        result.ms.forward += k_.ms_between(marks_.start[i].get(), marks_.forward[i].get());
        result.ms.backward += k_.ms_between(marks_.forward[i].get(), marks_.backward[i].get());
    }
    result.ms.reduce = k_.ms_between(marks_.backward.back().get(), sync_->summed());
    result.ms.optimizer = k_.ms_between(sync_->summed(), sync_->updated());
    result.ms.waited = sync_->waited_ms();
    if (const Mark* gathered = sync_->gathered()) result.ms.gather = k_.ms_between(sync_->updated(), gathered);
}
