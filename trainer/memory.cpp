#include "trainer/memory.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "comm/run_fold.h"

namespace {
void plan_params(Arena& arena, Tensors& p, const std::vector<ParamInfo>& list, DType t) {
    p.resize(list.size());
    for (size_t i = 0; i < list.size(); i++) arena.add(p[i], list[i].name, list[i].count(), t);
}

ActivationShape activation_shape(const TrainerOptions& o) {
    // A model that is only evaluated keeps nothing for a backward pass; GELU sees what it would in training.
    const bool keep_none = o.inference && o.recompute == Recompute::none;
    return {.B = o.micro_batch_size,
            .T = o.model.T,
            .real = o.real,
            .recompute = keep_none ? Recompute::block : o.recompute,
            .backward = !o.inference};
}

// Arenas that hold a number per parameter: a tensor begins at the same element in each, whatever its dtype, and no
// decay block straddles two tensors.
Arena make_param_arena(const char* name, DType t) { return Arena(name, kDecayBlock * dtype_bytes(t)); }

constexpr std::array kLevels = {Recompute::none, Recompute::gelu, Recompute::block};

// Left to what the plan does not name: libraries' growth, graphs.
size_t usable(const MemoryState& now) { return now.n_free - std::min(now.n_free, now.n_total / 128); }

// Bytes of the plan for these options, without the part that a GradientSync plans; 0 where the ranks could not share
// the batch so.
size_t planned_bytes(const TrainerOptions& o, int size) {
    try {
        const BatchShare share =
            batch_share(o.global_batch_size, o.micro_batch_size, 0, size, o.allreduce == AllReduce::ordered);
        return TrainerMemory(o, share.n_micro, RunFold(share.n_runs).n_buffers()).n_bytes();
    } catch (const Error&) { return 0; }
}

// "train.micro_batch_size: 8, or 16 with train.recompute: gelu": what fits into n_bytes; empty: nothing.
std::string proposal(TrainerOptions o, int size, size_t n_bytes) {
    std::string out;
    int largest = 0;  // that fits at a cheaper level
    for (Recompute level : kLevels) {
        if (level < o.recompute) continue;
        TrainerOptions changed = o;
        changed.recompute = level;
        for (int B = o.micro_batch_size; B > largest; B--) {
            if (o.global_batch_size % (int64_t(B) * size) != 0) continue;
            changed.micro_batch_size = B;
            const size_t needed = planned_bytes(changed, size);
            if (needed == 0 || needed > n_bytes) continue;
            largest = B;
            const bool same = level == o.recompute;
            out += fmt::format("{}train.micro_batch_size: {}{}", out.empty() ? "" : ", or ", B,
                               same ? "" : fmt::format(" with train.recompute: {}", word_of(level)));
            break;
        }
    }
    return out;
}
}  // namespace

StepBatch::StepBatch(const char* name, int n_micro, size_t BT) : arena(name) {
    const size_t n = size_t(n_micro) * BT;
    arena.add(inputs, "inputs", n, DType::i32);
    arena.add(targets, "targets", n, DType::i32);
    arena.add(order, "order", n, DType::i32);
    arena.add(where, "where", size_t(n_micro) * 2, DType::u32);
}

TrainerMemory::TrainerMemory(const TrainerOptions& options, int n_micro, int n_grads)
    : param_arena(make_param_arena("parameters", options.real)),
      master_arena(make_param_arena("master parameters", DType::f32)),
      moment_arena(make_param_arena("optimizer state", options.real == DType::f64 ? DType::f64 : DType::f32)),
      param_list(options.model.architecture->params(options.model)),
      act_shape(activation_shape(options)),
      batch("tokens of a step", n_micro, size_t(options.micro_batch_size) * options.model.T),
      staging("tokens of the next step", n_micro, size_t(options.micro_batch_size) * options.model.T),
      o_(options) {
    plan_params(param_arena, params, param_list, o_.real);
    if (has_masters()) plan_params(master_arena, masters, param_list, DType::f32);
    if (!o_.inference) {
        grads.resize(size_t(n_grads));
        grad_arenas.reserve(grads.size());
    }
    for (Tensors& g : grads)
        plan_params(grad_arenas.emplace_back(make_param_arena("gradients", stat())), g, param_list, stat());
    const std::vector<ActivationInfo> act_list = o_.model.architecture->activations(o_.model, act_shape);
    acts.resize(act_list.size());
    for (size_t i = 0; i < acts.size(); i++)
        act_arena.add(acts[i], act_list[i].name, act_list[i].count, act_list[i].dtype);
    scalar_arena.add(hash, "hash", 2, DType::u32);
    scalar_arena.add(losses, "losses", size_t(n_micro) * size_t(o_.micro_batch_size), stat());
    if (o_.inference) return;
    scalar_arena.add(clip, "clip", 1, stat());
    scalar_arena.add(norm, "norm", 1, stat());
    scalar_arena.add(norm_scratch, "norm_scratch", grad_norm_scratch(n_params()), stat());
}

