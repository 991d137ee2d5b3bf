// The equivalence matrix: every way of sharing the work of a step gives what one rank with all the memory computes.
//
// A row of kWays is a way.  For each the losses, the gradients of all parameters and the logits after five steps are
// compared with those of one rank: bit for bit where the order of sums is fixed, else within a bound.  A gradient is
// read from the optimizer's state: SGD without momentum keeps it as its moment, so it is seen wherever it is summed.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <array>
#include <functional>
#include <optional>

#include "common/rng.h"
#include "model/gpt2.h"
#include "test/decorated_sync.h"
#include "test/mpi/device_gradient.h"
#include "trainer/trainer.h"

namespace {
constexpr int kSteps = 5;
constexpr double kUnit = 0x1p-24;  // of fp32

struct Way {
    const char* name;
    AllReduce allreduce;
    std::function<void(TrainerOptions&)> change;
    bool has_bits_of_one_rank;
    int micro_batches = 4;  // of a step on all ranks; 0: one for each rank
};
void nothing(TrainerOptions&) {}
std::function<void(TrainerOptions&)> overlapped(size_t bucket_bytes) {
    return [=](TrainerOptions& o) { o.parallel.overlap = true, o.bucket_bytes = bucket_bytes; };
}
// Seen to fail with: a bucket that is not summed; a bucket that begins a block too late; join() left out; in ZeRO a row
// that is not summed, a shard that is updated twice, a row's upper part that is not handed down, a slot that is not
// cleared, a block that does not wait for its parameters.
void in_bf16(TrainerOptions& o) { o.parallel.reduce_dtype = Precision::bf16; }
std::function<void(TrainerOptions&)> zero(int stage, bool overlap = false) {
    return [=](TrainerOptions& o) { o.parallel.zero = stage, o.parallel.overlap = overlap; };
}
const Way kWays[] = {
    {"ordered", AllReduce::ordered, nothing, true},
    {"ordered, a bucket per block", AllReduce::ordered, overlapped(1), true},
    {"ordered, two blocks in a bucket", AllReduce::ordered, overlapped(size_t(300) << 10), true},
    {"ordered, one bucket", AllReduce::ordered, overlapped(size_t(1) << 30), true},
    {"mpi", AllReduce::mpi, nothing, false, 0},
    {"mpi, a bucket per block", AllReduce::mpi, overlapped(1), false, 0},
    {"ring", AllReduce::ring, nothing, false, 0},
    {"ring, a bucket per block", AllReduce::ring, overlapped(1), false, 0},
    {"nccl", AllReduce::nccl, nothing, false, 0},
    {"nccl, a bucket per block", AllReduce::nccl, overlapped(1), false, 0},
    {"ordered in bf16", AllReduce::ordered, in_bf16, false, 0},
    {"ring in bf16", AllReduce::ring, in_bf16, false, 0},
    {"ordered, ZeRO-1", AllReduce::ordered, zero(1), true},
    {"ordered, ZeRO-1, overlapped", AllReduce::ordered, zero(1, true), true},
    {"ordered, ZeRO-2", AllReduce::ordered, zero(2), true, 0},
    {"ordered, ZeRO-2, overlapped", AllReduce::ordered, zero(2, true), true, 0},
    {"ordered, ZeRO-3", AllReduce::ordered, zero(3), true, 0},
    {"ordered, ZeRO-3, overlapped", AllReduce::ordered, zero(3, true), true, 0},
    {"mpi, ZeRO-1", AllReduce::mpi, zero(1), false, 0},
    {"mpi, ZeRO-3", AllReduce::mpi, zero(3), false, 0},
    {"ring, ZeRO-1", AllReduce::ring, zero(1), false, 0},
    {"ring, ZeRO-2", AllReduce::ring, zero(2), false, 0},
    {"ring, ZeRO-3, overlapped", AllReduce::ring, zero(3, true), false, 0},
    {"nccl, ZeRO-1", AllReduce::nccl, zero(1), false, 0},
    {"nccl, ZeRO-2, overlapped", AllReduce::nccl, zero(2, true), false, 0},
    {"nccl, ZeRO-3", AllReduce::nccl, zero(3), false, 0},
};

// The ranks of a way: the CPU, GPUs that reduce through host memory, or GPUs with NCCL between them.
struct Carrier {
    const char* name;
    const Backend* k;
    bool by_nccl;
    DType real;
};
std::vector<Carrier> carriers() {
    std::vector<Carrier> all = {{"cpu", &cpu_backend(), false, DType::f32}};
    if (gpu()) all.push_back({"gpu through host memory", gpu(), false, DType::f32});
    if (own_gpus() && world().size() > 1) all.push_back({"gpu by nccl", gpu(), true, DType::bf16});
    return all;
}
bool sends_bf16(const Way& way) {
    TrainerOptions o;
    way.change(o);
    return o.parallel.reduce_dtype == Precision::bf16;
}
bool runs_on(const Way& way, const Carrier& carrier) {
    if (carrier.by_nccl && sends_bf16(way)) return false;
    const bool power_of_two = (world().size() & (world().size() - 1)) == 0;
    switch (way.allreduce) {
        case AllReduce::ordered:
            return power_of_two;
        case AllReduce::nccl:
            return carrier.by_nccl;
        case AllReduce::mpi:
        case AllReduce::ring:
            return !carrier.by_nccl;
    }
    return false;
}

TrainerOptions options(const Way& way, DType real) {
    TrainerOptions o;
    o.model = {.architecture = &gpt2, .L = 3, .NH = 2, .C = 48, .T = 4, .V = 1250, .bias = true};
    // The place of a micro-batch in the global batch selects its dropout masks.
    o.model.dropout = way.has_bits_of_one_rank ? 0.1f : 0.0f;
    o.train.micro_batch_size = 1;
    o.train.global_batch_size = way.micro_batches ? way.micro_batches : world().size();
    o.train.grad_clip = 0;
    o.optimizer.name = OptimizerKind::sgd;
    o.optimizer.weight_decay = 0;
    o.allreduce = way.allreduce;
    o.seed = 5;
    o.real = real;
    way.change(o);
    return o;
}

struct Outcome {                  // of rank 0
    std::vector<double> losses;   // (kSteps)
    std::vector<double> norms;    // (kSteps) of the gradient
    std::vector<float> gradient;  // (kSteps, n) of all parameters
    std::vector<float> logits;    // (V) of a prompt, after the last step
    // (n) of the ranks' gradients in the first step, before any reduction: their sum, and the sum of their magnitudes.
    std::vector<double> sum, magnitude;
};

std::vector<float> values_of(const Backend& k, const std::vector<StateTensor>& state) {
    std::vector<float> all;
    for (const StateTensor& t : state) {
        std::vector<float> values(t.data.count);
        if (t.on_host)
            std::memcpy(values.data(), t.data.data, t.data.n_bytes());
        else
            k.download(values.data(), t.data.data, t.data.n_bytes(), nullptr);
        k.synchronize(nullptr);
        all.insert(all.end(), values.begin(), values.end());
    }
    return all;
}

// Micro-batch `i` of the run, on whichever rank it is.
std::array<int32_t, 5> tokens_of(uint32_t i) {
    std::array<int32_t, 5> tokens;
    for (uint32_t t = 0; t < tokens.size(); t++) tokens[t] = int32_t(philox(1, t, i, 0, 0).v[0] % 1250);
    return tokens;
}

void run_into(Outcome& out, const Group& group, const TrainerOptions& o) {
    Trainer trainer(group, o);
    if (group.rank() == 0) trainer.initialize();
    trainer.distribute_state();
    const uint32_t per_step = uint32_t(o.train.global_batch_size), first = uint32_t(trainer.share().first_micro);
    for (int step = 0; step < kSteps; step++) {
        uint32_t place = uint32_t(step) * per_step + first;
        std::array<int32_t, 5> tokens{};
        const auto next = [&]() -> Trainer::Tokens {
            tokens = tokens_of(place++);
            return {std::span(tokens).first(4), std::span(tokens).last(4)};
        };
        const StepResult r = trainer.step(step, 0.5, next);
        CHECK(r.updated);
        out.losses.push_back(r.loss);
        out.norms.push_back(r.grad_norm);
        trainer.collect_state();
        if (group.rank() > 0) continue;
        const std::vector<float> gradient = values_of(group.backend(), trainer.moments());
        out.gradient.insert(out.gradient.end(), gradient.begin(), gradient.end());
    }
    trainer.enter_evaluation();
    const int32_t prompt[] = {3, 1, 4};
    out.logits = trainer.session().next_logits(prompt);
    trainer.leave_evaluation();
}

// Keeps the gradient of this rank alone, in the first step.
class Addend final : public DecoratedSync {
  public:
    Addend(std::unique_ptr<GradientSync> inner, const Backend& k, const TrainerMemory& memory, std::vector<float>& out)
        : DecoratedSync(std::move(inner)), k_(k), memory_(memory), out_(out) {}
    void finish_step(StepGraphs& graphs, Stream s) override {
        const Buf gradient = memory_.gradient();  // (n)
        out_.resize(gradient.count);
        k_.download(out_.data(), gradient.data, gradient.n_bytes(), s);
        DecoratedSync::finish_step(graphs, s);
    }

