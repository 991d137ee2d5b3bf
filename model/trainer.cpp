#include "model/trainer.h"

#include <cmath>
#include <cstring>

#include "common/hash.h"

namespace {
DType stat_of(DType real) { return real == DType::f64 ? DType::f64 : DType::f32; }

// Host values of a stat buffer as doubles.
std::vector<double> download_stat(const Backend& k, const Buf& b, Stream s) {
    std::vector<double> out(b.count);
    if (b.dtype == DType::f64) {
        k.download(out.data(), b.data, b.n_bytes(), s);
        k.synchronize(s);
        return out;
    }
    std::vector<float> f(b.count);
    k.download(f.data(), b.data, b.n_bytes(), s);
    k.synchronize(s);
    std::copy(f.begin(), f.end(), out.begin());
    return out;
}

void upload_stat(const Backend& k, const Buf& b, std::span<const double> values, Stream s) {
    if (b.dtype == DType::f64) return k.upload(b.data, values.data(), b.n_bytes(), s);
    const std::vector<float> f(values.begin(), values.end());
    k.upload(b.data, f.data(), b.n_bytes(), s);
    k.synchronize(s);  // f is gone after this line
}

void plan_params(Arena& arena, GPT2Params& p, const GPT2Config& c, DType t, const std::string& prefix = "") {
    visit(p, c, [&](const ParamInfo& info, Buf& b) { arena.add(b, prefix + info.name, info.count(), t); });
}
}  // namespace

void check_model(const GPT2Config& c) {
    if (c.C % c.NH != 0) fail(Exit::usage, "model.n_embd = {} is not divisible by model.n_head = {}", c.C, c.NH);
}

Trainer::Trainer(const Backend& k, Comm& comm, TrainerOptions options)
    : k_(k),
      comm_(comm),
      o_(std::move(options)),
      share_(batch_share(o_.global_batch_size, o_.micro_batch_size, comm.rank(), comm.size(),
                         o_.reduction == Reduction::ordered)),
      fold_(share_.n_runs) {
    check_model(o_.model);
    plan_memory();
}

void Trainer::plan_memory() {
    const GPT2Config& c = o_.model;
    const DType stat = stat_of(o_.real);
    plan_params(param_arena_, params_, c, o_.real);
    if (!o_.inference) {
        plan_params(moment_arena_, m_, c, stat, "m.");
        if (o_.optimizer.kind != OptimizerKind::sgd) plan_params(moment_arena_, v_, c, stat, "v.");
        grads_.resize(size_t(fold_.n_buffers()));
        grad_arena_.reserve(grads_.size());
    }
    for (GPT2Params& g : grads_) plan_params(grad_arena_.emplace_back("gradients"), g, c, stat);
    visit_activations(acts_, c, o_.micro_batch_size, c.T, o_.real, !o_.inference,
                      [&](const std::string& name, Buf& b, size_t n, DType t) { act_arena_.add(b, name, n, t); });
    plan_io(param_arena_.n_bytes() / dtype_bytes(o_.real));
    param_arena_.allocate(k_.memory, k_.zero);
    moment_arena_.allocate(k_.memory, k_.zero);
    for (Arena& a : grad_arena_) a.allocate(k_.memory, k_.zero);
    act_arena_.allocate(k_.memory, k_.zero);
    io_arena_.allocate(k_.memory, k_.zero);
    if (!o_.inference) mark_decay();
}

void Trainer::plan_io(size_t n_params) {
    const DType stat = stat_of(o_.real);
    const size_t BT = size_t(o_.micro_batch_size) * o_.model.T;
    io_arena_.add(inputs_, "inputs", BT, DType::i32);
    io_arena_.add(targets_, "targets", BT, DType::i32);
    io_arena_.add(where_, "where", 2, DType::u32);
    io_arena_.add(losses_, "losses", size_t(share_.n_micro) * o_.micro_batch_size, stat);
    if (o_.inference) return;
    io_arena_.add(decay_, "decay", n_params / 64, DType::u8);
    io_arena_.add(rate_, "rate", 3, stat);
    io_arena_.add(clip_, "clip", 1, stat);
    io_arena_.add(norm_, "norm", 1, stat);
    io_arena_.add(norm_scratch_, "norm_scratch", grad_norm_scratch(n_params), stat);
}

