#include "model/trainer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/hash.h"

namespace {
DType stat_of(DType real) { return real == DType::f64 ? DType::f64 : DType::f32; }

void plan_params(Arena& arena, GPT2Params& p, const GPT2Config& c, DType t, const std::string& prefix = "") {
    visit(p, c, [&](const ParamInfo& info, Buf& b) { arena.add(b, prefix + info.name, info.count(), t); });
}

// Arenas that hold a number per parameter: a tensor begins at the same element in each, whatever its dtype, and no block
// of 64 elements straddles two tensors.
constexpr size_t kParamBlock = 64;
Arena param_arena(const char* name, DType t) { return Arena(name, kParamBlock * dtype_bytes(t)); }
}  // namespace

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

void check_model(const GPT2Config& c, DType real) {
    if (c.C % c.NH != 0) fail(Exit::usage, "model.n_embd = {} is not divisible by model.n_head = {}", c.C, c.NH);
    if (real == DType::bf16 && (c.HS() % 8 != 0 || c.HS() > 128))
        fail(Exit::usage,
             "model.n_embd / model.n_head = {} / {} makes heads of {}; in bf16 they must be a multiple of 8 up to 128: "
             "change n_head, or use device.dtype: fp32",
             c.C, c.NH, c.HS());
}

Trainer::Marks::Marks(const Backend& k, int n_micro) : reduced(k), end(k) {
    for (auto* marks : {&start, &forward, &backward})
        for (int i = 0; i < n_micro; i++) marks->emplace_back(k);
}

Trainer::Trainer(const Backend& k, Comm& comm, TrainerOptions options)
    : k_(k),
      comm_(comm),
      o_(std::move(options)),
      share_(batch_share(o_.global_batch_size, o_.micro_batch_size, comm.rank(), comm.size(),
                         o_.reduction == Reduction::ordered)),
      stream_owner_(k),
      stream_(stream_owner_.get()),
      fold_(share_.n_runs),
      param_arena_(param_arena("parameters", o_.real)),
      master_arena_(param_arena("master parameters", DType::f32)),
      moment_arena_(param_arena("optimizer state", stat_of(o_.real))) {
    check_model(o_.model, o_.real);
    plan_memory();
    const size_t BT = size_t(o_.micro_batch_size) * o_.model.T;
    for (int i = 0; i < 2; i++) slots_.emplace_back(k_, BT);
    if (o_.inference) return;
    marks_.emplace(k_, share_.n_micro);
    rate_host_.emplace(k_, 3 * sizeof(double));
    outcome_.emplace(k_, (losses_.count + 1) * sizeof(double));
    CHECK_THAT(o_.real != DType::f64 || comm_.size() == 1, "the double instance runs on one rank, not {}",
               comm_.size());
    if (o_.real != DType::f64) reducer_ = make_reducer(k_, comm_, o_.reduction, flat_masters().count, o_.nccl);
}

// Work may still read what is about to be given back: an error can leave a step in its middle.
Trainer::~Trainer() {
    try {
        k_.synchronize(stream_);
    } catch (const std::exception&) {  // the error that ends the step has been told
    }
}

void Trainer::plan_memory() {
    const GPT2Config& c = o_.model;
    const DType stat = stat_of(o_.real);
    plan_params(param_arena_, params_, c, o_.real);
    if (has_masters()) plan_params(master_arena_, masters_, c, DType::f32);
    if (!o_.inference) {
        plan_params(moment_arena_, m_, c, stat, "m.");
        if (o_.optimizer.kind != OptimizerKind::sgd) plan_params(moment_arena_, v_, c, stat, "v.");
        grads_.resize(size_t(fold_.n_buffers()));
        grad_arena_.reserve(grads_.size());
    }
    for (GPT2Params& g : grads_) plan_params(grad_arena_.emplace_back(param_arena("gradients", stat)), g, c, stat);
    visit_activations(acts_, c, o_.micro_batch_size, c.T, o_.real, !o_.inference,
                      [&](const std::string& name, Buf& b, size_t n, DType t) { act_arena_.add(b, name, n, t); });
    plan_io(param_arena_.n_bytes() / dtype_bytes(o_.real));
    allocate();
    if (!o_.inference) mark_decay();
    k_.synchronize(stream_);
}

