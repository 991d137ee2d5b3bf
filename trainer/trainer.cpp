#include "trainer/trainer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "common/hash.h"
#include "trainer/tuning.h"

std::vector<double> as_doubles(const Buf& host) {
    std::vector<double> out(host.count);
    const auto copy = [&]<class T>() {
        for (size_t i = 0; i < out.size(); i++) out[i] = double(float(host.as<T>()[i]));
    };
    if (host.dtype == DType::f64) std::copy_n(host.as<double>(), out.size(), out.begin());
    if (host.dtype == DType::f32) copy.template operator()<float>();
    if (host.dtype == DType::bf16) copy.template operator()<bf16>();
    return out;
}

namespace {
TrainerOptions checked(TrainerOptions o) {
    o.model.architecture->check(o.model, o.real);
    return o;
}

// Launches of a rank's part of a step on a GPU, about.
int64_t launches_of_step(const ModelConfig& c, int n_micro) {
    constexpr int64_t kPerBlock = 26, kElse = 30;  // of a micro-batch
    return n_micro * (c.L * kPerBlock + kElse);
}
}  // namespace

Trainer::Marks::Marks(const Backend& k, int n_micro) : reduced(k), end(k) {
    for (auto* marks : {&start, &forward, &backward})
        for (int i = 0; i < n_micro; i++) marks->emplace_back(k);
}

Trainer::Trainer(const Backend& k, Comm& comm, TrainerOptions options)
    : k_(k),
      comm_(comm),
      o_(checked(std::move(options))),
      share_(batch_share(o_.global_batch_size, o_.micro_batch_size, comm.rank(), comm.size(),
                         o_.allreduce == AllReduce::ordered)),
      stream_owner_(k),
      stream_(stream_owner_.get()),
      fold_(share_.n_runs),
      memory_(o_, share_.n_micro, fold_.n_buffers()),
      feed_(k, o_, share_, memory_.staging, memory_.batch) {
    CHECK_THAT(o_.real != DType::f64 || comm_.size() == 1, "the double instance runs on one rank, not {}",
               comm_.size());
    k_.take_workspace(stream_);  // before the plan is held against what is free
    if (!o_.inference && o_.real != DType::f64)
        reducer_ = make_gradient_all_reduce(k_, comm_, o_.allreduce, memory_.n_params(), o_.nccl);
    if (reducer_) reducer_->plan(memory_.scalar_arena);
    memory_.require(k_.memory_state(), comm_.size());
    memory_.allocate(k_, stream_);
    if (!o_.inference) {
        mark_decay();
        marks_.emplace(k_, share_.n_micro);
        rate_host_.emplace(k_, 3 * sizeof(double));
        outcome_.emplace(k_, (memory_.losses.count + 1) * sizeof(double));
        graphs_.emplace(k_, o_.graph, launches_of_step(o_.model, share_.n_micro), o_.nccl != nullptr);
    }
    k_.synchronize(stream_);
    connect();
}

// Work may still read what is about to be given back: an error can leave a step in its middle.
Trainer::~Trainer() {
    try {
        k_.synchronize(stream_);
    } catch (const std::exception&) {}  // the step that met the error has told it
}

// A reduction of the gradient while it is zero.  NCCL connects the ranks, and takes memory for it, at the first call of
// a size: before the first step, and before that memory is counted.
void Trainer::connect() {
    if (!reducer_ || reducer_->needs_host()) return;
    const size_t before = k_.memory_state().n_free;
    reducer_->sum(memory_.flat_gradient(0), stream_);
    reducer_->wait(stream_);
    reduction_bytes_ = before - std::min(before, k_.memory_state().n_free);
}

// Marks the blocks of kDecayBlock elements that weight decay applies to.
void Trainer::mark_decay() {
    std::vector<uint8_t> decay(memory_.decay.count);
    const char* base = static_cast<const char*>(memory_.param_arena.flat(o_.real).data);
    for (size_t p = 0; p < memory_.params.size(); p++) {
        const Buf b = memory_.params[p];
        const size_t first = size_t(static_cast<const char*>(b.data) - base) / dtype_bytes(o_.real);
        for (size_t i = first; i < first + b.count; i += kDecayBlock)
            decay[i / kDecayBlock] = memory_.param_list[p].decay;
    }
    k_.upload(memory_.decay.data, decay.data(), decay.size(), stream_);
    k_.synchronize(stream_);
}

