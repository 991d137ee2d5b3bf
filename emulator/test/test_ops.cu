// Every op of the CUDA backend: the same bits under random schedules, on one OS thread and on two.  The shapes reuse
// every pipeline's buffers, and together run every instance of every kernel.
// The race build checks the same runs for races.
// Made to fail by: layernorm's partial rows added in the order in which blocks arrive (an atomicAdd); an instance of a
// kernel that no shape here chooses.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <regex>
#include <set>
#include <string_view>

#include <unistd.h>

#include "common/token_order.h"
#include "cuda_emulator_host.h"
#include "emulator.h"
#include "kernels/simt.h"
#include "test/slice.h"

namespace {
#if SIMT_HOOKED || defined(__SANITIZE_ADDRESS__)
constexpr bool kSlow = true;
#else
constexpr bool kSlow = false;
#endif

// The number of random schedules of an op: 8, or 3 with the race check or sanitizers.  In full (make test-full): 20, or
// 5 of a large shape with the race check or sanitizers.
uint64_t n_schedules(bool large) {
    const char* full = std::getenv("KILN_TEST_FULL");
    if (!full || std::string_view(full) != "1") return kSlow ? 3 : 8;
    return kSlow && large ? 5 : 20;
}

// Sets the schedule while the object lives; every report of the emulator is an error of the op.
class Schedule {
  public:
    explicit Schedule(uint64_t seed) : before_(emulator::config()) {
        emulator::config().order = emulator::Order::Random;
        emulator::config().seed = seed;
        emulator::config().threads = 1 + int(seed % 2);
    }
    ~Schedule() { emulator::config() = before_; }

  private:
    emulator::Config before_;
};

// Counts launches while the object lives, so that counters() knows the kernels that ran.
class Counting {
  public:
    Counting() { emulator::config().counters = !kSlow; }
    ~Counting() { emulator::config().counters = false; }
};

class Capability {
  public:
    explicit Capability(int capability) : before_(emulator::machine().capability) {
        emulator::machine().capability = capability;
    }
    ~Capability() { emulator::machine().capability = before_; }

