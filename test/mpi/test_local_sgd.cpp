// Local SGD and DiLoCo beside a simulation of all workers, which each rank makes for itself from gathered replicas.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <optional>

#include "common/rng.h"
#include "model/gpt2.h"
#include "test/mpi/device_gradient.h"
#include "test/shown_gradient.h"
#include "trainer/local_sgd.h"
#include "trainer/trainer.h"

namespace {
constexpr int64_t kNever = 1000;  // steps between two exchanges

TrainerOptions options(int n_ranks, Config::Parallel parallel) {
    TrainerOptions o;
    o.model = {.architecture = &gpt2, .L = 2, .NH = 2, .C = 16, .T = 4, .V = 11};
    o.train.micro_batch_size = 1;
    o.train.global_batch_size = 2 * n_ranks;
    o.train.grad_clip = 1;
    parallel.method = ParallelMethod::diloco;
    o.parallel = parallel;
    o.allreduce = AllReduce::mpi;
    o.seed = 5;
    return o;
}

Config::Parallel diloco(int64_t interval, double rate, double momentum, OuterDtype dtype = OuterDtype::fp32,
                        bool streaming = false) {
    Config::Parallel p;
    p.sync_interval = interval;
    p.outer_learning_rate = rate, p.outer_momentum = momentum;
    p.outer_dtype = dtype, p.streaming = streaming;
    return p;
}

// A Trainer whose tokens are a function of rank, step and micro-batch.
class Worker {
  public:
    Worker(const Group& group, TrainerOptions o, const MakeGradientSync& make = make_gradient_sync,
           bool distributes = true)
        : k_(group.backend()), trainer(group, std::move(o), make) {
        trainer.initialize();
        if (distributes) trainer.distribute_state();
    }
    StepResult step(int64_t s) {
        uint32_t micro = 0;
        std::vector<int32_t> tokens(5);
        return trainer.step(s, 1e-2, [&]() -> Trainer::Tokens {
            for (uint32_t i = 0; i < 5; i++) {
                const Philox4 p = philox(uint64_t(s), i, micro, uint32_t(world().rank()), 0);
                tokens[i] = int32_t(p.v[0] % 11);
            }
            micro++;
            return {std::span(tokens).first(4), std::span(tokens).last(4)};
        });
    }
    std::vector<float> replica() { return download(trainer.memory().flat_masters()); }
    std::vector<float> moments() { return download(trainer.memory().flat_moments()); }
    void set_replica(const std::vector<float>& values) {
        const Buf masters = trainer.memory().flat_masters();
        k_.upload(masters.data, values.data(), masters.n_bytes(), trainer.stream());
        if (const Buf copy = trainer.memory().flat_copy()) k_.cast({.y = copy, .x = masters}, trainer.stream());
        k_.synchronize(trainer.stream());
    }
    // The outer parameters, by the way of an evaluation.
    std::vector<float> outer() {
        trainer.enter_evaluation();
        std::vector<float> values = replica();
        trainer.leave_evaluation();
        return values;
    }

  private:
    std::vector<float> download(const Buf& from) {
        std::vector<float> values(from.count);
        k_.download(values.data(), from.data, from.n_bytes(), trainer.stream());
        k_.synchronize(trainer.stream());
        return values;
    }
    const Backend& k_;

  public:
    Trainer trainer;
};

bool equal(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}
bool same_everywhere(const std::vector<float>& v) { return ::same_everywhere(v.data(), v.size() * sizeof(float)); }

// All workers and their exchanges, without messages: every rank simulates all of them.
class Simulated {
  public:
    Simulated(Config::Parallel p, std::vector<float> start)
        : p_(p), n_(start.size()), outer(std::move(start)), b_(n_), errors_(n_ranks() + 1, std::vector<float>(n_)) {}
    // Elements [first, end) of all replicas, at the time of their exchange.
    void exchange(const std::vector<std::vector<float>>& replicas, size_t first, size_t end) {
        const size_t shard = (end - first + n_ranks() - 1) / n_ranks();
        for (size_t i = first, owner = 0; i < end; i += shard, owner++)
            shard_step(replicas, i, std::min(shard, end - i), owner);
    }
    // The sum of the parts' elements i in the order of TreeSum.
    static float tree(const std::vector<std::vector<float>>& parts, size_t i, size_t from, size_t n) {
        if (n == 1) return parts[from][i];
        size_t left = 1;
        while (2 * left < n) left *= 2;  // the largest power of two below n
        return tree(parts, i, from, left) + tree(parts, i, from + left, n - left);
    }
    static size_t n_ranks() { return size_t(world().size()); }