const char* Trainer::reduction() const { return reducer_ ? reducer_->name() : "no"; }

void Trainer::initialize() {
    init_params(o_.model, k_, masters(), o_.seed, stream_);
    parameters_changed();
}

void Trainer::parameters_changed() {
    if (!has_masters()) return;
    k_.cast({.y = memory_.param_arena.flat(o_.real), .x = memory_.flat_masters()}, stream_);
    k_.synchronize(stream_);
}

uint64_t Trainer::weights_hash() {
    uint32_t halves[2];
    k_.hash({.y = memory_.hash, .x = memory_.flat_masters()}, stream_);
    k_.download(halves, memory_.hash.data, memory_.hash.n_bytes(), stream_);
    k_.synchronize(stream_);
    return halves[0] | uint64_t(halves[1]) << 32;
}

bool Trainer::finite() {
    const Buf params = memory_.flat_masters(), moments = memory_.flat_moments();
    std::vector<Buf> parts = {params};
    for (size_t i = 0; i < moments.count; i += params.count) parts.push_back(moments.slice(i, params.count));
    for (const Buf& part : parts) {  // any infinity or NaN shows in the norm; so does a norm that itself overflows
        k_.grad_norm({.norm = memory_.norm, .clip = memory_.clip, .grad = part, .scratch = memory_.norm_scratch},
                     stream_);
        std::vector<char> norm(memory_.norm.n_bytes());
        k_.download(norm.data(), memory_.norm.data, norm.size(), stream_);
        k_.synchronize(stream_);
        if (!std::isfinite(as_doubles(Buf(norm.data(), 1, memory_.norm.dtype))[0])) return false;
    }
    return true;
}

void Trainer::broadcast_state() {
    const size_t piece = size_t(16) << 20;  // bytes
    std::vector<char> host;
    for (const Buf& flat : {memory_.flat_masters(), memory_.flat_moments()})
        for (size_t i = 0; comm_.size() > 1 && i < flat.n_bytes(); i += piece) {
            host.resize(std::min(piece, flat.n_bytes() - i));
            char* device = static_cast<char*>(flat.data) + i;
            k_.download(host.data(), device, host.size(), stream_);
            k_.synchronize(stream_);
            comm_.broadcast(host.data(), host.size(), 0);
            k_.upload(device, host.data(), host.size(), stream_);
            k_.synchronize(stream_);
        }
    parameters_changed();
    comm_.broadcast(&updates_, sizeof updates_, 0);
    const uint64_t mine = weights_hash();
    std::vector<uint64_t> all(size_t(comm_.size()));
    comm_.all_gather(&mine, all.data(), sizeof mine);
    for (int r = 1; r < comm_.size(); r++)
        CHECK_THAT(all[size_t(r)] == all[0],
                   "rank {} holds other parameters than rank 0 after the broadcast: {} and {}", r,
                   hash_text(all[size_t(r)]), hash_text(all[0]));
}

std::string Trainer::tune() { return tune_on_random_tokens(training_pass(batch(0), memory_.grads[0], false)); }

Batch Trainer::batch(int micro) const {
    const size_t BT = size_t(o_.micro_batch_size) * o_.model.T, i = size_t(micro);
    return {.inputs = memory_.batch.inputs.slice(i * BT, BT),
            .targets = memory_.batch.targets.slice(i * BT, BT),
            .order = memory_.batch.order.slice(i * BT, BT),
            .B = o_.micro_batch_size,
            .T = o_.model.T,
            .where = memory_.batch.where.slice(i * 2, 2),
            .seed = o_.seed};
}

Pass Trainer::pass(const Batch& batch) const {
    return {.k = k_,
            .config = o_.model,
            .params = memory_.params,
            .acts = memory_.acts,
            .batch = batch,
            .recompute = memory_.act_shape.recompute,
            .stream = stream_};
}