void Trainer::allocate() {
    const auto zero = [this](void* p, size_t n_bytes) { k_.zero(p, n_bytes, stream_); };
    try {
        for (Arena* a : {&param_arena_, &master_arena_, &moment_arena_, &act_arena_, &io_arena_})
            a->allocate(k_.memory, zero);
        for (Arena& a : grad_arena_) a.allocate(k_.memory, zero);
    } catch (const Error& e) {
        if (e.code != Exit::memory) throw;
        fail(Exit::memory, "{}\nThe plan was:\n{}", e.what(), memory_table());
    }
}

Buf Trainer::flat_masters() const {
    return has_masters() ? master_arena_.flat(DType::f32) : param_arena_.flat(o_.real);
}
Buf Trainer::flat_moments() const { return moment_arena_.flat(stat_of(o_.real)); }
Buf Trainer::flat_gradient(int buffer) const { return grad_arena_[size_t(buffer)].flat(stat_of(o_.real)); }

void Trainer::plan_io(size_t n_params) {
    const DType stat = stat_of(o_.real);
    const size_t BT = size_t(o_.micro_batch_size) * o_.model.T;
    io_arena_.add(inputs_, "inputs", BT, DType::i32);
    io_arena_.add(targets_, "targets", BT, DType::i32);
    io_arena_.add(where_, "where", 2, DType::u32);
    io_arena_.add(hash_, "hash", 2, DType::u32);
    io_arena_.add(losses_, "losses", size_t(share_.n_micro) * o_.micro_batch_size, stat);
    if (o_.inference) return;
    io_arena_.add(order_, "order", BT, DType::i32);
    io_arena_.add(decay_, "decay", n_params / kParamBlock, DType::u8);
    io_arena_.add(rate_, "rate", 3, stat);
    io_arena_.add(clip_, "clip", 1, stat);
    io_arena_.add(norm_, "norm", 1, stat);
    io_arena_.add(norm_scratch_, "norm_scratch", grad_norm_scratch(n_params), stat);
}

// Marks the blocks of 64 elements that weight decay applies to.
void Trainer::mark_decay() {
    std::vector<uint8_t> decay(decay_.count);
    const char* base = static_cast<const char*>(param_arena_.flat(o_.real).data);
    visit(params_, o_.model, [&](const ParamInfo& info, Buf& b) {
        const size_t first = size_t(static_cast<const char*>(b.data) - base) / dtype_bytes(o_.real);
        for (size_t i = first; i < first + b.count; i += kParamBlock) decay[i / kParamBlock] = info.decay;
    });
    k_.upload(decay_.data, decay.data(), decay.size(), stream_);
    k_.synchronize(stream_);
}

std::string Trainer::memory_table() const {
    size_t total = 0;
    std::string out;
    for (const Arena* a : arenas()) {
        total += a->n_bytes();
        // The fold's further gradient buffers hold the same tensors: a line instead of a table.
        const bool repeated = !grad_arena_.empty() && a->name() == "gradients" && a != &grad_arena_.front();
        out += repeated ? fmt::format("gradients, another buffer: {}\n", human_bytes(a->n_bytes())) : a->table();
    }
    if (const size_t scratch = reducer_ ? reducer_->scratch_bytes() : 0) {
        total += scratch;
        out += fmt::format("reduction's scratch: {}\n", human_bytes(scratch));
    }
    return out + fmt::format("total: {}", human_bytes(total));
}

const char* Trainer::reduction() const { return reducer_ ? reducer_->name() : "no"; }

std::vector<const Arena*> Trainer::arenas() const {
    std::vector<const Arena*> all = {&param_arena_};
    if (has_masters()) all.push_back(&master_arena_);
    for (const Arena& a : grad_arena_) all.push_back(&a);
    all.insert(all.end(), {&moment_arena_, &act_arena_, &io_arena_});
    return all;
}