  private:
    std::vector<float> sent(std::vector<float> x, std::vector<float>& error, size_t first) const {
        if (p_.outer_dtype == OuterDtype::fp32) return x;
        for (size_t i = 0; i < x.size(); i++) x[i] += error[first + i];
        std::vector<std::byte> packed(packed_bytes(p_.outer_dtype, x.size()));
        pack(p_.outer_dtype, x, packed.data());
        std::vector<float> y(x.size());
        unpack(p_.outer_dtype, packed.data(), y);
        for (size_t i = 0; i < x.size(); i++) error[first + i] = x[i] - y[i];
        return y;
    }
    void shard_step(const std::vector<std::vector<float>>& replicas, size_t first, size_t n, size_t owner) {
        const bool packed = p_.outer_dtype != OuterDtype::fp32;
        std::vector<std::vector<float>> parts;
        for (size_t r = 0; r < n_ranks(); r++) {
            std::vector<float> x(n);
            for (size_t i = 0; i < n; i++)
                x[i] = packed ? outer[first + i] - replicas[r][first + i] : replicas[r][first + i];
            parts.push_back(r == owner ? x : sent(x, errors_[r], first));
        }
        std::vector<float> mean(n);
        for (size_t i = 0; i < n; i++) mean[i] = tree(parts, i, 0, n_ranks()) / float(n_ranks());
        mean = sent(mean, errors_[n_ranks()], first);
        for (size_t i = 0; packed && i < n; i++) mean[i] = outer[first + i] - mean[i];
        const OuterRule rule{float(p_.outer_learning_rate), float(p_.outer_momentum)};
        outer_update(rule, {outer.data() + first, n}, {b_.data() + first, n}, mean);
    }
    const Config::Parallel p_;
    const size_t n_;

  public:
    std::vector<float> outer;

  private:
    std::vector<float> b_;
    std::vector<std::vector<float>> errors_;  // (ranks + 1, n): of each rank's numbers, then of the means
};

std::vector<std::vector<float>> gathered(const std::vector<float>& mine) {
    std::vector<float> all(mine.size() * Simulated::n_ranks());
    world().all_gather(mine.data(), all.data(), mine.size() * sizeof(float));
    std::vector<std::vector<float>> parts;
    for (size_t r = 0; r < Simulated::n_ranks(); r++)
        parts.emplace_back(all.begin() + ptrdiff_t(r * mine.size()), all.begin() + ptrdiff_t((r + 1) * mine.size()));
    return parts;
}

// Runs `n_steps` of a worker beside one that never exchanges, for which the simulation does it; all bits are compared
// after every step.
void compare(const Group& group, Config::Parallel p, int64_t n_steps, DType real = DType::f32) {
    TrainerOptions o = options(world().size(), p), alone = options(world().size(), diloco(kNever, 1, 0));
    o.real = alone.real = real;
    Worker worker(group, o), other(group, alone);
    Simulated all(p, other.replica());
    const size_t n = all.outer.size(), blocks = n / kDecayBlock;
    const int64_t H = p.sync_interval, F = p.streaming ? std::min<int64_t>(8, H) : 1;
    const auto cut = [&](int64_t f) { return f == F ? n : blocks * size_t(f) / size_t(F) * kDecayBlock; };
    for (int64_t s = 0; s < n_steps; s++) {
        std::optional<int64_t> sent;  // fragment
        for (int64_t f = 0; f < F; f++)
            if (p.streaming && s > 0 && s % H == f * H / F) sent = f;
        if (sent) all.exchange(gathered(other.replica()), cut(*sent), cut(*sent + 1));
        worker.step(s);
        other.step(s);
        std::vector<float> replica = other.replica();
        if (sent)
            for (size_t i = cut(*sent); i < cut(*sent + 1); i++) replica[i] = (replica[i] + all.outer[i]) / 2;
        const bool due = !p.streaming && (s + 1) % H == 0;
        if (due) {
            all.exchange(gathered(replica), 0, n);
            replica = all.outer;
        }
        other.set_replica(replica);
        CAPTURE(s);
        CHECK(equal(worker.replica(), replica));
        CHECK(equal(worker.outer(), all.outer));
        CHECK(same_everywhere(worker.outer()));
        if (due) CHECK(same_everywhere(worker.replica()));
    }
}
}  // namespace

TEST_CASE("rank mean: all ranks get the same bits, a mean within its roundings") {
    const size_t n = 3 * kInt4Block + 17;
    for (OuterDtype t : values_of<OuterDtype>()) {
        CAPTURE(word_of(t));
        std::vector<float> x = my_addends(n);
        RankMean(world(), t).mean(x, {});
        CHECK(same_everywhere(x));
        size_t n_wrong = 0;
        const double step = t == OuterDtype::fp32 ? std::exp2(-22) : t == OuterDtype::bf16 ? std::exp2(-8) : 1.01 / 14;
        for (size_t i = 0; i < n; i++) {
            double sum = 0;
            for (int r = 0; r < world().size(); r++) sum += addend(r, i);
            // Twice half a step of the largest number there is, 2^18.
            n_wrong += !(std::abs(x[i] - sum / world().size()) <= 2 * step * std::exp2(18));
        }
        CHECK(n_wrong == 0);
    }
}