std::vector<Arena*> TrainerMemory::arenas() {
    std::vector<Arena*> all = {&param_arena};
    if (has_masters()) all.push_back(&master_arena);
    for (Arena& a : grad_arenas) all.push_back(&a);
    all.insert(all.end(), {&moment_arena, &act_arena, &batch.arena, &staging.arena, &scalar_arena});
    return all;
}
std::vector<const Arena*> TrainerMemory::arenas() const {
    const std::vector<Arena*> all = const_cast<TrainerMemory*>(this)->arenas();
    return {all.begin(), all.end()};
}

namespace {
// Each arena begins on a boundary of Arena::kAlign.
size_t room_of(const Arena& a) { return (a.n_bytes() + Arena::kAlign - 1) / Arena::kAlign * Arena::kAlign; }
}  // namespace

size_t TrainerMemory::n_bytes() const {
    size_t n = 0;
    for (const Arena* a : arenas()) n += room_of(*a);
    return n;
}

std::string TrainerMemory::summary() const {
    std::vector<std::pair<std::string, size_t>> parts;
    for (const Arena* a : arenas()) {
        if (parts.empty() || parts.back().first != a->name()) parts.emplace_back(a->name(), 0);
        parts.back().second += room_of(*a);
    }
    std::string out;
    for (const auto& [name, n] : parts) out += fmt::format("{}{} {}", out.empty() ? "" : ", ", name, human_bytes(n));
    return out;
}

std::string TrainerMemory::table() const {
    std::string out;
    for (const Arena* a : arenas()) {
        // The fold's further gradient buffers hold the same tensors: a line instead of a table.
        const bool repeated = a->name() == "gradients" && a != &grad_arenas.front();
        out += repeated ? fmt::format("gradients, another buffer: {}\n", human_bytes(a->n_bytes())) : a->table();
    }
    return out;
}

void TrainerMemory::require(const MemoryState& now, int size) const {
    const size_t here = usable(now);
    if (now.n_total == 0 || n_bytes() <= here) return;
    const size_t planned = planned_bytes(o_, size), sync = n_bytes() - std::min(n_bytes(), planned);  // its part
    const std::string fits = proposal(o_, size, here - std::min(here, sync));
    const std::string advice =
        fits.empty() ? "no train.micro_batch_size fits: use a smaller model or more memory" : "what fits: " + fits;
    fail(
        Exit::memory,
        "out of memory before step 0: the plan takes {}, the device has {} of {} free, of which {} stay for libraries; "
        "{}\nThe plan was:\n{}",
        human_bytes(n_bytes()), human_bytes(now.n_free), human_bytes(now.n_total), human_bytes(now.n_free - here),
        advice, table());
}

void TrainerMemory::allocate(const Backend& k, Stream s) {
    try {
        memory_.emplace(k, n_bytes());
    } catch (const Error& e) {
        if (e.code != Exit::memory) throw;
        fail(Exit::memory, "{}\nThe plan was:\n{}", e.what(), table());
    }
    auto* at = static_cast<char*>(memory_->get());
    for (Arena* a : arenas()) {
        a->place(at, [&](void* p, size_t n) { k.zero(p, n, s); });
        at += room_of(*a);
    }
    const std::vector<ActivationInfo> act_list = o_.model.architecture->activations(o_.model, act_shape);
    const auto act = [&](const char* name) { return acts[activation_index(act_list, name)]; };
    logits = act("logits"), loss = act("loss"), correct = act("correct");
}

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
