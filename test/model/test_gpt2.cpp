// The whole model: gradients against finite differences in double, the float instance against the double one, and
// the promise of the ordered reduction within one rank.
#include <omp.h>

#include <cstring>

#include "model/gpt2.h"
#include "test/op_test.h"
#include "trainer/evaluate.h"
#include "trainer/trainer.h"

namespace {
constexpr ModelConfig kTiny{
    .architecture = &gpt2, .L = 2, .NH = 3, .C = 12, .T = 7, .V = 29, .bias = true, .dropout = 0};

TrainerOptions options(ModelConfig c, DType real, int global = 2, int micro = 2) {
    TrainerOptions o;
    o.model = c;
    o.train.global_batch_size = global;
    o.train.micro_batch_size = micro;
    o.train.grad_clip = 0, o.optimizer.weight_decay = 0;
    o.real = real;
    o.seed = 42;
    return o;
}

std::vector<int32_t> random_tokens(size_t n, unsigned seed, int V) {
    const Doubles d = integers(n, seed, V);
    return {d.begin(), d.end()};
}

// A model in memory with everything that forward and backward need, outside Trainer so that each parameter can be
// moved.
struct Rig {
    ModelConfig c;
    int B;
    const Backend& k = cpu_backend();
    Arena params{"params"}, grads{"grads"}, acts{"acts"}, io{"io"};
    const std::vector<ParamInfo> list;
    Tensors p, g, a;
    Buf inputs, targets, where, losses;
    Batch batch;

    Rig(ModelConfig config, int batch_size)
        : c(config), B(batch_size), list(gpt2.params(config)), p(list.size()), g(list.size()) {
        const size_t BT = size_t(B) * c.T;
        for (size_t i = 0; i < list.size(); i++) {
            params.add(p[i], list[i].name, list[i].count(), DType::f64);
            grads.add(g[i], list[i].name, list[i].count(), DType::f64);
        }
        const auto act_list = gpt2.activations(c, {.B = B, .T = c.T, .real = DType::f64, .backward = true});
        a.resize(act_list.size());
        for (size_t i = 0; i < a.size(); i++) acts.add(a[i], act_list[i].name, act_list[i].count, act_list[i].dtype);
        io.add(inputs, "inputs", BT, DType::i32);
        io.add(targets, "targets", BT, DType::i32);
        io.add(where, "where", 2, DType::u32);
        for (Arena* arena : {&params, &grads, &acts, &io})
            arena->allocate(k.memory, [&](void* p, size_t n) { k.zero(p, n, nullptr); });
        losses = a[activation_index(act_list, "loss")];
        const auto in = random_tokens(BT, 1, c.V), out = random_tokens(BT, 2, c.V);
        const uint32_t place[2] = {5, 3};
        std::memcpy(inputs.data, in.data(), inputs.n_bytes());
        std::memcpy(targets.data, out.data(), targets.n_bytes());
        std::memcpy(where.data, place, sizeof place);
        batch = {.inputs = inputs, .targets = targets, .B = B, .T = c.T, .where = where, .seed = 99};
        unsigned seed = 10;
        for (size_t i = 0; i < p.size(); i++) {  // larger than the initialisation, so that every gradient is felt
            const Doubles v = normal(list[i].count_saved(), seed++, 0.3);
            for (size_t j = 0; j < v.size(); j++) p[i].as<double>()[j] = list[i].init.mean + v[j];
        }
    }
    double loss() {
        gpt2.forward({.k = k, .config = c, .params = p, .acts = a, .batch = batch, .train = true});
        double sum = 0;
        for (size_t i = 0; i < losses.count; i++) sum += losses.as<double>()[i];
        return sum / double(losses.count);
    }
    void gradients() {
        const Pass pass{.k = k,
                        .config = c,
                        .params = p,
                        .acts = a,
                        .grads = &g,
                        .batch = batch,
                        .train = true,
                        .grad_scale = 1.0f / float(B * c.T)};
        gpt2.forward(pass);
        gpt2.backward(pass);
    }
};

void check_every_gradient(ModelConfig c) {
    Rig rig(c, 3);
    rig.gradients();
    size_t tensor = 0;
    for (const ParamInfo& info : rig.list) {
        CAPTURE(info.name);
        const Buf w = rig.p[tensor], gradient = rig.g[tensor];
        tensor++;
        const Doubles u = normal(info.count_saved(), unsigned(100 + tensor));
        const double h = 1e-5, *dw = gradient.as<double>();
        const auto move = [&](double by) {
            for (size_t i = 0; i < u.size(); i++) w.as<double>()[i] += by * u[i];
        };
        move(h);
        const double plus = rig.loss();
        move(-2 * h);
        const double minus = rig.loss();
        move(h);
        double analytic = 0;
        for (size_t i = 0; i < u.size(); i++) analytic += dw[i] * u[i];
        CHECK(std::abs(analytic) >
              1e-6);  // a gradient that is not computed would agree with a direction that is not felt
        // The central difference is off by h^2 times the third derivative; 1e-6 leaves a factor of about 100.
        CHECK(analytic == doctest::Approx((plus - minus) / (2 * h)).epsilon(1e-6));
        for (size_t i = u.size(); i < gradient.count; i++) CHECK(dw[i] == 0);  // rows that pad the vocabulary
    }
}
}  // namespace

