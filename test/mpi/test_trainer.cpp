// A step on several ranks: each rank's gradient counts, and all ranks take the same decision.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "common/rng.h"
#include "model/gpt2.h"
#include "test/mpi/world.h"
#include "test/shown_gradient.h"
#include "trainer/trainer.h"

namespace {
constexpr int kSteps = 3;

struct Outcome {
    uint64_t weights, updates;
    std::vector<bool> updated;
};

// Three steps of a tiny model; every rank draws its own tokens.  `hook` sees the gradient of step `at` on the last rank
// only.
Outcome train(AllReduce reduction, const GradientHook& hook, int at = 0) {
    TrainerOptions o;
    o.model = {.architecture = &gpt2, .L = 1, .NH = 2, .C = 8, .T = 4, .V = 11, .bias = true, .dropout = 0.1f};
    o.train.micro_batch_size = 1;
    o.train.global_batch_size = 2 * world().size();
    o.train.grad_clip = 0, o.optimizer.weight_decay = 0;
    o.allreduce = reduction;
    o.seed = 5;
    int step = 0;
    const auto on_last_rank = [&](std::span<double> g) {
        if (hook && step == at && world().rank() == world().size() - 1) hook(g);
    };
    const Group group(cpu_backend(), world());
    Trainer trainer(group, o, show_gradient(on_last_rank));
    trainer.initialize();
    trainer.distribute_state();
    std::vector<int32_t> tokens(5);
    uint32_t n_read = 0;
    const auto next = [&]() -> Trainer::Tokens {
        for (size_t i = 0; i < tokens.size(); i++)
            tokens[i] = int32_t(philox(1, uint32_t(i), n_read, uint32_t(world().rank()), 0).v[0] % 11);
        n_read++;
        return {std::span(tokens).first(4), std::span(tokens).last(4)};
    };
    Outcome out{};
    for (; step < kSteps; step++) out.updated.push_back(trainer.step(step, 1e-2, next).updated);
    out.weights = trainer.weights_hash();
    out.updates = trainer.updates();
    CHECK(same_everywhere(&out.weights, sizeof out.weights));
    return out;
}

std::vector<AllReduce> reductions() {
    const bool power_of_two = (world().size() & (world().size() - 1)) == 0;
    return power_of_two ? std::vector{AllReduce::ordered, AllReduce::mpi, AllReduce::ring}
                        : std::vector{AllReduce::mpi, AllReduce::ring};
}
}  // namespace

// Seen to fail when the last rank's share is left out of the reduction.
TEST_CASE("a change of one rank's gradient changes every rank's weights alike") {
    for (AllReduce r : reductions()) {
        CAPTURE(int(r));
        const Outcome plain = train(r, {}), again = train(r, {});
        CHECK(plain.weights == again.weights);
        for (size_t n_changed : {size_t(1), size_t(0)}) {  // the first element only; all of them
            const Outcome other = train(r, [&](std::span<double> g) {
                for (double& x : g.first(n_changed ? n_changed : g.size())) x += 1e-3;
            });
            CHECK(other.weights != plain.weights);
        }
    }
}

TEST_CASE("NaN on one rank: all ranks skip that update, and the run goes on") {
    for (AllReduce r : reductions()) {
        CAPTURE(int(r));
        const Outcome plain = train(r, {});
        const Outcome out = train(
            r, [](std::span<double> g) { g[3] = std::numeric_limits<double>::quiet_NaN(); }, 1);
        CHECK(out.updated == std::vector<bool>{true, false, true});
        CHECK(out.updates == kSteps - 1);
        CHECK(out.weights != plain.weights);
    }
}
