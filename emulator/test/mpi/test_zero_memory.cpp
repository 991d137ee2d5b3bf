// ZeRO-3 on emulated GPUs that are too small for the model: four train it together.
#include <cuda_emulator_host.h>
#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <array>
#include <vector>

#include "common/rng.h"
#include "model/gpt2.h"
#include "test/mpi/device_gradient.h"
#include "trainer/trainer.h"

namespace {
constexpr int kSteps = 2, kT = 4, kV = 250;

// 2.4 million parameters: with gradients and two moments 37 MiB.
TrainerOptions options(int stage) {
    TrainerOptions o;
    o.model = {.architecture = &gpt2, .L = 12, .NH = 2, .C = 128, .T = kT, .V = kV, .bias = true};
    o.train.micro_batch_size = 1;
    o.train.global_batch_size = 4;
    o.parallel.zero = stage;
    o.seed = 5;
    return o;
}

std::vector<double> losses(const Group& group, const TrainerOptions& o) {
    Trainer trainer(group, o);
    if (group.rank() == 0) trainer.initialize();
    trainer.distribute_state();
    std::vector<double> out;
    for (int step = 0; step < kSteps; step++) {
        uint32_t place = uint32_t(step * o.train.global_batch_size + trainer.share().first_micro);
        std::array<int32_t, kT + 1> tokens{};
        out.push_back(trainer
                          .step(step, 0.01,
                                [&]() -> Trainer::Tokens {
                                    for (uint32_t t = 0; t < tokens.size(); t++)
                                        tokens[t] = int32_t(philox(1, t, place, 0, 0).v[0] % kV);
                                    place++;
                                    return {std::span(tokens).first(kT), std::span(tokens).last(kT)};
                                })
                          .loss);
    }
    return out;
}

// Leaves so much of the GPU's memory free.
class Free {
  public:
    explicit Free(size_t n_bytes) : before_(emulator::machine().memory_bytes) {
        size_t n_free = 0, n_total = 0;
        REQUIRE(cudaMemGetInfo(&n_free, &n_total) == cudaSuccess);
        emulator::machine().memory_bytes = n_total - n_free + n_bytes;
    }
    ~Free() { emulator::machine().memory_bytes = before_; }

  private:
    const size_t before_;
};
}  // namespace

TEST_CASE("ZeRO-3: a model that does not fit one rank trains on four, with the losses of one large rank") {
    if (world().size() != 4) return;  // the case needs four ranks; it runs with them
    const Backend& k = *gpu();
    const Group all(k, world()), self(k);
    std::vector<double> of_one;
    if (world().rank() == 0) of_one = losses(self, options(0));
    const Free memory(size_t(96 + 30) << 20);  // 96 MiB are the workspace of a computing stream
    for (const Group* group : {&self, &all})   // without shards neither one rank nor four have the memory
        try {
            losses(*group, options(0));
            FAIL("trained in less memory than the plan takes");
        } catch (const Error& e) {
            CHECK(e.code == Exit::memory);
            CHECK_MESSAGE(std::string(e.what()).starts_with("out of memory before step 0: the plan takes"),
                          std::string(e.what()));
        }
    const std::vector<double> of_four = losses(all, options(3));
    if (world().rank() == 0) CHECK(of_four == of_one);
}