// Seen to fail with: the residual's gradient not passed around the MLP; dropout masks of backward drawn for another
// site.
TEST_CASE("gpt2: every gradient agrees with a directional finite difference in double") {
    ModelConfig c = kTiny;
    SUBCASE("bias") {}
    SUBCASE("no bias") { c.bias = false; }
    SUBCASE("dropout") { c.dropout = 0.3f; }
    SUBCASE("dropout, no bias, one layer") { c.dropout = 0.5f, c.bias = false, c.L = 1; }
    check_every_gradient(c);
}

TEST_CASE("gpt2: the loss of a fresh model is close to ln V") {
    const Group group(cpu_backend());
    ModelConfig c = kTiny;
    Trainer trainer(group, options(c, DType::f32));
    trainer.initialize();
    const auto in = random_tokens(14, 1, c.V), out = random_tokens(14, 2, c.V);
    const StepResult r = trainer.step(0, 0, [&] { return Trainer::Tokens{in, out}; });
    CHECK(r.loss == doctest::Approx(std::log(29.0)).epsilon(0.02));  // logits of a width-12 model are about 0.07
}

TEST_CASE("gpt2: the float instance follows the double one for 20 AdamW steps") {
    const Group group(cpu_backend());
    ModelConfig c = kTiny;
    c.dropout = 0.1f;
    std::vector<Doubles> losses;
    for (const DType real : {DType::f32, DType::f64}) {
        TrainerOptions o = options(c, real, 4, 2);
        o.train.grad_clip = 1;
        o.optimizer.weight_decay = 0.1f;
        Trainer trainer(group, o);
        trainer.initialize();
        Doubles& curve = losses.emplace_back();
        for (int s = 0; s < 20; s++) {
            unsigned seed = unsigned(s * 10);
            std::vector<int32_t> in, out;
            curve.push_back(trainer
                                .step(s, 1e-2,
                                      [&] {
                                          in = random_tokens(14, seed++, 8), out = random_tokens(14, seed++, 8);
                                          return Trainer::Tokens{in, out};
                                      })
                                .loss);
        }
    }
    CHECK(losses[0][19] < losses[0][0] - 0.5);
    CHECK(worst(losses[0], losses[1], 0, 1e-4) <= 1);  // the bound that parity with PyTorch is held to
}

TEST_CASE("gpt2: padded vocabulary rows stay zero through training") {
    const Group group(cpu_backend());
    TrainerOptions o = options(kTiny, DType::f32);
    o.optimizer.weight_decay = 0.1f;
    Trainer trainer(group, o);
    trainer.initialize();
    const auto in = random_tokens(14, 1, kTiny.V), out = random_tokens(14, 2, kTiny.V);
    for (int s = 0; s < 5; s++) trainer.step(s, 1e-2, [&] { return Trainer::Tokens{in, out}; });
    const StateTensor wte = trainer.parameters()[0];
    REQUIRE(wte.name == "wte.weight");
    CHECK(wte.global_shape == std::vector<size_t>{29, 12});
    const float* rows = wte.data.as<float>();
    for (size_t i = size_t(29) * 12; i < size_t(kTiny.Vp()) * 12; i++) CHECK(rows[i] == 0);
    CHECK(rows[0] != 0);
}

