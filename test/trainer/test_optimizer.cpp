// Parameter groups: the calls that they become, the results of these calls, and the state that a checkpoint finds.
#include <map>

#include "test/op_test.h"
#include "trainer/optimizer.h"

namespace {
const std::vector<ParamInfo> kParams = {
    {"a", {3, 5}, 2, Init::zeros(), true, Split::none},  // of 15 elements, 10 of them saved
    {"b", {70}, 70, Init::zeros(), false, Split::none},  // two blocks of decay flags
    {"c", {2, 64}, 2, Init::zeros(), true, Split::none},
    {"d", {1}, 1, Init::zeros(), false, Split::none},
};
constexpr size_t n = 64 + 128 + 128 + 64;

// The calls of a table's optimizer_update.
const Backend* inner = nullptr;
std::vector<OptimizerUpdate> calls;
Backend noting(const Backend& k) {
    inner = &k;
    calls.clear();
    Backend changed = k;
    changed.optimizer_update = [](const OptimizerUpdate& a, Stream s) {
        calls.push_back(a);
        inner->optimizer_update(a, s);
    };
    return changed;
}

Config::Optimizer rule(OptimizerKind kind) {
    return {.name = kind, .beta1 = 0.8, .weight_decay = 0.1, .momentum = 0.7};
}

// An optimizer over flat buffers of random numbers.
class Flat {
  public:
    Flat(const Target& t, std::vector<ParamGroup> groups)
        : param(t, DType::f32, normal(n, 1)),
          grad(t, DType::f32, normal(n, 2)),
          clip(t, DType::f32, {0.5}),
          optimizer(*t.k, std::move(groups), DType::f32),
          k_(*t.k) {
        optimizer.plan(moments_, scalars_);
        for (Arena* a : {&moments_, &scalars_})
            a->allocate(k_.memory, [&](void* p, size_t n_bytes) { k_.zero(p, n_bytes, nullptr); });
        optimizer.start(nullptr);
    }
    void step() {
        optimizer.set_rate(0.01);
        optimizer.update({.param = param, .grad = grad, .clip = clip}, nullptr);
        k_.synchronize(nullptr);
        optimizer.set_updates(optimizer.updates() + 1);
    }
    Doubles read(const StateTensor& t) const {
        std::vector<float> raw(t.data.count);
        k_.download(raw.data(), t.data.data, t.data.n_bytes(), nullptr);
        k_.synchronize(nullptr);
        return {raw.begin(), raw.end()};
    }
    const Dev param, grad, clip;  // (n), (n), (1)
    Optimizer optimizer;

  private:
    const Backend& k_;
    Arena moments_{"moments", kDecayBlock * sizeof(float)}, scalars_{"scalars"};
};

// Two steps of one parameter by itself.
struct Alone {
    Doubles param, m, v;
};
Alone alone(const Target& t, const FlatParam& p, OptimizerKind kind) {
    const auto part = [&](unsigned seed) {
        const Doubles all = normal(n, seed);
        return Doubles(all.begin() + ptrdiff_t(p.range.first), all.begin() + ptrdiff_t(p.range.end()));
    };
    const size_t count = p.range.count;
    const Dev param(t, DType::f32, part(1)), grad(t, DType::f32, part(2)), clip(t, DType::f32, {0.5});
    const Dev m(t, DType::f32, Doubles(count)), v(t, DType::f32, Doubles(count));
    const Dev decay(t, DType::u8, Doubles(count / kDecayBlock, p.info.decay));
    for (int step = 1; step <= 2; step++) {
        OptimizerUpdate op = {.kind = kind, .beta1 = 0.8f, .weight_decay = 0.1f, .momentum = 0.7f};  // as rule() has
        const Dev rate(t, DType::f32,
                       {0.01, 1 - std::pow(double(op.beta1), step), 1 - std::pow(double(op.beta2), step)});
        op.param = param, op.grad = grad, op.m = m, op.decay = decay, op.rate = rate, op.clip = clip;
        if (n_moments(kind) > 1) op.v = v;
        t.k->optimizer_update(op, nullptr);
        t.k->synchronize(nullptr);
    }
    return {param.host(), m.host(), v.host()};
}

std::vector<Target> targets_in_f32() {
    std::vector<Target> out;
    for (const Target& t : targets())
        if (t.real == DType::f32) out.push_back(t);
    return out;
}
}  // namespace