Pass Trainer::training_pass(const Batch& batch, const Tensors& grads, bool accumulate) const {
    Pass x = pass(batch);
    x.grads = &grads;
    x.train = true;
    x.grad_scale = 1.0f / (float(o_.global_batch_size) * float(o_.model.T));
    x.accumulate = accumulate;
    return x;
}

void Trainer::accumulate_micro_batches() {
    const int B = o_.micro_batch_size;
    const Architecture& model = *o_.model.architecture;
    fold_ = RunFold(share_.n_runs);
    for (int i = 0; i < share_.n_micro; i++) {
        const Tensors& grads = memory_.grads[size_t(fold_.working())];
        const Pass x = training_pass(batch(i), grads, i % share_.run_length != 0);
        k_.set_mark(marks_->start[size_t(i)].get(), stream_);
        model.forward(x);
        const Buf sums = memory_.losses.slice(size_t(i) * B, size_t(B));  // (B)
        k_.row_sum({.y = sums, .x = memory_.loss, .B = B, .T = o_.model.T}, stream_);
        k_.set_mark(marks_->forward[size_t(i)].get(), stream_);

        model.backward(x);
        if ((i + 1) % share_.run_length == 0)
            fold_.push([&](int into, int from) {
                k_.add({.y = memory_.flat_gradient(into), .x = memory_.flat_gradient(from)}, stream_);
            });
        k_.set_mark(marks_->backward[size_t(i)].get(), stream_);
    }
}

// Hands the gradient to the test hook, in host memory and double.
void Trainer::show_gradient(Buf grad) {
    std::vector<char> raw(grad.n_bytes());
    k_.download(raw.data(), grad.data, grad.n_bytes(), stream_);
    k_.synchronize(stream_);
    std::vector<double> values = as_doubles(Buf(raw.data(), grad.count, grad.dtype));
    before_reduce(values);
    if (grad.dtype == DType::f64) std::memcpy(raw.data(), values.data(), raw.size());
    if (grad.dtype == DType::f32) std::ranges::copy(values, reinterpret_cast<float*>(raw.data()));
    k_.upload(grad.data, raw.data(), grad.n_bytes(), stream_);
    k_.synchronize(stream_);
}

// The mean loss of the global batch from this rank's sums.
double Trainer::gather_loss(const std::vector<double>& mine) {
    std::vector<double> all(mine.size() * size_t(comm_.size()));
    comm_.all_gather(mine.data(), all.data(), mine.size() * sizeof(double));
    double sum = 0;
    for (double l : all) sum += l;  // rank order is global sequence order
    return sum / (double(o_.global_batch_size) * o_.model.T);
}

// What the optimizer needs of this step, where the next upload finds it.
void Trainer::set_rates(double learning_rate) {
    const double t = double(updates_ + 1);
    const double rate[3] = {learning_rate, 1 - std::pow(double(o_.optimizer.beta1), t),
                            1 - std::pow(double(o_.optimizer.beta2), t)};
    if (memory_.rate.dtype == DType::f64) std::ranges::copy(rate, rate_host_->as<double>());
    if (memory_.rate.dtype == DType::f32)
        std::ranges::transform(rate, rate_host_->as<float>(), [](double r) { return float(r); });
}

// Norm, clip and optimizer, and what the host reads of the step; nothing is updated when the norm is not finite.
void Trainer::update(Buf grad) {
    k_.set_mark(marks_->reduced.get(), stream_);
    k_.grad_norm({.norm = memory_.norm,
                  .clip = memory_.clip,
                  .grad = grad,
                  .scratch = memory_.norm_scratch,
                  .max_norm = o_.grad_clip},
                 stream_);
    k_.upload(memory_.rate.data, rate_host_->as<void>(), memory_.rate.n_bytes(), stream_);
    const Buf moments = memory_.flat_moments();
    OptimizerUpdate op = o_.optimizer;
    op.param = memory_.flat_masters();
    if (has_masters()) op.copy = memory_.param_arena.flat(o_.real);
    op.m = moments.slice(0, grad.count);
    if (op.kind != OptimizerKind::sgd) op.v = moments.slice(grad.count, grad.count);
    op.grad = grad;
    op.decay = memory_.decay;
    op.rate = memory_.rate;
    op.clip = memory_.clip;
    k_.optimizer_update(op, stream_);
    k_.set_mark(marks_->end.get(), stream_);
    char* to = outcome_->as<char>();
    k_.download(to, memory_.losses.data, memory_.losses.n_bytes(), stream_);
    k_.download(to + memory_.losses.n_bytes(), memory_.norm.data, memory_.norm.n_bytes(), stream_);
}

