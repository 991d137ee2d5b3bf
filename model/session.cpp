#include "model/session.h"

#include <algorithm>

namespace {
// A model that only runs forward keeps nothing for a backward pass; its GELU sees what it does in training.
ActivationShape forward_only(ActivationShape shape) {
    if (shape.recompute == Recompute::none) shape.recompute = Recompute::block;
    shape.backward = false;
    return shape;
}

class SessionMemory : public ModelMemory {
  public:
    SessionMemory(const ModelConfig& c, const ActivationShape& shape) : ModelMemory(c, forward_only(shape)) {
        const size_t BT = size_t(shape.B) * shape.T;
        token_arena_.add(inputs, "inputs", BT, DType::i32);
        token_arena_.add(targets, "targets", BT, DType::i32);
        scalar_arena.add(losses, "losses", size_t(shape.B), stat());
        arenas_.insert(arenas_.end(), {&act_arena, &token_arena_, &scalar_arena});
    }
    Buf inputs, targets;  // (B, T) i32
    Buf losses;           // (B) stat

  private:
    Arena token_arena_{"tokens of a batch"};
};

// A buffer of the backend as doubles.
std::vector<double> download(const Backend& k, const Buf& b, Stream s) {
    std::vector<char> raw(b.n_bytes());
    k.download(raw.data(), b.data, b.n_bytes(), s);
    k.synchronize(s);
    return as_doubles(Buf(raw.data(), b.count, b.dtype));
}
}  // namespace

struct Session::Own {
    SessionMemory memory;
    StreamOwner stream;
    Own(const Backend& k, const ModelConfig& c, const ActivationShape& shape) : memory(c, shape), stream(k) {
        // The config's micro-batch is cut into equal parts, or its global batch would no longer be a multiple of it.
        const auto planned = [&](int B, Recompute level) {
            ActivationShape changed = shape;
            changed.B = B, changed.recompute = level;
            return shape.B % B == 0 ? SessionMemory(c, changed).n_bytes() : 0;
        };
        k.take_workspace(stream.get());  // before the plan is held against what is free
        memory.require(k.memory_state(), [&](size_t n) { return what_fits(shape.B, shape.recompute, n, planned); });
        memory.allocate(k, stream.get());
        k.synchronize(stream.get());
    }
};

Session::Session(const Backend& k, const ModelConfig& c, const ActivationShape& shape) : k_(k) {
    c.architecture->check(c, shape.real);
    own_ = std::make_unique<Own>(k, c, shape);
    memory_ = &own_->memory;
    inputs_ = own_->memory.inputs, targets_ = own_->memory.targets, losses_ = own_->memory.losses;
    stream_ = own_->stream.get();
}

Session::Session(const Backend& k, ModelMemory& memory, Buf inputs, Buf targets, Buf losses, Stream s)
    : k_(k), memory_(&memory), inputs_(inputs), targets_(targets), losses_(losses), stream_(s) {}

Session::~Session() = default;

std::vector<float> Session::next_logits(std::span<const int32_t> tokens) {
    const ModelConfig& c = config();
    const int n = int(tokens.size());
    CHECK_THAT(n >= 1 && n <= shape().T, "a context of {} tokens, expected 1 to {}", n, shape().T);
    // A context of n tokens needs less than the planned batch; every buffer is narrowed to its exact size.
    ActivationShape narrow = shape();
    narrow.B = 1, narrow.T = n;
    const std::vector<ActivationInfo> list = c.architecture->activations(c, narrow);
    Tensors acts = memory_->acts;
    for (size_t i = 0; i < acts.size(); i++) acts[i] = acts[i].slice(0, list[i].count);
    const Buf inputs = inputs_.slice(0, size_t(n));  // (1, n)
    k_.upload(inputs.data, tokens.data(), inputs.n_bytes(), stream_);
    memory_->forward({.k = k_,
                      .config = c,
                      .params = memory_->params,
                      .acts = acts,
                      .batch = {.inputs = inputs, .B = 1, .T = n},
                      .recompute = narrow.recompute,
                      .stream = stream_});
    const Buf last = memory_->logits.slice(size_t(n - 1) * size_t(c.Vp()), size_t(c.V));  // (V)
    const std::vector<double> logits = download(k_, last, stream_);
    return {logits.begin(), logits.end()};
}

std::vector<Session::Score> Session::score(std::span<const int32_t> inputs, std::span<const int32_t> targets) {
    const int B = shape().B, T = shape().T;
    const size_t BT = size_t(B) * T;
    CHECK_THAT(inputs.size() == BT && targets.size() == BT, "{} inputs and {} targets, expected B*T = {}",
               inputs.size(), targets.size(), BT);
    k_.upload(inputs_.data, inputs.data(), inputs_.n_bytes(), stream_);
    k_.upload(targets_.data, targets.data(), targets_.n_bytes(), stream_);
    memory_->forward({.k = k_,
                      .config = config(),
                      .params = memory_->params,
                      .acts = memory_->acts,
                      .batch = {.inputs = inputs_, .targets = targets_, .B = B, .T = T},
                      .recompute = shape().recompute,
                      .stream = stream_});
    k_.row_sum({.y = losses_, .x = memory_->loss, .B = B, .T = T}, stream_);
    std::vector<int32_t> correct(BT);  // (B, T)
    k_.download(correct.data(), memory_->correct.data, memory_->correct.n_bytes(), stream_);
    const std::vector<double> loss = download(k_, losses_, stream_);  // (B)
    std::vector<Score> scores(loss.size());
    for (size_t b = 0; b < scores.size(); b++) {
        scores[b].loss = loss[b];
        for (size_t t = 0; t < size_t(T); t++) scores[b].correct += correct[b * size_t(T) + t];
    }
    return scores;
}
