#include "model/memory.h"

#include <algorithm>
#include <string_view>
#include <utility>

namespace {
// Reserve for memory outside the plan: libraries and graphs.
size_t usable(const MemoryState& now) { return now.n_free - std::min(now.n_free, now.n_total / 128); }

// Each arena begins on a boundary of Arena::kAlign.
size_t room_of(const Arena& a) { return (a.n_bytes() + Arena::kAlign - 1) / Arena::kAlign * Arena::kAlign; }
}  // namespace

Arena make_param_arena(const char* name, DType t) { return Arena(name, kDecayBlock * dtype_bytes(t)); }

void plan(Arena& arena, Tensors& tensors, const std::vector<ParamInfo>& list, DType t) {
    tensors.resize(list.size());
    for (size_t i = 0; i < list.size(); i++) arena.add(tensors[i], list[i].name, list[i].count(), t);
}

ModelMemory::ModelMemory(const ModelConfig& c, const ActivationShape& shape, WholeBuffers whole)
    : config(c),
      act_shape(shape),
      param_list(c.architecture->params(c)),
      param_arena(make_param_arena("parameters", shape.real)),
      master_arena(make_param_arena("master parameters", DType::f32)) {
    Arena all("all parameters", kDecayBlock);
    Tensors unused;
    plan(all, unused, param_list, DType::u8);
    n_params_ = all.n_bytes();
    if (whole.params) plan(param_arena, params, param_list, real());
    if (whole.masters && real() == DType::bf16) plan(master_arena, masters, param_list, DType::f32);
    arenas_ = {&param_arena, &master_arena};
    const std::vector<ActivationInfo> list = c.architecture->activations(c, shape);
    acts.resize(list.size());
    for (size_t i = 0; i < acts.size(); i++) act_arena.add(acts[i], list[i].name, list[i].count, list[i].dtype);
    scalar_arena.add(hash, "hash", 2, DType::u32);
}

size_t ModelMemory::n_bytes() const {
    size_t n = 0;
    for (const Arena* a : arenas_) n += room_of(*a);
    return n;
}

std::string ModelMemory::summary() const {
    std::vector<std::pair<std::string, size_t>> parts;
    for (const Arena* a : arenas_) {
        if (a->n_bytes() == 0) continue;
        if (parts.empty() || parts.back().first != a->name()) parts.emplace_back(a->name(), 0);
        parts.back().second += room_of(*a);
    }
    std::string out;
    for (const auto& [name, n] : parts) out += fmt::format("{}{} {}", out.empty() ? "" : ", ", name, human_bytes(n));
    return out;
}

std::string ModelMemory::table() const {
    std::string out, last;
    for (const Arena* a : arenas_) {
        if (a->n_bytes() == 0) continue;
        // A fold's further gradient buffers hold the same tensors: a line instead of a table.
        out +=
            a->name() == last ? fmt::format("{}, another buffer: {}\n", last, human_bytes(a->n_bytes())) : a->table();
        last = a->name();
    }
    return out;
}

void ModelMemory::require(const MemoryState& now, const std::function<std::string(size_t)>& what_fits) const {
    const size_t here = usable(now);
    if (now.n_total == 0 || n_bytes() <= here) return;
    const std::string fits = what_fits(here);
    const std::string advice =
        fits.empty() ? "no train.micro_batch_size fits: use a smaller model or more memory" : "what fits: " + fits;
    fail(
        Exit::memory,
        "out of memory before step 0: the plan takes {}, the device has {} of {} free, of which {} stay for libraries; "
        "{}\nThe plan was:\n{}",
        human_bytes(n_bytes()), human_bytes(now.n_free), human_bytes(now.n_total), human_bytes(now.n_free - here),
        advice, table());
}

void ModelMemory::allocate(const Backend& k, Stream s) {
    try {
        memory_.emplace(k, n_bytes());
    } catch (const Error& e) {
        if (e.code != Exit::memory) throw;
        fail(Exit::memory, "{}\nThe plan was:\n{}", e.what(), table());
    }
    auto* at = static_cast<char*>(memory_->get());
    for (Arena* a : arenas_) {
        if (a->n_bytes() == 0) continue;
        a->place(at, [&](void* p, size_t n) { k.zero(p, n, s); });
        at += room_of(*a);
    }
    const std::vector<ActivationInfo> list = config.architecture->activations(config, act_shape);
    const auto act = [&](const char* name) { return acts[activation_index(list, name)]; };
    logits = act("logits"), loss = act("loss"), correct = act("correct");
}

std::vector<StateTensor> ModelMemory::parameters() const {
    std::vector<StateTensor> out;
    for (size_t i = 0; i < param_list.size(); i++) out.push_back(state_tensor("", param_list[i], master_tensors()[i]));
    return out;
}

void ModelMemory::round_masters(const Backend& k, Stream s) {
    if (!has_masters()) return;
    k.cast({.y = flat_params(), .x = flat_masters()}, s);
    k.synchronize(s);
}

void ModelMemory::forward(const Pass& pass) const {
    if (!before_block) return config.architecture->forward(pass);
    for (int l = pass.first_layer; l < pass.end(); l++) {
        before_block(l, l + 1, pass.stream);
        Pass block = pass;
        block.first_layer = l, block.last_layer = l + 1;
        config.architecture->forward(block);
    }
}

uint64_t ModelMemory::weights_hash(const Backend& k, Stream s) {
    uint32_t halves[2];
    k.hash({.y = hash, .x = flat_masters()}, s);
    k.download(halves, hash.data, hash.n_bytes(), s);
    k.synchronize(s);
    return halves[0] | uint64_t(halves[1]) << 32;
}

std::string what_fits(int B, Recompute level, size_t n_bytes, const std::function<size_t(int B, Recompute)>& planned) {
    std::string out;
    int largest = 0;  // that fits at a cheaper level
    for (Recompute at : values_of<Recompute>()) {
        if (at < level) continue;
        for (int b = B; b > largest; b--) {
            const size_t needed = planned(b, at);
            if (needed == 0 || needed > n_bytes) continue;
            largest = b;
            out += fmt::format("{}train.micro_batch_size: {}{}", out.empty() ? "" : ", or ", b,
                               at == level ? "" : fmt::format(" with train.recompute: {}", word_of(at)));
            break;
        }
    }
    return out;
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