// Seen to fail with: a gradient that is not scaled by the number of ranks.
TEST_CASE("local sgd: between exchanges a worker is a run of one rank on its share") {
    const Group group(cpu_backend(), world()), self(cpu_backend());
    TrainerOptions one = options(1, {});
    one.parallel.method = ParallelMethod::allreduce;
    Worker worker(group, options(world().size(), diloco(kNever, 1, 0))), alone(self, one);
    for (int64_t s = 0; s < 3; s++) {
        const StepResult a = worker.step(s), b = alone.step(s);
        CHECK(a.grad_norm == b.grad_norm);
        CHECK(equal(worker.replica(), alone.replica()));
    }
    if (world().size() > 1) CHECK(!same_everywhere(worker.replica()));
}

// Seen to fail with: outer parameters that are not those of the last exchange; a product by 1 / ranks on 3 ranks.
TEST_CASE("local sgd: H = 1, outer rate 1 and no momentum average the parameters, bit for bit") {
    const Group group(cpu_backend(), world());
    Worker worker(group, options(world().size(), diloco(1, 1, 0))),
        other(group, options(world().size(), diloco(kNever, 1, 0)));
    for (int64_t s = 0; s < 4; s++) {
        worker.step(s);
        other.step(s);
        const auto replicas = gathered(other.replica());
        std::vector<float> mean(replicas[0].size());
        for (size_t i = 0; i < mean.size(); i++)
            mean[i] = Simulated::tree(replicas, i, 0, replicas.size()) / float(replicas.size());
        CHECK(equal(worker.replica(), mean));
        CHECK(equal(worker.outer(), mean));
        other.set_replica(mean);
    }
}

// Seen to fail with: momentum that is not kept from one exchange to the next; fragment 2 never sent; the replica replaced
// by the fragment and not averaged with it; the errors of a rank's own numbers, or of its means, dropped.
TEST_CASE("local sgd: exchanges are those of the simulation, bit for bit") {
    for (OuterDtype t : values_of<OuterDtype>())
        for (bool streaming : {false, true}) {
            CAPTURE(word_of(t));
            CAPTURE(streaming);
            compare(Group(cpu_backend(), world()), diloco(4, 0.7, 0.9, t, streaming), 10);
        }
}

// Seen to fail with: bf16 parameters that are not rounded anew after an exchange.
TEST_CASE("local sgd: an emulated GPU exchanges as the simulation does") {
    if (!gpu() || world().size() > 3) return;
    const Group group(*gpu(), world());
    compare(group, diloco(1, 1, 0), 2);
    for (DType real : {DType::f32, DType::bf16})
        compare(group, diloco(2, 0.7, 0.9, OuterDtype::int4, real == DType::bf16), 4, real);
}

TEST_CASE("local sgd: keys that are for gradients are refused") {
    const Group group(cpu_backend(), world());
    TrainerOptions zero = options(world().size(), {}), overlap = zero;
    zero.parallel.zero = 1, overlap.parallel.overlap = true;
    for (const TrainerOptions& o : {zero, overlap})
        CHECK_THROWS_WITH_AS(Trainer(group, o), doctest::Contains("diloco does not send"), Error);
}

// A gradient that is not finite on one rank: no rank updates, and all say so.
// Seen to fail with: each rank's own norm alone.
TEST_CASE("local sgd: NaN on one rank, and all ranks skip that update") {
    int step = 0;
    const auto make = [&](const Group& all, const TrainerOptions& o, TrainerMemory& memory) {
        return std::make_unique<ShownGradient>(all.backend(), memory, make_local_sgd(all, o, memory),
                                               [&](std::span<double> g) {
                                                   if (step == 1 && world().rank() == world().size() - 1)
                                                       g[3] = std::numeric_limits<double>::quiet_NaN();
                                               });
    };
    const Group group(cpu_backend(), world());
    Worker worker(group, options(world().size(), diloco(kNever, 1, 0)), make);
    std::vector<float> before;
    for (; step < 3; step++) {
        const StepResult r = worker.step(step);
        CHECK(r.updated == (step != 1));
        CHECK(std::isfinite(r.grad_norm) == (step != 1));
        if (step == 1) CHECK(equal(worker.replica(), before));
        before = worker.replica();
    }
    CHECK(worker.trainer.updates() == 2);
}