TEST_CASE("optimizer: parameters lie in whole blocks of decay flags") {
    const std::vector<FlatParam> flat = flat_params(kParams);
    const Range want[] = {{0, 64}, {64, 128}, {192, 128}, {320, 64}};
    REQUIRE(flat.size() == 4);
    for (size_t i = 0; i < 4; i++) CHECK(flat[i].range == want[i]);
}

TEST_CASE("optimizer: the ranges of blocks are the flat buffer, in order") {
    std::vector<ParamInfo> list = kParams;
    list[1].block = 0, list[2].block = 1;
    CHECK(block_ranges(flat_params(list), 2) == std::vector<Range>{{0, 64 + 128}, {64 + 128, 128 + 64}});
    list[2].block = 0;
    CHECK(block_ranges(flat_params(list), 1) == std::vector<Range>{{0, n}});
    CHECK_THROWS_AS(block_ranges(flat_params(list), 2), Error);  // no parameter is in block 1
    list[1].block = 2, list[2].block = 1, list[3].block = 0;
    CHECK_THROWS_AS(block_ranges(flat_params(list), 3), Error);  // in another order
}

TEST_CASE("optimizer: a group of all parameters is one call over everything") {
    for (const Target& t : targets_in_f32())
        for (OptimizerKind kind : values_of<OptimizerKind>()) {
            CAPTURE(t.name);
            const Backend k = noting(*t.k);
            Flat flat({&k, t.real, t.name}, {{rule(kind), flat_params(kParams)}});
            flat.step();
            REQUIRE(calls.size() == 1);
            CHECK(calls[0].kind == kind);
            CHECK(calls[0].param.data == Buf(flat.param).data);
            CHECK(calls[0].param.count == n);
            CHECK(calls[0].m.count == n);
            CHECK(bool(calls[0].v) == (n_moments(kind) > 1));
            std::vector<std::string> names, want = {"m.a", "m.b", "m.c", "m.d"};
            if (n_moments(kind) > 1) want.insert(want.end(), {"v.a", "v.b", "v.c", "v.d"});
            for (const StateTensor& s : flat.optimizer.state()) names.push_back(s.name);
            CHECK(names == want);
            CHECK(flat.optimizer.state()[0].global_shape == std::vector<size_t>{2, 5});
        }
}

// Seen to fail with: a stretch that goes on across a parameter of another group; the first group's moments for all.
TEST_CASE("optimizer: each group follows its own rule, with state of its own") {
    const std::vector<FlatParam> all = flat_params(kParams);
    for (const Target& t : targets_in_f32()) {
        CAPTURE(t.name);
        const Backend k = noting(*t.k);
        Flat flat({&k, t.real, t.name},
                  {{rule(OptimizerKind::adamw), {all[0], all[1], all[3]}}, {rule(OptimizerKind::sgd), {all[2]}}});
        flat.step();
        CHECK(calls.size() == 3);  // a and b, d; c
        flat.step();
        const Doubles param = flat.param.host();
        std::map<std::string, Doubles> state;
        for (const StateTensor& s : flat.optimizer.state()) state[s.name] = flat.read(s);
        CHECK(state.size() == 7);  // m and v of three, m of c
        for (size_t i = 0; i < 4; i++) {
            CAPTURE(all[i].info.name);
            const Alone want = alone(t, all[i], i == 2 ? OptimizerKind::sgd : OptimizerKind::adamw);
            const auto first = [](const Doubles& v, size_t from, size_t count) {
                return Doubles(v.begin() + ptrdiff_t(from), v.begin() + ptrdiff_t(from + count));
            };
            CHECK(first(param, all[i].range.first, all[i].range.count) == want.param);
            const size_t saved = all[i].info.count_saved();
            CHECK(state.at("m." + all[i].info.name) == first(want.m, 0, saved));
            if (i != 2) CHECK(state.at("v." + all[i].info.name) == first(want.v, 0, saved));
        }
    }
}