// Wide enough that every op really shares its work out: B T C = 4 * 64 * 128 = 2^15, ops do so from 2^14 elements and
// matrix products from 2^18 multiplications.  Seen to fail with: layernorm's sums over rows cut by the thread count.
TEST_CASE("gpt2: bits do not depend on the number of threads") {
    const Group group(cpu_backend());
    ModelConfig c{.architecture = &gpt2, .L = 2, .NH = 4, .C = 128, .T = 64, .V = 300, .bias = true, .dropout = 0.1f};
    std::vector<uint64_t> hashes;
    const int before = omp_get_max_threads();
    for (const int threads : {1, 2, 3, 4}) {
        omp_set_num_threads(threads);
        Trainer trainer(group, options(c, DType::f32, 12, 4));
        trainer.initialize();
        const auto in = random_tokens(256, 1, c.V), out = random_tokens(256, 2, c.V);
        for (int s = 0; s < 3; s++) trainer.step(s, 1e-2, [&] { return Trainer::Tokens{in, out}; });
        hashes.push_back(trainer.weights_hash());
    }
    omp_set_num_threads(before);
    for (const uint64_t h : hashes) CHECK(h == hashes[0]);
}

TEST_CASE("gpt2: evaluation counts every sequence once and ignores dropout") {
    const Group group(cpu_backend());
    ModelConfig c = kTiny;
    c.dropout = 0.5f;
    Trainer trainer(group, options(c, DType::f32, 2, 2));
    trainer.initialize();
    const auto all = random_tokens(7 * 8, 3, c.V);
    const auto read = [&](uint64_t i, std::span<int32_t> in, std::span<int32_t> out) {
        for (size_t t = 0; t < in.size(); t++) in[t] = all[i * 8 + t], out[t] = all[i * 8 + t + 1];
    };
    const EvalResult five = evaluate(trainer.session(), group.host(), 5, read);
    CHECK(five.tokens == 35);
    double sum = 0;
    for (uint64_t i = 0; i < 5; i++) {
        const EvalResult one =
            evaluate(trainer.session(), group.host(), 1,
                     [&](uint64_t, std::span<int32_t> in, std::span<int32_t> out) { read(i, in, out); });
        sum += one.loss;
    }
    CHECK(five.loss == doctest::Approx(sum / 5).epsilon(1e-6));
    CHECK(five.loss == evaluate(trainer.session(), group.host(), 5, read).loss);
}

TEST_CASE("gpt2: next_logits of a prefix equal the rows of a full pass") {
    const Group group(cpu_backend());
    Trainer trainer(group, options(kTiny, DType::f32));
    trainer.initialize();
    const auto tokens = random_tokens(7, 3, kTiny.V);
    const auto full = trainer.session().next_logits(tokens);
    auto changed = tokens;
    changed[6] = (changed[6] + 1) % kTiny.V;
    CHECK(full.size() == 29);
    CHECK(trainer.session().next_logits(changed) != full);
    // The fourth token's logits see only the first four tokens.
    const auto four = trainer.session().next_logits({tokens.data(), 4});
    changed = tokens;
    CHECK(trainer.session().next_logits({changed.data(), 4}) == four);
}

TEST_CASE("gpt2: a model kiln cannot run is refused by name") {
    const Group group(cpu_backend());
    ModelConfig c = kTiny;
    c.NH = 5;
    CHECK_THROWS_WITH_AS(Trainer(group, options(c, DType::f32)),
                         "model.n_embd = 12 is not divisible by model.n_head = 5", Error);
}

TEST_CASE("gpt2: parameter count and FLOPs of GPT-2 124M") {
    const ModelConfig c{
        .architecture = &gpt2, .L = 12, .NH = 12, .C = 768, .T = 1024, .V = 50257, .bias = true, .dropout = 0};
    CHECK(count_params(c) == 124439808);  // Radford et al. 2019; 124M
    CHECK(gpt2.flops_per_token(c) == 6.0 * 124439808 + 12.0 * 12 * 768 * 1024);
}
