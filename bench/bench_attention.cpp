// Times the attention kernels of the CUDA backend side by side: all kernels of this build that run here, in turn, in
// one process.  bf16, causal, normally distributed numbers, no dropout.
//
//     bench_attention                                        the shapes of the goals below
//     bench_attention --shape 8x16x2048x64 --kernel sm90 --kernel portable --json attention.jsonl
//
// bench/timing.h says how a sample is taken.  Each round takes one sample of every kernel, so that a change of clocks
// hits all kernels.
//
// FLOP counts useful work only: 2 per multiply-add and the causal half of T^2; two products in the forward, 2.5 times
// as many in the backward, which computes the scores again.  Work beyond that does not raise a kernel's rate.
#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdio>
#include <optional>

#include "bench/timing.h"
#include "kernels/cuda/cuda.h"
#include "run/attention_kernels.h"

namespace emulator {
[[gnu::weak]] void reset_device();  // linked where the CUDA backend runs on the emulator
}

using namespace bench;

namespace {
constexpr AttentionKernel kKernels[] = {AttentionKernel::portable, AttentionKernel::sm90, AttentionKernel::cudnn,
                                        AttentionKernel::cudnn_fastest};

struct Options {
    std::vector<std::string> shapes = {"64x12x1024x64", "16x25x1024x64", "4x16x4096x128"};
    std::vector<std::string> kernels;  // empty: all that can run
    Settings settings;
};

struct Shape {
    int B, NH, T, HS;
    std::string text() const { return shape_of({size_t(B), size_t(NH), size_t(T), size_t(HS)}); }
    size_t size() const { return size_t(B) * T * NH * HS; }
    size_t stats() const { return size_t(B) * T * NH; }
    double flop(bool backward) const { return (backward ? 2.5 : 1) * 2.0 * double(size()) * T; }
};
Shape parse_shape(const std::string& text) {
    Shape z{};
    int length = 0;
    const int n = std::sscanf(text.c_str(), "%dx%dx%dx%d%n", &z.B, &z.NH, &z.T, &z.HS, &length);
    // With other head sizes sm90 and cudnn would run, and time, the portable kernels.
    if (n != 4 || size_t(length) != text.size() || z.B < 1 || z.NH < 1 || z.T < 1 || !is_fast_head(z.HS))
        fail(Exit::usage, "--shape {}: expected BxNHxTxHS with HS 64 or 128, such as 64x12x1024x64", text);
    return z;
}

// One row of the table.
struct Result {
    std::string shape;
    bool backward;
    AttentionKernel kernel;
    double us, tflop_per_s;
    double clock_hz;
    std::optional<double> share;  // of the tensor cores' rate at this clock; where that is known
};
const char* way(bool backward) { return backward ? "backward" : "forward"; }
const Result* find(const std::vector<Result>& all, const std::string& shape, bool backward, AttentionKernel kernel) {
    for (const Result& r : all)
        if (r.shape == shape && r.backward == backward && r.kernel == kernel) return &r;
    return nullptr;
}
// How many times as fast as kernel `other` at the same work.
std::optional<double> speed_beside(const std::vector<Result>& all, const Result& r, AttentionKernel other) {
    const Result* const o = find(all, r.shape, r.backward, other);
    return o ? std::optional(o->us / r.us) : std::nullopt;
}

// ---- goals: for an H200 or H100
//
// Clocks differ from machine to machine and with the load.  A goal is therefore a share of the rate that the tensor
// cores reach at the clock that was measured right behind the shape's samples (4096 FLOP a cycle and multiprocessor,
// dense bf16, of compute capability 9.0), or a ratio to another kernel in the same program.
constexpr double kFlopPerCycle = 4096;

struct Goal {
    const char* shape;
    bool backward;
    AttentionKernel kernel;
    double least;                                // share of the peak; with `beside`, the ratio of speeds
    std::optional<AttentionKernel> beside = {};  // the kernel to compare with
};
constexpr bool kForward = false, kBackward = true;
constexpr AttentionKernel kSm90 = AttentionKernel::sm90, kPortable = AttentionKernel::portable;
// clang-format off
const Goal kGoals[] = {
    {"64x12x1024x64", kForward,  kSm90, 1.0, AttentionKernel::cudnn},
    {"64x12x1024x64", kForward,  kSm90, 0.45},
    {"64x12x1024x64", kBackward, kSm90, 1.2, AttentionKernel::cudnn},
    {"64x12x1024x64", kBackward, kSm90, 0.95, AttentionKernel::cudnn_fastest},
    {"16x25x1024x64", kForward,  kSm90, 1.0, AttentionKernel::cudnn},
    {"16x25x1024x64", kForward,  kSm90, 0.45},
    {"16x25x1024x64", kBackward, kSm90, 1.2, AttentionKernel::cudnn},
    {"16x25x1024x64", kBackward, kSm90, 0.95, AttentionKernel::cudnn_fastest},
    {"4x16x4096x128", kForward,  kSm90, 0.65},
    {"4x16x4096x128", kBackward, kSm90, 0.95, AttentionKernel::cudnn_fastest},
    {"64x12x1024x64", kForward,  kPortable, 0.20},
    {"64x12x1024x64", kBackward, kPortable, 0.14},
};
// clang-format on

// The figure reached for the goal; none where the goal's kernel was not measured.
std::optional<double> reached(const Goal& g, const std::vector<Result>& all) {
    const Result* const r = find(all, g.shape, g.backward, g.kernel);
    if (!r) return std::nullopt;
    return g.beside ? speed_beside(all, *r, *g.beside) : r->share;
}
bool goals_are_for(const std::string& device) {
    return (device.find("H200") != std::string::npos || device.find("H100") != std::string::npos) &&
           cuda_attention_refusal(AttentionKernel::sm90).empty();
}

// ---- measuring

struct Report {
    JsonLines json;
    std::vector<Result> results;
    int failed = 0;
};

std::string times(const std::optional<double>& ratio) { return ratio ? fmt::format("{:.2f}x", *ratio) : ""; }
nlohmann::ordered_json or_null(const std::optional<double>& v) { return v ? nlohmann::ordered_json(*v) : nullptr; }

// Reports one shape, forward or backward, once all kernels are measured.
void report(Report& out, const Shape& z, bool backward, const std::vector<AttentionKernel>& kernels,
            const std::vector<Samples>& us, double clock_hz) {
    const double flop = z.flop(backward);
    const bool known = cuda::open_capability() == 90;
    const double peak = kFlopPerCycle * cuda::n_multiprocessors() * clock_hz;
    for (size_t i = 0; i < kernels.size(); i++) {
        const double mid = median(us[i]), rate = flop / (mid * 1e-6);
        out.results.push_back({z.text(), backward, kernels[i], mid, rate / 1e12, clock_hz,
                               known ? std::optional(rate / peak) : std::nullopt});
    }
    for (size_t i = 0; i < kernels.size(); i++) {
        const Result& r = *find(out.results, z.text(), backward, kernels[i]);
        const auto [least, most] = std::minmax_element(us[i].begin(), us[i].end());
        const auto beside_cudnn = speed_beside(out.results, r, AttentionKernel::cudnn),
                   beside_fastest = speed_beside(out.results, r, AttentionKernel::cudnn_fastest);
        fmt::print("{:16} {:9} {:14} {:10.1f} {:10.1f} {:10.1f} {:9.1f} {:>8} {:>14}\n", r.shape, way(backward),
                   attention_name(r.kernel), r.us, *least, *most, r.tflop_per_s, times(beside_cudnn),
                   times(beside_fastest));
        out.json.write({{"type", "attention"},
                        {"shape", r.shape},
                        {"way", way(backward)},
                        {"kernel", attention_name(r.kernel)},
                        {"us", r.us},
                        {"us_min", *least},
                        {"us_max", *most},
                        {"flop", flop},
                        {"tflop_per_s", r.tflop_per_s},
                        {"clock_mhz", r.clock_hz / 1e6},
                        {"share_of_peak", or_null(r.share)},
                        {"beside_cudnn", or_null(beside_cudnn)},
                        {"beside_cudnn_fastest", or_null(beside_fastest)}});
    }
    std::fflush(nullptr);
}

void measure(Bench& bench, const Shape& z, const std::vector<AttentionKernel>& kernels, Report& out) {
    struct Call {
        AttentionKernel kernel;
        Bench::Run run[2];  // forward, backward
    };
    const Buf qkv = bench.real(3 * z.size()), dy = bench.real(z.size()), dqkv = bench.real(3 * z.size()),
              scratch = bench.stat(z.stats());
    std::vector<Call> calls;
    for (const AttentionKernel kernel : kernels) {
        const Backend& k = cuda_backend(kernel);
        // Each kernel has its own y and lse: the backward reads the results of the forward.
        const Attention a{.y = bench.real(z.size()),
                          .lse = bench.stat(z.stats()),
                          .qkv = qkv,
                          .dropout = {},
                          .B = z.B,
                          .T = z.T,
                          .NH = z.NH,
                          .HS = z.HS};
        const AttentionGrad g{.dqkv = dqkv,
                              .dy = dy,
                              .qkv = qkv,
                              .y = a.y,
                              .lse = a.lse,
                              .scratch = scratch,
                              .dropout = {},
                              .B = z.B,
                              .T = z.T,
                              .NH = z.NH,
                              .HS = z.HS};
        calls.push_back({kernel,
                         {[=, &k, &bench] { k.attention_forward(a, bench.stream()); },
                          [=, &k, &bench] { k.attention_backward(g, bench.stream()); }}});
    }
    for (const bool backward : {kForward, kBackward}) {
        std::vector<AttentionKernel> measured;
        std::vector<Bench::Run> runs;
        // Where one kernel fails, the others still count.
        std::erase_if(calls, [&](const Call& c) {
            try {
                bench.warm_up(c.run[backward]);
            } catch (const Error& e) {
                fmt::print("{:16} {:9} {:14} {}\n", z.text(), way(backward), attention_name(c.kernel), e.what());
                out.failed++;
                return true;
            }
            measured.push_back(c.kernel), runs.push_back(c.run[backward]);
            return false;
        });
        const std::vector<Samples> us = bench.sample(runs);
        report(out, z, backward, measured, us, cuda::clock_hz(bench.stream()));
    }
}

void report_goals(Report& out, const std::string& device) {
    const bool here = goals_are_for(device);
    fmt::print("\nGoals{}\n", here ? "" : ": for an H200 or H100 alone");
    for (const Goal& g : kGoals) {
        const std::optional<double> got = here ? reached(g, out.results) : std::nullopt;
        const char* const verdict = !got ? "not measured" : *got >= g.least ? "met" : "not met";
        const std::string what = g.beside ? fmt::format("{:.2f}x {}", g.least, attention_name(*g.beside))
                                          : fmt::format("{:.0f} % of the peak", 100 * g.least);
        fmt::print("{:16} {:9} {:14} {:22} {:>8}  {}\n", g.shape, way(g.backward), attention_name(g.kernel), what,
                   !got       ? ""
                   : g.beside ? fmt::format("{:.2f}", *got)
                              : fmt::format("{:.0f} %", 100 * *got),
                   verdict);
        out.json.write({{"type", "goal"},
                        {"shape", g.shape},
                        {"way", way(g.backward)},
                        {"kernel", attention_name(g.kernel)},
                        {"beside", g.beside ? nlohmann::ordered_json(attention_name(*g.beside)) : nullptr},
                        {"least", g.least},
                        {"got", or_null(got)},
                        {"result", verdict}});
    }
}

// The kernels asked for, or all that can run; prints why a kernel cannot.
std::vector<AttentionKernel> choose(const Options& o, Report& out) {
    std::vector<AttentionKernel> chosen;
    for (const AttentionKernel kernel : kKernels) {
        const std::string name = attention_name(kernel), refusal = cuda_attention_refusal(kernel);
        const bool asked_for = std::find(o.kernels.begin(), o.kernels.end(), name) != o.kernels.end();
        if (!o.kernels.empty() && !asked_for) continue;
        if (asked_for && !refusal.empty()) fail(Exit::usage, "--kernel {}: {}", name, refusal);
        out.json.write({{"type", "kernel"}, {"kernel", name}, {"refusal", refusal}});
        if (refusal.empty())
            chosen.push_back(kernel);
        else
            fmt::print("without {}: {}\n", name, refusal);
    }
    return chosen;
}

void run(const Options& o) {
    std::vector<Shape> shapes;
    for (const std::string& text : o.shapes) shapes.push_back(parse_shape(text));
    std::string why;
    if (cuda_device_count(&why) == 0) fail(Exit::usage, "no usable GPU: {}", why);
    const std::string device = open_cuda_device(0).name;
    Report out{.json = JsonLines(o.settings.json), .results = {}};
    out.json.write_run(device, "bf16", o.settings);
    fmt::print("{} in bf16, median of {}\n", device, o.settings.samples);
    const std::vector<AttentionKernel> kernels = choose(o, out);
    Bench bench(cuda_backend(), DType::bf16, o.settings);
    fmt::print("{:16} {:9} {:14} {:>10} {:>10} {:>10} {:>9} {:>8} {:>14}\n", "B NH T HS", "", "kernel", "us", "min",
               "max", "TFLOP/s", "to cudnn", "cudnn_fastest");
    for (const Shape& z : shapes) {
        try {
            measure(bench, z, kernels, out);
        } catch (const Error& e) {
            if (e.code != Exit::memory) throw;
            fmt::print("{:16} left out: not enough memory\n", z.text());
        }
        bench.forget();
    }
    report_goals(out, device);
    if (out.failed > 0) fail(Exit::internal, "{} measurement(s) failed", out.failed);
}
}  // namespace

int main(int argc, char** argv) {
    Options o;
    if (emulator::reset_device) o.shapes = {"1x2x160x64", "1x1x130x128"};  // larger shapes take the emulator too long
    CLI::App app("time and arithmetic rate of the attention kernels of a GPU, side by side");
    std::vector<std::string> names;
    for (const AttentionKernel kernel : kKernels) names.emplace_back(attention_name(kernel));
    app.add_option("--shape", o.shapes, "BxNHxTxHS; repeatable")->capture_default_str();
    app.add_option("--kernel", o.kernels, "repeatable; without it all that can run")->check(CLI::IsMember(names));
    app.add_option("--samples", o.settings.samples)->check(CLI::PositiveNumber)->capture_default_str();
    app.add_option("--flush-mib", o.settings.flush_mib, "overwritten before each sample; more than the L2 cache holds")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    app.add_option("--json", o.settings.json, "one JSON object per line");
    CLI11_PARSE(app, argc, argv);
    try {
        run(o);
        return 0;
    } catch (const Error& e) {
        fmt::print(stderr, "error: {}\n", e.what());
        return int(e.code);
    }
}