namespace {
// A checkpoint in memory: rank 0 has the tensors, all ranks the number of updates.
struct Saved {
    std::map<std::string, std::vector<float>> parameters, state;
    uint64_t updates = 0;
    std::vector<std::string> names() const {
        std::vector<std::string> out;
        for (const auto& [name, values] : state) out.push_back(name);
        return out;
    }
};
Saved save(Trainer& trainer) {
    Saved saved{.updates = trainer.updates()};
    trainer.collect_state();
    if (world().rank() > 0) return saved;
    for (const StateTensor& t : trainer.parameters())
        saved.parameters[t.name].assign(t.data.as<float>(), t.data.as<float>() + t.data.count);
    for (const StateTensor& t : trainer.moments())
        saved.state[t.name].assign(t.data.as<float>(), t.data.as<float>() + t.data.count);
    return saved;
}
// On the CPU, whose memory the host writes.  Returns what accept() says, on rank 0.
std::string load(Trainer& trainer, const Saved& saved, bool root) {
    std::string why;
    if (root) {
        why = trainer.accept(saved.names());
        for (const StateTensor& t : trainer.parameters())
            std::ranges::copy(saved.parameters.at(t.name), t.data.as<float>());
        for (const StateTensor& t : trainer.moments()) std::ranges::copy(saved.state.at(t.name), t.data.as<float>());
        trainer.set_updates(saved.updates);
    }
    trainer.distribute_state();
    return why;
}
}  // namespace

// Seen to fail with: errors not saved; the state of worker 0 for all.
TEST_CASE("local sgd: a run that is resumed in the middle of an interval has the bits of one that was not") {
    const Group group(cpu_backend(), world());
    for (OuterDtype t : {OuterDtype::fp32, OuterDtype::int4})
        for (bool streaming : {false, true}) {
            CAPTURE(word_of(t));
            CAPTURE(streaming);
            const TrainerOptions o = options(world().size(), diloco(4, 0.7, 0.9, t, streaming));
            Worker straight(group, o);
            for (int64_t s = 0; s < 6; s++) straight.step(s);
            const Saved saved = save(straight.trainer);
            Worker resumed(group, o, make_gradient_sync, false);
            CHECK(load(resumed.trainer, saved, world().rank() == 0).empty());
            CHECK(resumed.trainer.updates() == 6);
            for (int64_t s = 6; s < 11; s++) {  // the next exchange is due in steps 6 (streaming) and 7
                straight.step(s);
                resumed.step(s);
                CHECK(equal(resumed.replica(), straight.replica()));
                CHECK(equal(resumed.outer(), straight.outer()));
                CHECK(equal(resumed.moments(), straight.moments()));
            }
        }
}

TEST_CASE("local sgd: other numbers of ranks and other methods go on from the outer parameters") {
    const Group group(cpu_backend(), world()), self(cpu_backend());
    const TrainerOptions o = options(world().size(), diloco(4, 0.7, 0.9, OuterDtype::int4));
    Worker worker(group, o);
    for (int64_t s = 0; s < 6; s++) worker.step(s);
    const Saved saved = save(worker.trainer);
    if (world().size() == 1) return;
    const std::vector<float> outer = worker.outer(), moments = worker.moments();
    if (world().rank() == 0) {
        TrainerOptions one = options(1, diloco(4, 0.7, 0.9, OuterDtype::int4));
        Worker alone(self, one, make_gradient_sync, false);
        const std::string why = load(alone.trainer, saved, true);
        CHECK(why.find(fmt::format("{} worker(s) were saved, 1 rank(s) go on", world().size())) != std::string::npos);
        CHECK(equal(alone.replica(), outer));
        CHECK(equal(alone.moments(), moments));
        CHECK(alone.step(6).updated);

        one.parallel.method = ParallelMethod::allreduce;
        Worker plain(self, one, make_gradient_sync, false);
        CHECK(load(plain.trainer, saved, true).empty());
        CHECK(equal(plain.replica(), outer));
        CHECK(equal(plain.moments(), moments));
        CHECK(plain.step(6).updated);
    }
    // After method: allreduce, all workers begin at its parameters with its moments.
    TrainerOptions before = o;
    before.parallel.method = ParallelMethod::allreduce;
    Worker plain(group, before);
    for (int64_t s = 0; s < 2; s++) plain.step(s);
    Worker after(group, o, make_gradient_sync, false);
    CHECK(load(after.trainer, save(plain.trainer), world().rank() == 0).empty());
    CHECK(equal(after.replica(), plain.replica()));
    CHECK(equal(after.outer(), plain.replica()));
    CHECK(equal(after.moments(), plain.moments()));
}
