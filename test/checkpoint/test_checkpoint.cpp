// A checkpoint is written from a snapshot in host memory, and read into the tensors of a session or a trainer.
#include <cstring>

#include "checkpoint/checkpoint.h"
#include "model/gpt2.h"
#include "model/session.h"
#include "test/op_test.h"
#include "test/scratch.h"

namespace {
constexpr ModelConfig kTiny{.architecture = &gpt2, .L = 2, .NH = 2, .C = 16, .T = 5, .V = 29};

Session session_of(const Target& t, const ModelConfig& c) { return {*t.k, c, {.B = 1, .T = c.T, .real = t.real}}; }

void randomize(const Target& t, Session& s, unsigned seed) {
    for (const StateTensor& p : s.memory().parameters()) {
        const Doubles v = normal(p.data.count, seed++);
        const std::vector<float> f(v.begin(), v.end());
        t.k->upload(p.data.data, f.data(), p.data.n_bytes(), s.stream());
        t.k->synchronize(s.stream());
    }
    s.parameters_changed();
}
uint64_t hash_of(const Target& t, Session& s) { return s.memory().weights_hash(*t.k, s.stream()); }

std::string text_of(const fs::path& file) { return read_text(file.string(), 1 << 20, Exit::io); }
const RunState kRun{.step = 1};
Snapshot taken(const Backend& k, const std::vector<StateTensor>& state) {
    Snapshot s(k, state, Snapshot::Kind::copy);
    s.take(nullptr);
    return s;
}
void save(const std::string& root, const RunSnapshot& snapshot) {
    save_checkpoint(root, snapshot, 1, [] {});
}
}  // namespace

// Seen to fail with: tensors of a snapshot that still point into the session's memory.
TEST_CASE("checkpoint: a snapshot is the state as it was, and comes back") {
    for (const Target& t : targets())
        for (const bool bias : {true, false}) {
            CAPTURE(t.name);
            CAPTURE(bias);
            ModelConfig c = kTiny;
            c.bias = bias;
            Session model = session_of(t, c);
            randomize(t, model, 1);
            const uint64_t before = hash_of(t, model);
            const std::vector<StateTensor> moments = {
                StateTensor::whole("m.a", {4, 4}, model.memory().parameters()[2].data)};
            const Snapshot parameters = taken(*t.k, model.memory().parameters()), m = taken(*t.k, moments);
            const RunState run{.step = 7, .updates = 6, .config = "text"};
            randomize(t, model, 100);
            CHECK(hash_of(t, model) != before);

            const Scratch scratch;
            const std::string root = scratch.path("checkpoints");
            save(root, {c, parameters, m, run});
            const fs::path dir = fs::path(root) / "step_7";
            verify_checkpoint(dir);
            CHECK(read_state(dir).updates == 6);
            CHECK(read_state(dir).config == "text");
            load_weights(dir, *t.k, c, model.memory().parameters());
            CHECK(hash_of(t, model) == before);

            const Dev moment(t, DType::f32, Doubles(16));
            load_optimizer(dir, *t.k, {StateTensor::whole("m.a", {4, 4}, moment)});
            const Buf saved = m.tensors()[0].data;
            CHECK(moment.host() == Doubles(saved.as<float>(), saved.as<float>() + 16));
        }
}

TEST_CASE("checkpoint: the same state gives the same files on every backend") {
    std::vector<std::string> files;
    for (const Target& t : targets()) {
        Session model = session_of(t, kTiny);
        randomize(t, model, 1);
        const Scratch scratch;
        const std::string root = scratch.path("checkpoints");
        save(root, {kTiny, taken(*t.k, model.memory().parameters()), taken(*t.k, {}), kRun});
        files.push_back(text_of(fs::path(root) / "step_1" / "model.safetensors"));
    }
    for (const std::string& file : files) CHECK(file == files[0]);
}

TEST_CASE("checkpoint: slices, and weights of another model, are refused") {
    const Target t = targets().front();
    Session model = session_of(t, kTiny);
    const Scratch scratch;
    const std::string root = scratch.path("checkpoints");
    std::vector<StateTensor> parts = model.memory().parameters();
    parts[0].slice = {.offset = {0, 0}, .extent = {14, 16}};
    CHECK(parts[0].count() == 14 * 16);
    CHECK_THROWS_WITH_AS(taken(*t.k, parts), doctest::Contains("wte.weight has 464 elements, its slice 224"), Error);
    parts[0].data = parts[0].data.slice(0, 14 * 16);
    const Snapshot sliced = taken(*t.k, parts), none = taken(*t.k, {});
    CHECK_THROWS_WITH_AS(save(root, {kTiny, sliced, none, kRun}), doctest::Contains("wte.weight is a slice"), Error);

    save(root, {kTiny, taken(*t.k, model.memory().parameters()), taken(*t.k, {}), kRun});
    const fs::path dir = fs::path(root) / "step_1";
    CHECK_THROWS_WITH_AS(load_weights(dir, *t.k, kTiny, parts), doctest::Contains("wte.weight is a slice"), Error);
    ModelConfig other = kTiny;
    other.L = 1;
    Session smaller = session_of(t, other);
    CHECK_THROWS_WITH_AS(load_weights(dir, *t.k, other, smaller.memory().parameters()),
                         doctest::Contains("use model.n_layer: 2 (the config has 1)"), Error);
}

TEST_CASE("checkpoint: a view shares the host's memory, and only a backend in host memory has one") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        Session model = session_of(t, kTiny);
        const std::vector<StateTensor> state = model.memory().parameters();
        if (!t.k->host_addressable) {
            CHECK_THROWS_WITH_AS(Snapshot(*t.k, state, Snapshot::Kind::view), doctest::Contains("cannot read"), Error);
            continue;
        }
        CHECK(Snapshot(*t.k, state, Snapshot::Kind::view).tensors()[0].data.data == state[0].data.data);
        CHECK(taken(*t.k, state).tensors()[0].data.data != state[0].data.data);
    }
}