// Marks the blocks of 64 elements that weight decay applies to; none straddles two tensors, as arenas align to 64
// doubles.
void Trainer::mark_decay() {
    std::vector<uint8_t> decay(decay_.count);
    const char* base = static_cast<const char*>(param_arena_.flat(o_.real).data);
    visit(params_, o_.model, [&](const ParamInfo& info, Buf& b) {
        const size_t first = size_t(static_cast<const char*>(b.data) - base) / dtype_bytes(o_.real);
        for (size_t i = first; i < first + b.count; i += 64) decay[i / 64] = info.decay;
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
    return out + fmt::format("total: {}", human_bytes(total));
}

std::vector<const Arena*> Trainer::arenas() const {
    std::vector<const Arena*> all = {&param_arena_};
    for (const Arena& a : grad_arena_) all.push_back(&a);
    all.insert(all.end(), {&moment_arena_, &act_arena_, &io_arena_});
    return all;
}

void Trainer::initialize() {
    uint32_t tensor = 0;
    visit(params_, o_.model,
          [&](const ParamInfo& info, Buf& b) { init_tensor(k_, info, b, tensor++, o_.seed, stream_); });
}

uint64_t Trainer::weights_hash() {
    const Buf flat = param_arena_.flat(o_.real);
    const size_t piece = size_t(4) << 20;  // elements
    std::vector<char> host(std::min(piece, flat.count) * dtype_bytes(o_.real));
    Hasher hasher;
    for (size_t i = 0; i < flat.count; i += piece) {
        const Buf part = flat.slice(i, std::min(piece, flat.count - i));
        k_.download(host.data(), part.data, part.n_bytes(), stream_);
        k_.synchronize(stream_);
        hasher.update(host.data(), part.n_bytes());
    }
    return hasher.digest();
}

bool Trainer::finite() {
    const Buf params = param_arena_.flat(o_.real), moments = moment_arena_.flat(stat_of(o_.real));
    std::vector<Buf> parts = {params};
    for (size_t i = 0; i < moments.count; i += params.count) parts.push_back(moments.slice(i, params.count));
    for (const Buf& part : parts) {  // any infinity or NaN shows in the norm; so does a norm that itself overflows
        k_.grad_norm({.norm = norm_, .clip = clip_, .grad = part, .scratch = norm_scratch_}, stream_);
        if (!std::isfinite(download_stat(k_, norm_, stream_)[0])) return false;
    }
    return true;
}

void Trainer::broadcast_state() {
    const size_t piece = size_t(16) << 20;  // bytes
    std::vector<char> host;
    for (const Arena* arena : {&param_arena_, &moment_arena_}) {
        const Buf flat = arena->flat(arena == &param_arena_ ? o_.real : stat_of(o_.real));
        for (size_t i = 0; comm_.size() > 1 && i < flat.n_bytes(); i += piece) {
            host.resize(std::min(piece, flat.n_bytes() - i));
            char* device = static_cast<char*>(flat.data) + i;
            k_.download(host.data(), device, host.size(), stream_);
            k_.synchronize(stream_);
            comm_.broadcast(host.data(), host.size(), 0);
            k_.upload(device, host.data(), host.size(), stream_);
            k_.synchronize(stream_);
        }
    }
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
            .B = o_.micro_batch_size,
            .T = o_.model.T,
            .where = where_,
            .seed = o_.seed};
}

void Trainer::accumulate_micro_batches(int64_t step, const NextMicroBatch& next, StepResult& result) {
    const int B = o_.micro_batch_size;
    const float grad_scale = 1.0f / (float(o_.global_batch_size) * float(o_.model.T));
    Stopwatch clock;
    for (int i = 0; i < share_.n_micro; i++) {
        const Tokens tokens = next();
        CHECK_THAT(tokens.inputs.size() == inputs_.count && tokens.targets.size() == targets_.count,
                   "a micro-batch of {} and {} tokens, expected B*T = {}", tokens.inputs.size(), tokens.targets.size(),
                   inputs_.count);
        const uint32_t where[2] = {uint32_t(step), uint32_t((share_.first_micro + i) * B)};
        k_.upload(inputs_.data, tokens.inputs.data(), inputs_.n_bytes(), stream_);
        k_.upload(targets_.data, tokens.targets.data(), targets_.n_bytes(), stream_);
        k_.upload(where_.data, where, sizeof where, stream_);
        k_.synchronize(stream_);
        result.ms.data += clock.lap_ms();

        gpt2_forward(k_, o_.model, params_, acts_, batch(), true, grad_scale, stream_);
        k_.row_sum({.y = losses_.slice(size_t(i) * B, size_t(B)), .x = acts_.loss, .B = B, .T = o_.model.T}, stream_);
        result.ms.forward += clock.lap_ms();

        GPT2Params& g = grads_[size_t(fold_.working())];
        gpt2_backward(k_, o_.model, params_, acts_, g, batch(), i % share_.run_length != 0, stream_);
        if ((i + 1) % share_.run_length == 0)
            fold_.push([&](int into, int from) {
                const DType t = stat_of(o_.real);
                k_.add({.y = grad_arena_[size_t(into)].flat(t), .x = grad_arena_[size_t(from)].flat(t)}, stream_);
            });
        result.ms.backward += clock.lap_ms();
    }
}

double Trainer::gather_loss() {
    const std::vector<double> mine = download_stat(k_, losses_, stream_);
    std::vector<double> all(mine.size() * size_t(comm_.size()));
    comm_.all_gather(mine.data(), all.data(), mine.size() * sizeof(double));
    double sum = 0;
    for (double l : all) sum += l;  // rank order is global sequence order
    return sum / (double(o_.global_batch_size) * o_.model.T);
}

void Trainer::update(double learning_rate) {
    const double t = double(++updates_);
    const double rate[3] = {learning_rate, 1 - std::pow(double(o_.optimizer.beta1), t),
                            1 - std::pow(double(o_.optimizer.beta2), t)};
    upload_stat(k_, rate_, rate, stream_);
    const DType stat = stat_of(o_.real);
    const Buf moments = moment_arena_.flat(stat), grad = grad_arena_[size_t(fold_.result())].flat(stat);
    OptimizerUpdate op = o_.optimizer;
    op.param = param_arena_.flat(o_.real);
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
    Stopwatch clock;
    const Buf grad = grad_arena_[size_t(fold_.result())].flat(stat_of(o_.real));
    if (grad.dtype == DType::f32) {
        const std::span<float> flat(grad.as<float>(), grad.count);
        if (before_reduce) before_reduce(flat);
        all_reduce(comm_, flat, o_.reduction);
    } else {
        CHECK_THAT(comm_.size() == 1, "the double instance runs on one rank, not {}", comm_.size());
    }
    result.ms.reduce = clock.lap_ms();
    k_.grad_norm({.norm = norm_, .clip = clip_, .grad = grad, .scratch = norm_scratch_, .max_norm = o_.grad_clip},
                 stream_);
    result.grad_norm = download_stat(k_, norm_, stream_)[0];
    result.loss = gather_loss();
    result.updated = std::isfinite(result.loss) && std::isfinite(result.grad_norm);
    if (result.updated) update(learning_rate);
    fold_.reset();
    k_.synchronize(stream_);
    result.ms.optimizer = clock.lap_ms();
    return result;
}

EvalResult Trainer::evaluate(uint64_t n_sequences, const ReadSequence& read) {
    const uint64_t B = uint64_t(o_.micro_batch_size), size = uint64_t(comm_.size()), T = uint64_t(o_.model.T);
    const uint64_t n_batches = (n_sequences + B - 1) / B, rounds = (n_batches + size - 1) / size;
    std::vector<int32_t> inputs(B * T), targets(B * T), correct(B * T);
    std::vector<double> mine(rounds * B * 2);  // (rounds, B, 2): loss sum and correct tokens of each sequence
    for (uint64_t round = 0; round < rounds; round++) {
        const uint64_t batch_index = round * size + uint64_t(comm_.rank());
        if (batch_index >= n_batches) continue;
        for (uint64_t b = 0; b < B; b++)  // the last batch is filled up with repeats, which are not counted
            read((batch_index * B + b) % n_sequences, {&inputs[b * T], T}, {&targets[b * T], T});
        k_.upload(inputs_.data, inputs.data(), inputs_.n_bytes(), stream_);
        k_.upload(targets_.data, targets.data(), targets_.n_bytes(), stream_);
        gpt2_forward(k_, o_.model, params_, acts_, batch(), false, 0, stream_);
        const Buf sums = losses_.slice(0, B);
        k_.row_sum({.y = sums, .x = acts_.loss, .B = int(B), .T = int(T)}, stream_);
        k_.download(correct.data(), acts_.correct.data, acts_.correct.n_bytes(), stream_);
        const std::vector<double> loss = download_stat(k_, sums, stream_);
        for (uint64_t b = 0; b < B; b++) {
            double hits = 0;
            for (uint64_t t = 0; t < T; t++) hits += correct[b * T + t];
            mine[(round * B + b) * 2] = loss[b];
            mine[(round * B + b) * 2 + 1] = hits;
        }
    }
    std::vector<double> all(mine.size() * size);  // (size, rounds, B, 2)
    comm_.all_gather(mine.data(), all.data(), mine.size() * sizeof(double));
    double loss = 0, hits = 0;
    for (uint64_t i = 0; i < n_sequences; i++) {  // global sequence order, whatever the number of ranks
        const uint64_t batch_index = i / B;
        const double* row = &all[((batch_index % size * rounds + batch_index / size) * B + i % B) * 2];
        loss += row[0];
        hits += row[1];
    }
    const double tokens = double(n_sequences * T);
    return {.loss = loss / tokens, .accuracy = hits / tokens, .tokens = n_sequences * T};
}

std::vector<float> Trainer::next_logits(std::span<const int32_t> tokens) {
    const int n = int(tokens.size());
    CHECK_THAT(n >= 1 && n <= o_.model.T, "a context of {} tokens, expected 1 to {}", n, o_.model.T);
    // A context of n tokens needs less than the planned batch; every buffer is narrowed to its exact size.
    GPT2Acts acts;
    GPT2Acts planned = acts_;
    std::vector<Buf> views;
    visit_activations(planned, o_.model, o_.micro_batch_size, o_.model.T, o_.real, false,
                      [&](const std::string&, Buf& b, size_t, DType) { views.push_back(b); });
    size_t i = 0;
    visit_activations(acts, o_.model, 1, n, o_.real, false,
                      [&](const std::string&, Buf& b, size_t count, DType) { b = views[i++].slice(0, count); });
    const Buf inputs = inputs_.slice(0, size_t(n));
    k_.upload(inputs.data, tokens.data(), inputs.n_bytes(), stream_);
    gpt2_logits(k_, o_.model, params_, acts, {.inputs = inputs, .B = 1, .T = n}, false, stream_);
    const Buf last = acts.logits.slice(size_t(n - 1) * o_.model.Vp(), size_t(o_.model.V));
    const std::vector<double> d = download_stat(k_, last, stream_);
    return {d.begin(), d.end()};
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
std::vector<StateTensor> Trainer::parameters() { return list(params_, ""); }
std::vector<StateTensor> Trainer::moments() {
    std::vector<StateTensor> out = list(m_, "m.");
    if (o_.optimizer.kind != OptimizerKind::sgd)
        for (StateTensor& t : list(v_, "v.")) out.push_back(std::move(t));
    return out;
}