  private:
    const Backend& k_;
    const TrainerMemory& memory_;
    std::vector<float>& out_;
};

// Each rank's gradient of the first step, before it is summed by one call; on rank 0 their sum and that of their
// magnitudes, in the order of the moments.
void add_addends(Outcome& out, const Group& group, TrainerOptions o) {
    o.parallel = {};
    o.graph = UseGraph::off;  // a recorded step cannot be looked into
    std::vector<float> mine, all;
    Trainer trainer(group, o, [&](const Group& g, const TrainerOptions& options, TrainerMemory& memory) {
        return std::make_unique<Addend>(make_gradient_sync(g, options, memory), g.backend(), memory, mine);
    });
    trainer.initialize();
    std::array<int32_t, 5> tokens = tokens_of(uint32_t(group.rank()));
    trainer.step(0, 0.5, [&]() -> Trainer::Tokens { return {std::span(tokens).first(4), std::span(tokens).last(4)}; });
    all.resize(mine.size() * size_t(group.size()));
    group.host().all_gather(mine.data(), all.data(), mine.size() * sizeof(float));
    for (const FlatParam& p : flat_params(trainer.memory().param_list))
        for (size_t i = p.range.first; i < p.range.first + p.info.count_saved(); i++) {
            double sum = 0, magnitude = 0;
            for (size_t r = 0; r < size_t(group.size()); r++) {
                sum += double(all[r * mine.size() + i]);
                magnitude += std::abs(double(all[r * mine.size() + i]));
            }
            out.sum.push_back(sum), out.magnitude.push_back(magnitude);
        }
}

// The outcome of one rank, kept for the ways that share its options.  All ranks call this function, for the addends.
const Outcome& one_rank(const Group& group, const Carrier& carrier, const Way& way) {
    struct Known {
        const Backend* k;
        DType real;
        int micro_batches;
        bool bits;
        Outcome outcome;
    };
    static std::vector<Known> known;
    for (const Known& each : known)
        if (each.k == carrier.k && each.real == carrier.real && each.micro_batches == way.micro_batches &&
            each.bits == way.has_bits_of_one_rank)
            return each.outcome;
    TrainerOptions o = options(way, carrier.real);
    Known now{carrier.k, carrier.real, way.micro_batches, way.has_bits_of_one_rank, {}};
    if (!now.bits) add_addends(now.outcome, group, o);
    o.allreduce = AllReduce::ordered, o.parallel = {};
    const Group self(*carrier.k);
    if (group.rank() == 0) run_into(now.outcome, self, o);
    return known.emplace_back(std::move(now)).outcome;
}

void compare(const Outcome& got, const Outcome& want, const Way& way) {
    REQUIRE(got.gradient.size() == want.gradient.size());
    if (way.has_bits_of_one_rank) {
        CHECK(got.losses == want.losses);
        CHECK(got.norms == want.norms);
        CHECK(std::memcmp(got.gradient.data(), want.gradient.data(), want.gradient.size() * sizeof(float)) == 0);
        CHECK(got.logits == want.logits);
        return;
    }
    // The sum of M addends in any order is off by at most M - 1 roundings of the sum of their magnitudes.  On the wire
    // in bf16 each partial sum may be rounded (comm/all_reduce.h), and the result.
    const size_t n = want.sum.size(), M = size_t(world().size());
    const bool bf16 = sends_bf16(way);
    const double bound = double(M - 1) * kUnit + (bf16 ? double(M) * 0x1p-8 * std::pow(1 + 0x1p-8, double(M)) : 0);
    double worst = 0;
    for (size_t i = 0; i < n; i++)
        worst = std::max(worst, std::abs(double(got.gradient[i]) - want.sum[i]) / (bound * want.magnitude[i] + 1e-30));
    CHECK(worst <= 1);
    // Later steps begin with parameters that differ by less than a unit of the largest.  In bf16 a parameter may then
    // round to its neighbour, 2^-8 away, and a gradient on the wire is that far off.
    const double off = bf16 || way.allreduce == AllReduce::nccl ? double(M) * 0x1p-8 : 64 * kUnit;
    for (size_t s = 0; s < got.losses.size(); s++) {
        CHECK(std::abs(got.losses[s] - want.losses[s]) < off * want.losses[s]);
        CHECK(std::abs(got.norms[s] - want.norms[s]) < off * want.norms[s]);
    }
    double largest = 0, apart = 0;
    for (size_t i = 0; i < want.logits.size(); i++) {
        largest = std::max(largest, std::abs(double(want.logits[i])));
        apart = std::max(apart, std::abs(double(got.logits[i]) - double(want.logits[i])));
    }
    CHECK(apart <= off * largest);
}
}  // namespace

TEST_CASE("equivalence: every way of sharing a step computes what one rank does") {
    for (const Carrier& carrier : carriers()) {
        std::optional<Group> group;
        if (carrier.by_nccl)
            group.emplace(nccl_group(60));
        else
            group.emplace(*carrier.k, world());
        for (const Way& way : kWays) {
            if (!runs_on(way, carrier)) continue;
            CAPTURE(carrier.name);
            CAPTURE(way.name);
            Outcome got;
            run_into(got, *group, options(way, carrier.real));
            const Outcome& want = one_rank(*group, carrier, way);
            if (world().rank() == 0) compare(got, want, way);
            world().barrier();
        }
    }
}