  private:
    int before_;
};

struct OpCase {
    std::string name;
    bool large;                                 // takes long
    std::function<Doubles(const Target&)> run;  // all outputs, one behind the other
};

Doubles joined(std::initializer_list<const Dev*> outputs) {
    Doubles all;
    for (const Dev* d : outputs) {
        const Doubles v = d->host();
        all.insert(all.end(), v.begin(), v.end());
    }
    return all;
}
Doubles numbers(size_t n, unsigned seed) { return normal(n, seed, 0.5); }

// V is small, so that a token's rows span several chunks of 32.
struct EmbeddingShape {
    int B, T, C, V;
};
Doubles embedding(const Target& t, const EmbeddingShape& d) {
    const size_t BT = size_t(d.B) * d.T, C = size_t(d.C), V = size_t(d.V), T = size_t(d.T);
    const Doubles tokens = integers(BT, 1, d.V);
    const std::vector<int32_t> ids(tokens.begin(), tokens.end());
    std::vector<int32_t> order(BT);
    sort_rows_by_token(ids.data(), order.data(), BT, d.V);
    Dev in(t, DType::i32, tokens), rows(t, DType::i32, Doubles(order.begin(), order.end()));
    Dev wte(t, t.real, numbers(V * C, 2)), wpe(t, t.real, numbers(T * C, 3)), y(t, t.real, poison(BT * C));
    Dev dwte(t, t.stat(), numbers(V * C, 4)), dwpe(t, t.stat(), poison(T * C));
    t.k->embedding_forward({.y = y, .tokens = in, .wte = wte, .wpe = wpe, .B = d.B, .T = d.T, .C = d.C, .V = d.V},
                           nullptr);
    t.k->embedding_backward(
        {.dwte = dwte, .dwpe = dwpe, .dy = y, .tokens = in, .order = rows, .B = d.B, .T = d.T, .C = d.C, .V = d.V},
        nullptr);
    return joined({&y, &dwte, &dwpe});
}

struct NormShape {
    int BT, C;
};
Doubles layernorm(const Target& t, const NormShape& d) {
    const size_t BT = size_t(d.BT), C = size_t(d.C);
    Dev x(t, t.real, numbers(BT * C, 1)), w(t, t.real, numbers(C, 2)), b(t, t.real, numbers(C, 3));
    Dev y(t, t.real, poison(BT * C)), mean(t, t.stat(), poison(BT)), rstd(t, t.stat(), poison(BT));
    Dev dx(t, t.real, numbers(BT * C, 4)), dw(t, t.stat(), poison(C)), db(t, t.stat(), poison(C));
    t.k->layernorm_forward({.y = y, .mean = mean, .rstd = rstd, .x = x, .w = w, .b = b, .BT = d.BT, .C = d.C}, nullptr);
    LayerNormGrad grad{
        .dx = dx, .dw = dw, .db = db, .dy = y, .x = x, .w = w, .mean = mean, .rstd = rstd, .BT = d.BT, .C = d.C};
    t.k->layernorm_backward(grad, nullptr);
    Dev fresh(t, t.real, poison(BT * C)), dx_sum(t, t.stat(), poison(C));
    grad.dx = fresh;
    grad.dx_sum = dx_sum;
    grad.overwrite_dx = true;
    t.k->layernorm_backward(grad, nullptr);
    return joined({&y, &mean, &rstd, &dx, &dw, &db, &fresh, &dx_sum});
}

struct LinearShape {
    int BT, C, OC;
};
Doubles linear(const Target& t, const LinearShape& d) {
    const size_t BT = size_t(d.BT), C = size_t(d.C), OC = size_t(d.OC);
    Dev x(t, t.real, numbers(BT * C, 1)), w(t, t.real, numbers(C * OC, 2)), b(t, t.real, numbers(OC, 3));
    Dev y(t, t.real, poison(BT * OC)), pre(t, t.real, poison(BT * OC)), dx(t, t.real, poison(BT * C));
    Dev dw(t, t.stat(), poison(C * OC)), db(t, t.stat(), poison(OC));
    t.k->linear_forward({.y = y, .pre_gelu = pre, .x = x, .w = w, .b = b, .BT = d.BT, .C = d.C, .OC = d.OC}, nullptr);
    t.k->linear_backward(
        {.dx = dx, .dw = dw, .db = db, .dy = y, .x = x, .w = w, .pre_gelu = x, .BT = d.BT, .C = d.C, .OC = d.OC},
        nullptr);
    return joined({&y, &pre, &dx, &dw, &db});
}

struct AttentionShape {
    int B, T, NH, HS;
    float p;
};
Doubles attention(const Target& t, const AttentionShape& d) {
    const size_t rows = size_t(d.B) * d.T * d.NH, n = rows * d.HS;
    Dev qkv(t, t.real, numbers(3 * n, 1)), where(t, DType::u32, {3, 4}), y(t, t.real, poison(n));
    Dev lse(t, t.stat(), poison(rows)), dy(t, t.real, numbers(n, 2)), dqkv(t, t.real, poison(3 * n));
    Dev scratch(t, t.stat(), poison(rows));
    const DropoutMask mask{.where = where, .seed = 9, .site = 5, .p = d.p};
    t.k->attention_forward(
        {.y = y, .lse = lse, .qkv = qkv, .dropout = mask, .B = d.B, .T = d.T, .NH = d.NH, .HS = d.HS}, nullptr);
    t.k->attention_backward({.dqkv = dqkv,
                             .dy = dy,
                             .qkv = qkv,
                             .y = y,
                             .lse = lse,
                             .scratch = scratch,
                             .dropout = mask,
                             .B = d.B,
                             .T = d.T,
                             .NH = d.NH,
                             .HS = d.HS},
                            nullptr);
    return joined({&y, &lse, &dqkv});
}

// By the kernels for compute capability 9.0, whichever kernels the target would choose.
Doubles attention_sm90(const Target& t, const AttentionShape& d) {
    return attention({&cuda_backend(AttentionKernel::sm90), t.real, t.name}, d);
}

Doubles elementwise(const Target& t, size_t parts) {
    constexpr int B = 2, T = 37, C = 32;
    const size_t BT = B * T, n = BT * C;
    Dev x(t, t.real, numbers(n, 1)), y(t, t.real, poison(n)), dx(t, t.real, poison(n)), z(t, t.real, poison(n));
    Dev where(t, DType::u32, {3, 4}), sum(t, DType::f32, numbers(n, 2)), more(t, DType::f32, numbers(n, 3));
    Dev tree_of(t, DType::f32, numbers(parts * n, 4)), tree(t, DType::f32, poison(n)), copy(t, t.real, poison(n));
    Dev rows(t, DType::f32, poison(BT)), hash(t, DType::u32, {0, 0});
    t.k->gelu_forward({.y = y, .x = x}, nullptr);
    t.k->gelu_backward({.dx = dx, .dy = y, .x = x}, nullptr);
    t.k->dropout({.y = z,
                  .x = x,
                  .residual = y,
                  .mask = {.where = where, .seed = 9, .site = 5, .p = 0.2f},
                  .B = B,
                  .T = T,
                  .C = C},
                 nullptr);
    t.k->add({.y = sum, .x = more}, nullptr);
    t.k->tree_sum({.y = tree, .x = tree_of, .parts = int(parts)}, nullptr);
    t.k->cast({.y = copy, .x = sum}, nullptr);
    t.k->row_sum({.y = rows, .x = sum, .B = int(BT), .T = C}, nullptr);
    t.k->hash({.y = hash, .x = sum}, nullptr);
    return joined({&y, &dx, &z, &sum, &tree, &copy, &rows, &hash});
}

struct LogitsShape {
    int BT, V, Vp, capability;
};
Doubles cross_entropy(const Target& t, const LogitsShape& d) {
    const Capability capability(d.capability);
    const size_t BT = size_t(d.BT);
    Dev logits(t, t.real, numbers(BT * d.Vp, 1)), targets(t, DType::i32, integers(BT, 2, d.V));
    Dev loss(t, t.stat(), poison(BT)), correct(t, DType::i32, Doubles(BT));
    t.k->cross_entropy({.loss = loss,
                        .correct = correct,
                        .logits = logits,
                        .targets = targets,
                        .BT = d.BT,
                        .V = d.V,
                        .Vp = d.Vp,
                        .grad_scale = 0.1f},
                       nullptr);
    return joined({&loss, &correct, &logits});
}

Doubles grad_norm(const Target& t, size_t n) {
    Dev grad(t, DType::f32, numbers(n, 3)), norm(t, DType::f32, {0}), clip(t, DType::f32, {0});
    Dev scratch(t, DType::f32, poison(grad_norm_scratch(n)));
    t.k->grad_norm({.norm = norm, .clip = clip, .grad = grad, .scratch = scratch, .max_norm = 1}, nullptr);
    return joined({&norm, &clip});
}

Doubles optimizer(const Target& t, OptimizerKind kind) {
    const size_t n = 3000;
    Dev p(t, DType::f32, numbers(n, 1)), m(t, DType::f32, numbers(n, 2)), v(t, DType::f32, Doubles(n, 0.1));
    Dev grad(t, DType::f32, numbers(n, 3)), decay(t, DType::u8, Doubles((n + 63) / 64, 1));
    Dev copy(t, DType::bf16, poison(n)), rate(t, DType::f32, {1e-2, 0.1, 0.05}), clip(t, DType::f32, {0.5});
    t.k->optimizer_update({.param = p,
                           .copy = copy,
                           .m = m,
                           .v = v,
                           .grad = grad,
                           .decay = decay,
                           .rate = rate,
                           .clip = clip,
                           .kind = kind,
                           .weight_decay = 0.1f},
                          nullptr);
    return joined({&p, &copy, &m, &v});
}

std::vector<OpCase> ops(const Target& t) {
    std::vector<OpCase> all;
    const auto add = [&](bool large, auto* op, const auto& shape, const std::string& name) {
        all.push_back({name, large, [=](const Target& target) { return op(target, shape); }});
    };
    for (const auto& d : {EmbeddingShape{2, 37, 32, 50}, EmbeddingShape{3, 67, 33, 4}, EmbeddingShape{2, 37, 264, 5}})
        add(false, embedding, d, fmt::format("embedding B={} T={} C={} V={}", d.B, d.T, d.C, d.V));
    // Several chunks of rows; then, by width, rows in the registers of one warp, of two and of eight, where one
    // barrier serves two rows in turn; and rows that allow no 16-byte access.
    for (const auto& d : {NormShape{150, 32}, NormShape{70, 100}, NormShape{9, 520}, NormShape{9, 1000},
                          NormShape{17, 1600}, NormShape{3, 2049}, NormShape{4, 4104}})
        add(d.C > 1000, layernorm, d, fmt::format("layernorm BT={} C={}", d.BT, d.C));
    for (const auto& d : {LinearShape{74, 32, 24}, LinearShape{150, 32, 40}, LinearShape{150, 30, 27}})
        add(false, linear, d, fmt::format("linear BT={} C={} OC={}", d.BT, d.C, d.OC));
    // Tiles have 64 or 128 rows, pipelines two stages: 130 rows take each of the bf16 kernels three tiles, or two.
    const std::vector<AttentionShape> fp32 = {{2, 37, 2, 16, 0.2f}, {1, 37, 2, 17, 0}, {1, 67, 1, 40, 0.2f}};
    const std::vector<AttentionShape> bf16 = {{2, 37, 2, 16, 0.2f},   {1, 130, 1, 16, 0},    {1, 130, 1, 16, 0.2f},
                                              {1, 130, 1, 64, 0},     {1, 130, 1, 64, 0.2f}, {1, 130, 1, 128, 0},
                                              {1, 130, 1, 128, 0.2f}, {1, 200, 1, 32, 0.2f}};
    for (const auto& d : t.real == DType::bf16 ? bf16 : fp32)
        add(d.T > 100, attention, d, fmt::format("attention B={} T={} HS={} p={}", d.B, d.T, d.HS, d.p));
    // Three tiles of 128 rows, the last one nearly empty.  Two heads make 4 pairs of tiles for the 4 multiprocessors,
    // which take single tiles then; six heads make 12, taken in pairs, and eight heads of two tiles 8.  Blocks that
    // take several reuse every ring of buffers.
    const std::vector<AttentionShape> sm90 = {
        {1, 260, 2, 64, 0}, {1, 260, 2, 128, 0}, {2, 260, 3, 64, 0}, {2, 140, 4, 128, 0}};
    if (t.real == DType::bf16)
        for (const auto& d : sm90)
            add(true, attention_sm90, d, fmt::format("attention sm90 B={} T={} NH={} HS={}", d.B, d.T, d.NH, d.HS));
    for (const size_t parts : {4, 32}) add(false, elementwise, parts, fmt::format("elementwise, {} parts", parts));
    // A row of GPT-2's logits stays in shared memory on 9.0, and is read twice on 8.6.
    for (const auto& d :
         {LogitsShape{74, 50, 128, 90}, LogitsShape{1, 50257, 50304, 90}, LogitsShape{1, 50257, 50304, 86}})
        add(d.Vp > 128, cross_entropy, d, fmt::format("cross_entropy Vp={} on {}", d.Vp, d.capability));
    if (t.real == DType::bf16) return all;  // the other ops have one dtype
    for (const size_t n : {size_t(3000), kGradNormChunk + 100})
        add(n > 3000, grad_norm, n, fmt::format("grad_norm n={}", n));
    for (const OptimizerKind kind : values_of<OptimizerKind>())
        add(false, optimizer, kind, "optimizer " + word_of(kind));
    return all;
}

// The names of all kernels that kernels/cuda defines.
std::set<std::string> kernels_in_sources() {
    static const std::regex kernel(R"(\b(\w+_kernel)\()");
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator("kernels/cuda")) {
        std::ifstream in(entry.path());
        const std::string text{std::istreambuf_iterator<char>(in), {}};
        for (std::sregex_iterator i(text.begin(), text.end(), kernel), end; i != end; ++i) names.insert((*i)[1]);
    }
    names.erase("probe_kernel");  // only its attributes are read
    names.erase("clock_kernel");  // has no bits to repeat; bench_attention runs it
    return names;
}
// The instances of these kernels in this program, as counters() names them: "layernorm_forward_kernel<float, 8>".
std::set<std::string> kernels_in_program() {
    const std::set<std::string> sources = kernels_in_sources();
    // type, "void ", namespaces, name, template arguments; symbols inside of a kernel do not match
    static const std::regex symbol(
        R"(^\S+ [tTW] (?:void )?((?:\w+::|\(anonymous namespace\)::)*)(\w+_kernel)(<.*>)?\(.*\)$)");
    std::set<std::string> names;
    FILE* pipe = popen(fmt::format("nm -C /proc/{}/exe", int(getpid())).c_str(), "r");
    REQUIRE(pipe);
    char line[4096];
    while (std::fgets(line, sizeof line, pipe)) {
        std::string text = line;
        text.pop_back();
        std::smatch found;
        if (text.find("_kernel") == std::string::npos || !std::regex_match(text, found, symbol)) continue;
        if (!sources.contains(found[2])) continue;
        const std::string space = found[1] == "(anonymous namespace)::" ? "" : found[1].str();
        names.insert(space + found[2].str() + found[3].str());
    }
    pclose(pipe);
    return names;
}
}  // namespace

TEST_CASE("ops: the same bits under random schedules, by every kernel") {
    emulator::reset_counters();
    for (const Target& t : targets()) {
        if (t.k != &cuda_backend()) continue;
        for (const OpCase& op : ops(t)) {
            CAPTURE(t.name);
            CAPTURE(op.name);
            const Doubles first = [&] {
                const Counting counting;
                return op.run(t);
            }();
            REQUIRE(std::none_of(first.begin(), first.end(), [](double x) { return std::isnan(x); }));
            for (uint64_t seed = 1; seed <= n_schedules(op.large); seed++) {
                CAPTURE(seed);
                const Schedule schedule(seed);
                CHECK(op.run(t) == first);
            }
        }
    }
    if (kSlow) return;  // these builds run the same kernels, and counting would take long
    std::set<std::string> ran;
    for (const auto& [name, counted] : emulator::counters()) ran.insert(name);
    const std::set<std::string> expected = kernels_in_program();
    CHECK(expected.size() > 50);
    for (const std::string& name : expected) {
        CAPTURE(name);
        CHECK(ran.contains(name));
    }
}