StepResult Trainer::step(int64_t step, double learning_rate, const NextMicroBatch& next, bool more) {
    StepResult result;
    Stopwatch clock;
    feed_.take(step, next, stream_);
    result.ms.data = clock.lap_ms();
    set_rates(learning_rate);
    const auto gradient = [&] { return memory_.flat_gradient(fold_.result()); };
    const bool needs_host = before_reduce || (reducer_ && reducer_->needs_host());
    if (needs_host) {
        graphs_->run(until_reduction_, stream_, [&] { accumulate_micro_batches(); });
    } else {
        graphs_->run(whole_, stream_, [&] {
            accumulate_micro_batches();
            if (reducer_) reducer_->sum(gradient(), stream_);
            update(gradient());
        });
    }
    const double given_ms = clock.ms();
    if (more) feed_.fetch_ahead(step + 1, next);
    const double fetched_ms = clock.ms();
    if (needs_host) {
        if (before_reduce) show_gradient(gradient());
        if (reducer_) reducer_->sum(gradient(), stream_);
        graphs_->run(after_reduction_, stream_, [&] { update(gradient()); });
    }
    collect(result);
    // Until then the device had work while the next tokens were fetched.
    const double busy_ms =
        result.ms.forward + result.ms.backward + (needs_host ? 0 : result.ms.reduce + result.ms.optimizer);
    result.ms.data += std::max(0.0, fetched_ms - std::max(given_ms, busy_ms));
    return result;
}

// Waits for the step and reads what came of it: the only wait of a step on a GPU with a communicator of its own.
void Trainer::collect(StepResult& result) {
    if (reducer_)
        reducer_->wait(stream_);
    else
        k_.synchronize(stream_);
    const Buf losses = memory_.losses;
    const std::vector<double> mine = as_doubles(Buf(outcome_->as<char>(), losses.count + 1, losses.dtype));
    result.grad_norm = mine.back();
    result.loss = gather_loss({mine.begin(), mine.end() - 1});
    result.updated = std::isfinite(result.grad_norm);
    updates_ += result.updated;
    if (result.updated && !std::isfinite(result.loss))
        fail(Exit::numeric,
             "loss {} with a finite gradient norm of {}: logits overflowed; lower optimizer.learning_rate", result.loss,
             result.grad_norm);
    const auto between = [&](const MarkOwner& a, const MarkOwner& b) { return k_.ms_between(a.get(), b.get()); };
    for (size_t i = 0; i < size_t(share_.n_micro); i++) {
        result.ms.forward += between(marks_->start[i], marks_->forward[i]);
        result.ms.backward += between(marks_->forward[i], marks_->backward[i]);
    }
    result.ms.reduce = between(marks_->backward.back(), marks_->reduced);
    result.ms.optimizer = between(marks_->reduced, marks_->end);
}

std::vector<StateTensor> Trainer::list(const Tensors& tensors, const std::string& prefix) const {
    std::vector<StateTensor> out;
    for (size_t i = 0; i < tensors.size(); i++) {
        const ParamInfo& info = memory_.param_list[i];
        out.push_back({prefix + info.name, info.shape_saved(), tensors[i].slice(0, info.count_saved())});
    }
    return out;
}
std::vector<StateTensor> Trainer::parameters() { return list(masters(), ""); }
std::vector<StateTensor> Trainer::moments() {
    std::vector<StateTensor> out = list(memory_.m, "m.");
    if (o_.optimizer.kind != OptimizerKind::sgd)
        for (StateTensor& t : list(memory_.v, "v.")) out.push_back(std::move(t));
    return out;
}
