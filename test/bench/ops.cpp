// How fast each op of the model is by itself, at the shapes of GPT-2: time, memory rate, arithmetic rate.
//
//     bench_ops                                         124M with 16 and 64 sequences, 1558M with 16; bf16 on the GPU
//     bench_ops --size tiny --backend cpu --dtype f32   what the tests run
//     bench_ops --only attention --samples 51 --json ops.jsonl
//
// How a sample is taken: bench.h.
//
// Bytes are what the op cannot avoid moving between memory and chip: every operand once, twice where it is read and
// written, and for the two products of a linear layer's gradient dy twice.  FLOP are the useful ones of the matrix
// products: 2 per multiply-add, attention's causal half, with the scores computed again in its backward.  per_step is
// how often one training step without dropout and accumulation calls the op; the rows with 0 are variants and parts.
#include "test/bench/bench.h"

#include <cmath>

#ifndef KILN_CUDA
#define KILN_CUDA 0
#endif

using namespace bench;

namespace {
struct Options {
    std::vector<std::string> sizes = {"124m-b16", "124m-b64", "1558m-b16"};
    std::string backend = KILN_CUDA ? "cuda" : "cpu", dtype = KILN_CUDA ? "bf16" : "f32", only;
    Settings settings;
};

struct Size {
    const char* name;
    int B, T, L, NH, C, V;
    int Vp() const { return (V + 127) / 128 * 128; }
    int BT() const { return B * T; }
    size_t n_params() const {
        const size_t c = size_t(C);
        return (size_t(Vp()) + size_t(T)) * c + size_t(L) * (12 * c * c + 13 * c) + 2 * c;
    }
};
const Size kSizes[] = {
    {"tiny", 2, 32, 2, 2, 32, 257},
    {"124m-b16", 16, 1024, 12, 12, 768, 50257},
    {"124m-b64", 64, 1024, 12, 12, 768, 50257},
    {"1558m-b16", 16, 1024, 48, 25, 1600, 50257},
};

struct Row {
    std::string shape;
    int per_step;
    double n_bytes, flop;
    std::function<void()> run;
};

// An op takes its buffers only when its turn comes, and they are released after it: the largest model's do not fit
// together.
struct Op {
    std::string name;
    std::function<Row(Bench&)> make;  // takes the buffers
};

// Token numbers as in text: the most frequent ones far ahead (Zipf).
std::vector<int32_t> some_tokens(const Size& z) {
    std::mt19937 gen(2);
    std::uniform_real_distribution<double> u(0, 1);
    std::vector<int32_t> v(static_cast<size_t>(z.BT()));
    for (int32_t& t : v) t = std::min(int32_t(std::pow(double(z.V), u(gen))) - 1, z.V - 1);
    return v;
}

// clang-format off
// One op per paragraph: its operands, then what a call moves and computes.
void add_embedding(std::vector<Op>& all, const Size& z) {
    const size_t A = size_t(z.BT()) * z.C, W = size_t(z.Vp()) * z.C, P = size_t(z.T) * z.C;
    all.push_back({"embedding forward", [=](Bench& b) {
        const Embedding e{.y = b.real(A), .tokens = b.copy_of(some_tokens(z)), .wte = b.real(W, 0.02),
                          .wpe = b.real(P, 0.02), .B = z.B, .T = z.T, .C = z.C, .V = z.V};
        return Row{shape_of({size_t(z.BT()), size_t(z.C)}), 1, b.real_bytes(double(2 * A + P)) + 4.0 * z.BT(), 0,
                   [=, &b] { b.k().embedding_forward(e, b.stream()); }};
    }});
    all.push_back({"embedding backward", [=](Bench& b) {
        const std::vector<int32_t> tokens = some_tokens(z);
        std::vector<int32_t> order(tokens.size()), distinct = tokens;
        sort_rows_by_token(tokens.data(), order.data(), tokens.size(), z.V);
        std::sort(distinct.begin(), distinct.end());
        const double n_rows = double(std::unique(distinct.begin(), distinct.end()) - distinct.begin());
        const EmbeddingGrad e{.dwte = b.stat(W), .dwpe = b.stat(P), .dy = b.real(A, 0.01), .tokens = b.copy_of(tokens),
                              .order = b.copy_of(order), .B = z.B, .T = z.T, .C = z.C, .V = z.V};
        return Row{shape_of({size_t(z.BT()), size_t(z.C)}), 1,
                   b.real_bytes(2.0 * double(A)) + 8.0 * n_rows * z.C + 4.0 * double(P) + 8.0 * z.BT(), 0,
                   [=, &b] { b.k().embedding_backward(e, b.stream()); }};
    }});
}

void add_layernorm(std::vector<Op>& all, const Size& z) {
    const size_t A = size_t(z.BT()) * z.C, BT = size_t(z.BT()), C = size_t(z.C);
    all.push_back({"layernorm forward", [=](Bench& b) {
        const LayerNorm n{.y = b.real(A), .mean = b.stat(BT), .rstd = b.stat(BT), .x = b.real(A), .w = b.real(C),
                          .b = b.real(C), .BT = z.BT(), .C = z.C};
        return Row{shape_of({BT, C}), 2 * z.L + 1, b.real_bytes(double(2 * A)) + 8.0 * double(BT),
                   0, [=, &b] { b.k().layernorm_forward(n, b.stream()); }};
    }});
    all.push_back({"layernorm backward", [=](Bench& b) {
        const LayerNormGrad n{.dx = b.real(A, 0.01), .dw = b.stat(C), .db = b.stat(C), .dy = b.real(A, 0.01),
                              .x = b.real(A), .w = b.real(C), .mean = b.stat(BT, 0.01), .rstd = b.stat(BT),
                              .BT = z.BT(), .C = z.C};
        return Row{shape_of({BT, C}), 2 * z.L + 1, b.real_bytes(double(4 * A)) + 8.0 * double(BT),
                   0, [=, &b] { b.k().layernorm_backward(n, b.stream()); }};
    }});
}

struct Layer {
    const char* name;
    int C, OC, per_step;
    bool gelu_after = false, gelu_before = false, residual = false, head = false;
};

void add_linear(std::vector<Op>& all, const Size& z, const Layer& l) {
    const size_t BT = size_t(z.BT()), X = BT * l.C, Y = BT * l.OC, W = size_t(l.C) * l.OC, OC = size_t(l.OC);
    const double flop = 2.0 * double(X) * l.OC;
    const std::string shape = shape_of({BT, size_t(l.C), OC});
    all.push_back({fmt::format("{} forward", l.name), [=](Bench& b) {
        Linear o{.y = b.real(Y), .x = b.real(X), .w = b.real(W, 0.02), .BT = z.BT(), .C = l.C, .OC = l.OC,
                 .w_transposed = l.head};
        if (!l.head) o.b = b.real(OC, 0.02);
        if (l.gelu_after) o.pre_gelu = b.real(Y);
        if (l.residual) o.residual = b.real(Y);
        return Row{shape, l.per_step, b.real_bytes(double(X + W + Y * (l.gelu_after || l.residual ? 2 : 1))), flop,
                   [=, &b] { b.k().linear_forward(o, b.stream()); }};
    }});
    for (const bool whole : {true, false}) {
        all.push_back({fmt::format("{} backward{}", l.name, whole ? "" : ", dw alone"), [=](Bench& b) {
            LinearGrad o{.dw = b.stat(W), .dy = b.real(Y, 0.01), .x = b.real(X), .w = b.real(W, 0.02), .BT = z.BT(),
                         .C = l.C, .OC = l.OC, .w_transposed = l.head};
            if (!l.head) o.db = b.stat(OC);
            if (whole) o.dx = b.real(X);
            if (whole && l.gelu_before) o.pre_gelu = b.real(X);
            const double weights = b.real_bytes(double(X + Y)) + 4.0 * double(W);
            const double inputs = b.real_bytes(double(Y + W + X * (l.gelu_before ? 2 : 1)));
            return Row{shape, whole ? l.per_step : 0, weights + (whole ? inputs : 0), whole ? 2 * flop : flop,
                       [=, &b] { b.k().linear_backward(o, b.stream()); }};
        }});
    }
}

void add_gelu(std::vector<Op>& all, const Size& z) {
    const size_t n = size_t(z.BT()) * z.C * 4;
    all.push_back({"gelu forward", [=](Bench& b) {
        const Gelu g{.y = b.real(n), .x = b.real(n)};
        return Row{shape_of({n}), 0, b.real_bytes(double(2 * n)), 0, [=, &b] { b.k().gelu_forward(g, b.stream()); }};
    }});
    all.push_back({"gelu backward", [=](Bench& b) {
        const GeluGrad g{.dx = b.real(n), .dy = b.real(n, 0.01), .x = b.real(n)};
        return Row{shape_of({n}), 0, b.real_bytes(double(3 * n)), 0, [=, &b] { b.k().gelu_backward(g, b.stream()); }};
    }});
}

void add_attention(std::vector<Op>& all, const Size& z) {
    const size_t A = size_t(z.BT()) * z.C, stats = size_t(z.BT()) * z.NH;
    const double flop = 2.0 * double(A) * z.T;  // two products of 2 A T, half of each in the future
    const std::string shape = shape_of({size_t(z.B), size_t(z.T), size_t(z.NH), size_t(z.C / z.NH)});
    const auto mask = [](Bench& b, float p) {
        return p > 0 ? DropoutMask{.where = b.zeros(2, DType::u32), .seed = 1, .site = 1, .p = p} : DropoutMask{};
    };
    for (const float p : {0.0f, 0.1f}) {
        const char* with = p > 0 ? ", dropout" : "";
        all.push_back({fmt::format("attention forward{}", with), [=](Bench& b) {
            const Attention a{.y = b.real(A), .lse = b.stat(stats), .qkv = b.real(3 * A), .dropout = mask(b, p),
                              .B = z.B, .T = z.T, .NH = z.NH, .HS = z.C / z.NH};
            return Row{shape, p > 0 ? 0 : z.L, b.real_bytes(double(4 * A)) + 4.0 * double(stats), flop,
                       [=, &b] { b.k().attention_forward(a, b.stream()); }};
        }});
        all.push_back({fmt::format("attention backward{}", with), [=](Bench& b) {
            const Attention a{.y = b.real(A), .lse = b.stat(stats), .qkv = b.real(3 * A), .dropout = mask(b, p),
                              .B = z.B, .T = z.T, .NH = z.NH, .HS = z.C / z.NH};
            b.k().attention_forward(a, b.stream());  // the gradient needs a matching y and lse
            const AttentionGrad g{.dqkv = b.real(3 * A), .dy = b.real(A, 0.01), .qkv = a.qkv, .y = a.y, .lse = a.lse,
                                  .scratch = b.stat(stats), .dropout = a.dropout, .B = z.B, .T = z.T, .NH = z.NH,
                                  .HS = z.C / z.NH};
            return Row{shape, p > 0 ? 0 : z.L, b.real_bytes(double(8 * A)) + 12.0 * double(stats), 2.5 * flop,
                       [=, &b] { b.k().attention_backward(g, b.stream()); }};
        }});
    }
}

void add_loss(std::vector<Op>& all, const Size& z) {
    const size_t BT = size_t(z.BT()), n = BT * z.Vp(), A = BT * z.C;
    all.push_back({"cross-entropy", [=](Bench& b) {
        const CrossEntropy c{.loss = b.stat(BT), .correct = b.zeros(BT, DType::i32), .logits = b.real(n),
                             .targets = b.copy_of(some_tokens(z)), .BT = z.BT(), .V = z.V, .Vp = z.Vp(),
                             .grad_scale = 1.0f / float(z.BT())};
        return Row{shape_of({BT, size_t(z.Vp())}), 1, b.real_bytes(double(2 * n)), 0,
                   [=, &b] { b.k().cross_entropy(c, b.stream()); }};
    }});
    all.push_back({"row sum", [=](Bench& b) {
        const RowSum r{.y = b.stat(size_t(z.B)), .x = b.stat(BT), .B = z.B, .T = z.T};
        return Row{shape_of({size_t(z.B), size_t(z.T)}), 1, 4.0 * double(BT), 0,
                   [=, &b] { b.k().row_sum(r, b.stream()); }};
    }});
    all.push_back({"dropout + residual", [=](Bench& b) {
        const Dropout d{.y = b.real(A), .x = b.real(A), .residual = b.real(A),
                        .mask = {.where = b.zeros(2, DType::u32), .seed = 1, .site = 2, .p = 0.1f}, .B = z.B, .T = z.T,
                        .C = z.C};
        return Row{shape_of({BT, size_t(z.C)}), 0, b.real_bytes(double(3 * A)), 0,
                   [=, &b] { b.k().dropout(d, b.stream()); }};
    }});
    all.push_back({"zero", [=](Bench& b) {
        const Buf d = b.real(A);
        return Row{shape_of({BT, size_t(z.C)}), 1, b.real_bytes(double(A)), 0,
                   [=, &b] { b.k().zero(d.data, d.n_bytes(), b.stream()); }};
    }});
}

// Over all parameters as one buffer.
void add_optimizer(std::vector<Op>& all, const Size& z) {
    const size_t n = z.n_params() / 64 * 64;
    const double N = double(n);
    const std::string shape = shape_of({n});
    all.push_back({"gradient norm", [=](Bench& b) {
        const GradNorm g{.norm = b.stat(1), .clip = b.stat(1), .grad = b.stat(n), .scratch = b.stat(grad_norm_scratch(n)),
                         .max_norm = 1};
        return Row{shape, 1, 4 * N, 0, [=, &b] { b.k().grad_norm(g, b.stream()); }};
    }});
    all.push_back({"adamw", [=](Bench& b) {
        OptimizerUpdate u{.param = b.stat(n, 0.02), .m = b.stat(n, 1e-3), .v = b.zeros(n, DType::f32),
                          .grad = b.stat(n, 1e-3), .decay = b.zeros(n / 64, DType::u8),
                          .rate = b.copy_of(std::vector<float>{1e-4f, 0.1f, 0.05f}),
                          .clip = b.copy_of(std::vector<float>{1}), .weight_decay = 0.1f};
        if (b.real_type() == DType::bf16) u.copy = b.real(n);
        return Row{shape, 1, N * (b.real_type() == DType::bf16 ? 30 : 28), 0,
                   [=, &b] { b.k().optimizer_update(u, b.stream()); }};
    }});
    all.push_back({"add", [=](Bench& b) {
        const Add a{.y = b.stat(n), .x = b.stat(n, 1e-3)};
        return Row{shape, 0, 12 * N, 0, [=, &b] { b.k().add(a, b.stream()); }};
    }});
    all.push_back({"tree sum of 2", [=](Bench& b) {
        const Buf x = b.stat(2 * n);
        const TreeSum t{.y = x.slice(0, n), .x = x, .parts = 2};
        return Row{shape, 0, 12 * N, 0, [=, &b] { b.k().tree_sum(t, b.stream()); }};
    }});
    all.push_back({"cast", [=](Bench& b) {
        const Cast c{.y = b.real(n), .x = b.stat(n)};
        return Row{shape, 0, 4 * N + b.real_bytes(N), 0, [=, &b] { b.k().cast(c, b.stream()); }};
    }});
    all.push_back({"hash", [=](Bench& b) {
        const Hash h{.y = b.zeros(2, DType::u32), .x = b.stat(n)};
        return Row{shape, 0, 4 * N, 0, [=, &b] { b.k().hash(h, b.stream()); }};
    }});
}
// clang-format on

std::vector<Op> ops_of(const Size& z) {
    std::vector<Op> all;
    const int C = z.C;
    add_embedding(all, z);
    add_layernorm(all, z);
    add_linear(all, z, {.name = "qkv", .C = C, .OC = 3 * C, .per_step = z.L});
    add_attention(all, z);
    add_linear(all, z, {.name = "attention proj", .C = C, .OC = C, .per_step = z.L, .residual = true});
    add_linear(all, z, {.name = "fc", .C = C, .OC = 4 * C, .per_step = z.L, .gelu_after = true});
    add_linear(all, z,
               {.name = "mlp proj", .C = 4 * C, .OC = C, .per_step = z.L, .gelu_before = true, .residual = true});
    add_linear(all, z, {.name = "head", .C = C, .OC = z.Vp(), .per_step = 1, .head = true});
    add_gelu(all, z);
    add_loss(all, z);
    add_optimizer(all, z);
    return all;
}

struct Report {
    JsonLines json;
    int failed = 0;
};

// One line of the table and of the file; a step's share of the time in ms.
double report(Report& out, const Size& z, const std::string& op, const Row& row, const Samples& us) {
    const double mid = median(us), rate = row.n_bytes / mid / 1e3, speed = row.flop / mid / 1e6;
    fmt::print("  {:32} {:>24} {:10.1f} {:9.0f} {:>9} {:6}\n", op, row.shape, mid, rate,
               row.flop > 0 ? fmt::format("{:.1f}", speed) : "", row.per_step);
    std::fflush(nullptr);
    const auto [least, most] = std::minmax_element(us.begin(), us.end());
    out.json.write({{"type", "op"},
                    {"size", z.name},
                    {"op", op},
                    {"shape", row.shape},
                    {"us", mid},
                    {"us_min", *least},
                    {"us_max", *most},
                    {"n_bytes", row.n_bytes},
                    {"flop", row.flop},
                    {"gb_per_s", rate},
                    {"tflop_per_s", speed},
                    {"per_step", row.per_step}});
    return row.per_step * mid / 1e3;
}

void measure(Bench& bench, const Size& z, const Options& o, Report& out) {
    fmt::print("{}: B {} T {} L {} NH {} C {} V {}\n  {:32} {:>24} {:>10} {:>9} {:>9} {:>6}\n", z.name, z.B, z.T, z.L,
               z.NH, z.C, z.V, "op", "shape", "us", "GB/s", "TFLOP/s", "a step");
    double step_ms = 0;
    bool all = true;
    for (const Op& op : ops_of(z)) {
        if (op.name.find(o.only) == std::string::npos) {
            all = false;
            continue;
        }
        try {
            const Row row = op.make(bench);
            step_ms += report(out, z, op.name, row, bench.time(row.run));
        } catch (const Error& e) {
            // The rest still counts; too little memory is no failure of an op.
            const bool memory = e.code == Exit::memory;
            fmt::print("  {:32} {}\n", op.name, memory ? "left out: not enough memory" : e.what());
            out.failed += !memory;
            all = false;
        }
        bench.forget();
    }
    if (!all) return;
    const double rate = z.BT() / step_ms * 1e3;
    fmt::print("  {} in a row: {:.2f} ms a step, {:.0f} tokens/s\n\n", z.name, step_ms, rate);
    out.json.write({{"type", "step"}, {"size", z.name}, {"step_ms", step_ms}, {"tokens_per_s", rate}});
}

// `attention`: the kernels that training takes on this device.
const Backend& open_backend(const Options& o, std::string& device, std::string& attention) {
    device = attention = "cpu";
    if (o.backend == "cpu") {
        if (o.dtype != "f32") fail(Exit::usage, "--dtype {}: the CPU computes in f32", o.dtype);
        return cpu_backend();
    }
#if KILN_CUDA
    device = open_gpu();
    const bool hopper = o.dtype == "bf16" && cuda_attention_refusal(AttentionKernel::sm90).empty();
    attention = hopper ? "sm90" : "portable";
    return cuda_backend(hopper ? AttentionKernel::sm90 : AttentionKernel::portable);
#else
    fail(Exit::usage, "--backend cuda: this build was made without CUDA");
#endif
}

void run(const Options& o) {
    std::string device, attention;
    const Backend& k = open_backend(o, device, attention);
    Report out{.json = JsonLines(o.settings.json)};
    out.json.write_run(device, o.dtype, o.settings);
    out.json.write({{"type", "attention"}, {"kernels", attention}});
    fmt::print("{} in {}, attention {}, median of {}\n", device, o.dtype, attention, o.settings.samples);
    Bench bench(k, o.dtype == "bf16" ? DType::bf16 : DType::f32, o.settings);
    for (const std::string& name : o.sizes)
        for (const Size& z : kSizes)
            if (name == z.name) measure(bench, z, o, out);
    if (out.failed > 0) fail(Exit::internal, "{} op(s) failed", out.failed);
}
}  // namespace

int main(int argc, char** argv) {
    Options o;
    CLI::App app("time, memory rate and arithmetic rate of each op at the shapes of GPT-2");
    std::vector<std::string> names;
    for (const Size& z : kSizes) names.emplace_back(z.name);
    app.add_option("--size", o.sizes, "repeatable")->check(CLI::IsMember(names))->capture_default_str();
    app.add_option("--backend", o.backend)->check(CLI::IsMember({"cpu", "cuda"}))->capture_default_str();
    app.add_option("--dtype", o.dtype)->check(CLI::IsMember({"f32", "bf16"}))->capture_default_str();
    app.add_option("--only", o.only, "ops whose name contains this");
    add_settings(app, o.settings);
    CLI11_PARSE(app, argc, argv);
    return exit_code_of([&] { run(o); });
}