void Trainer::initialize() {
    uint32_t tensor = 0;
    visit(masters(), o_.model,
          [&](const ParamInfo& info, Buf& b) { init_tensor(k_, info, b, tensor++, o_.seed, stream_); });
    parameters_changed();
}

void Trainer::parameters_changed() {
    if (!has_masters()) return;
    k_.cast({.y = param_arena_.flat(o_.real), .x = flat_masters()}, stream_);
    k_.synchronize(stream_);
}

uint64_t Trainer::weights_hash() {
    uint32_t halves[2];
    k_.hash({.y = hash_, .x = flat_masters()}, stream_);
    k_.download(halves, hash_.data, hash_.n_bytes(), stream_);
    k_.synchronize(stream_);
    return halves[0] | uint64_t(halves[1]) << 32;
}

bool Trainer::finite() {
    const Buf params = flat_masters(), moments = flat_moments();
    std::vector<Buf> parts = {params};
    for (size_t i = 0; i < moments.count; i += params.count) parts.push_back(moments.slice(i, params.count));
    for (const Buf& part : parts) {  // any infinity or NaN shows in the norm; so does a norm that itself overflows
        k_.grad_norm({.norm = norm_, .clip = clip_, .grad = part, .scratch = norm_scratch_}, stream_);
        std::vector<char> norm(norm_.n_bytes());
        k_.download(norm.data(), norm_.data, norm.size(), stream_);
        k_.synchronize(stream_);
        if (!std::isfinite(as_doubles(Buf(norm.data(), 1, norm_.dtype))[0])) return false;
    }
    return true;
}

void Trainer::broadcast_state() {
    const size_t piece = size_t(16) << 20;  // bytes
    std::vector<char> host;
    for (const Buf& flat : {flat_masters(), flat_moments()})
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

GPT2Batch Trainer::batch() const {
    return {.inputs = inputs_,
            .targets = targets_,
            .order = order_,
            .B = o_.micro_batch_size,
            .T = o_.model.T,
            .where = where_,
            .seed = o_.seed};
}

// Gives a micro-batch to the stream, from pinned memory that stays as it is until the device has read it.
void Trainer::send(const Tokens& tokens, const Slot& slot, int64_t step, int micro) {
    CHECK_THAT(tokens.inputs.size() == inputs_.count && tokens.targets.size() == targets_.count,
               "a micro-batch of {} and {} tokens, expected B*T = {}", tokens.inputs.size(), tokens.targets.size(),
               inputs_.count);
    std::ranges::copy(tokens.inputs, slot.inputs.as<int32_t>());
    std::ranges::copy(tokens.targets, slot.targets.as<int32_t>());
    sort_rows_by_token(tokens.inputs.data(), slot.order.as<int32_t>(), tokens.inputs.size(), o_.model.V);
    slot.where.as<uint32_t>()[0] = uint32_t(step);
    slot.where.as<uint32_t>()[1] = uint32_t((share_.first_micro + micro) * o_.micro_batch_size);
    k_.upload(inputs_.data, slot.inputs.as<void>(), inputs_.n_bytes(), stream_);
    k_.upload(targets_.data, slot.targets.as<void>(), targets_.n_bytes(), stream_);
    k_.upload(order_.data, slot.order.as<void>(), order_.n_bytes(), stream_);
    k_.upload(where_.data, slot.where.as<void>(), where_.n_bytes(), stream_);
    k_.set_mark(slot.sent.get(), stream_);
}

void Trainer::accumulate_micro_batches(int64_t step, const NextMicroBatch& next, StepResult& result) {
    const int B = o_.micro_batch_size;
    const float grad_scale = 1.0f / (float(o_.global_batch_size) * float(o_.model.T));
    for (int i = 0; i < share_.n_micro; i++) {
        const Slot& slot = slots_[size_t(i) % slots_.size()];
        k_.wait_mark(slot.sent.get());  // the host is at most two micro-batches ahead
        Stopwatch clock;
        send(next(), slot, step, i);
        result.ms.data += clock.lap_ms();

        k_.set_mark(marks_->start[size_t(i)].get(), stream_);
        gpt2_forward(k_, o_.model, params_, acts_, batch(), true, grad_scale, stream_);
        k_.row_sum({.y = losses_.slice(size_t(i) * B, size_t(B)), .x = acts_.loss, .B = B, .T = o_.model.T}, stream_);
        k_.set_mark(marks_->forward[size_t(i)].get(), stream_);

        GPT2Params& g = grads_[size_t(fold_.working())];
        gpt2_backward(k_, o_.model, params_, acts_, g, batch(), i % share_.run_length != 0, stream_);
        if ((i + 1) % share_.run_length == 0)
            fold_.push(
                [&](int into, int from) { k_.add({.y = flat_gradient(into), .x = flat_gradient(from)}, stream_); });
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

// Enqueues the optimizer; on the device it does nothing when the norm is not finite.
void Trainer::update(double learning_rate, Buf grad) {
    const double t = double(updates_ + 1);
    const double rate[3] = {learning_rate, 1 - std::pow(double(o_.optimizer.beta1), t),
                            1 - std::pow(double(o_.optimizer.beta2), t)};
    if (rate_.dtype == DType::f64) std::ranges::copy(rate, rate_host_->as<double>());
    if (rate_.dtype == DType::f32)
        std::ranges::transform(rate, rate_host_->as<float>(), [](double r) { return float(r); });
    k_.upload(rate_.data, rate_host_->as<void>(), rate_.n_bytes(), stream_);
    const Buf moments = flat_moments();
    OptimizerUpdate op = o_.optimizer;
    op.param = flat_masters();
    if (has_masters()) op.copy = param_arena_.flat(o_.real);
    op.m = moments.slice(0, grad.count);
    if (op.kind != OptimizerKind::sgd) op.v = moments.slice(grad.count, grad.count);
    op.grad = grad;
    op.decay = decay_;
    op.rate = rate_;
    op.clip = clip_;
    k_.optimizer_update(op, stream_);
}

StepResult Trainer::step(int64_t step, double learning_rate, const NextMicroBatch& next) {
    StepResult result;
    accumulate_micro_batches(step, next, result);
    const Buf grad = flat_gradient(fold_.result());
    if (before_reduce) show_gradient(grad);
    if (reducer_) reducer_->sum(grad, stream_);
    k_.set_mark(marks_->reduced.get(), stream_);
    k_.grad_norm({.norm = norm_, .clip = clip_, .grad = grad, .scratch = norm_scratch_, .max_norm = o_.grad_clip},
                 stream_);
    update(learning_rate, grad);
    fold_.reset();
    k_.set_mark(marks_->end.get(), stream_);
    collect(result);
    return result;
}

// Waits for the step and reads what came of it: the only wait of a step on a GPU with a communicator of its own.
void Trainer::collect(StepResult& result) {
    char* to = outcome_->as<char>();
    k_.download(to, losses_.data, losses_.n_bytes(), stream_);
    k_.download(to + losses_.n_bytes(), norm_.data, norm_.n_bytes(), stream_);
    if (reducer_) reducer_->wait(stream_);
    k_.synchronize(stream_);
    const std::vector<double> mine = as_doubles(Buf(to, losses_.count + 1, losses_.dtype));
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

std::vector<StateTensor> Trainer::list(GPT2Params& p, const std::string& prefix) {
    std::vector<StateTensor> out;
    visit(p, o_.model, [&](const ParamInfo& info, Buf& b) {
        std::vector<size_t> shape = info.shape;
        shape[0] = info.n_rows_saved;
        out.push_back({prefix + info.name, shape, b.slice(0, info.count_saved())});
    });
    return out;
}
std::vector<StateTensor> Trainer::parameters() { return list(masters(), ""); }
std::vector<StateTensor> Trainer::moments() {
    std::vector<StateTensor> out = list(m_, "m.");
    if (o_.optimizer.kind != OptimizerKind::sgd)
        for (StateTensor& t : list(v_, "v.")) out.push_back(std::move(t));
    return out;
}
