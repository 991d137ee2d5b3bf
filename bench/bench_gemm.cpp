// Compares kiln's matrix products with oneDNN's own: every product of one training step of GPT-2, by kiln's fixed tiles
// and by one native multi-threaded dnnl_sgemm with the same transposes, in turn so that drift cancels.  Operands rotate
// through more memory than the caches hold, as in a step.  Prints one JSON object; times are medians, except
// ratio_of_best, which is of the least times.
//
//     bench_gemm --batch 4 --context 64 --layers 12 --embd 768 --vocab 50257 --threads 2 --repeats 7
#include <oneapi/dnnl/dnnl.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "common/clock.h"
#include "kernels/cpu/gemm.h"

namespace {
struct Options {
    int batch = 4, context = 64, layers = 12, embd = 768, vocab = 50257, threads = 2, repeats = 7;
};
struct Product {
    std::string name;
    int M, N, K;
    bool a_transposed, b_transposed;
    int count;  // per step
};
struct Times {
    double native_ms = 0, kiln_ms = 0;            // medians
    double native_best_ms = 0, kiln_best_ms = 0;  // least times: the only steady figure on a shared machine
};

// The three products of a Linear (BT, C) -> (BT, OC) that a step computes `count` times.
void add_linear(std::vector<Product>& all, const std::string& name, int BT, int C, int OC, bool w_transposed,
                int count) {
    all.push_back({name + ".forward", BT, OC, C, false, w_transposed, count});
    all.push_back({name + ".dx", BT, C, OC, false, !w_transposed, count});
    all.push_back({name + ".dw", w_transposed ? OC : C, w_transposed ? C : OC, BT, true, false, count});
}

std::vector<Product> step_products(const Options& o) {
    const int BT = o.batch * o.context, C = o.embd, Vp = (o.vocab + 127) / 128 * 128;
    std::vector<Product> all;
    add_linear(all, "qkv", BT, C, 3 * C, false, o.layers);
    add_linear(all, "attention_proj", BT, C, C, false, o.layers);
    add_linear(all, "fc", BT, C, 4 * C, false, o.layers);
    add_linear(all, "mlp_proj", BT, 4 * C, C, false, o.layers);
    add_linear(all, "head", BT, C, Vp, true, 1);
    return all;
}

void native(const cpu::Gemm<float>& g) {
    const int lda = g.a_transposed ? g.M : g.K, ldb = g.b_transposed ? g.K : g.N;
    dnnl_sgemm(g.a_transposed ? 'T' : 'N', g.b_transposed ? 'T' : 'N', g.M, g.N, g.K, 1.0f, g.a, lda, g.b, ldb, 0.0f,
               g.c, g.N);
}

double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    const size_t h = v.size() / 2;
    return v.size() % 2 ? v[h] : (v[h - 1] + v[h]) / 2;
}

// Numbers in [-0.5, 0.5); neither zeros nor denormals.
std::vector<float> numbers(size_t n) {
    std::vector<float> v(n);
    for (size_t i = 0; i < n; i++) v[i] = float(i * 7919 % 1000) / 1000 - 0.4995f;
    return v;
}

Times measure(const Product& p, int repeats) {
    const size_t na = size_t(p.M) * p.K, nb = size_t(p.K) * p.N, nc = size_t(p.M) * p.N;
    constexpr size_t kRotate = size_t(1) << 25;  // floats: 128 MiB, a few times the last-level cache
    const size_t sets = std::clamp<size_t>(kRotate / (na + nb + nc), 2, 64);
    std::vector<std::vector<float>> a, b, c;
    for (size_t s = 0; s < sets; s++) a.push_back(numbers(na)), b.push_back(numbers(nb)), c.push_back(numbers(nc));

    size_t next = 0;
    const auto time = [&](auto&& run) {
        const size_t s = next++ % sets;
        const cpu::Gemm<float> g = {.c = c[s].data(),
                                    .a = a[s].data(),
                                    .b = b[s].data(),
                                    .M = p.M,
                                    .N = p.N,
                                    .K = p.K,
                                    .a_transposed = p.a_transposed,
                                    .b_transposed = p.b_transposed};
        const Stopwatch watch;
        run(g);
        return watch.ms();
    };
    time(native);  // compiles the library's kernels, starts the threads
    time(cpu::gemm<float>);
    std::vector<double> native_ms, kiln_ms;
    for (int r = 0; r < repeats; r++) {
        native_ms.push_back(time(native));
        kiln_ms.push_back(time(cpu::gemm<float>));
    }
    return {median(native_ms), median(kiln_ms), *std::min_element(native_ms.begin(), native_ms.end()),
            *std::min_element(kiln_ms.begin(), kiln_ms.end())};
}

void report(const Options& o) {
    fmt::print("{{\"threads\": {}, \"repeats\": {}, \"gemms\": [", omp_get_max_threads(), o.repeats);
    Times total;
    const char* separator = "\n";
    for (const Product& p : step_products(o)) {
        const Times t = measure(p, o.repeats);
        const double gflop = 2e-9 * p.M * p.N * p.K;
        fmt::print(
            "{}  {{\"name\": \"{}\", \"M\": {}, \"N\": {}, \"K\": {}, \"count\": {}, \"native_ms\": {:.4f}, "
            "\"kiln_ms\": {:.4f}, \"native_gflops\": {:.1f}, \"kiln_gflops\": {:.1f}}}",
            separator, p.name, p.M, p.N, p.K, p.count, t.native_ms, t.kiln_ms, gflop / t.native_ms * 1e3,
            gflop / t.kiln_ms * 1e3);
        std::fflush(stdout);
        separator = ",\n";
        total.native_ms += p.count * t.native_ms;
        total.kiln_ms += p.count * t.kiln_ms;
        total.native_best_ms += p.count * t.native_best_ms;
        total.kiln_best_ms += p.count * t.kiln_best_ms;
    }
    fmt::print(
        "],\n \"native_ms_total\": {:.3f}, \"kiln_ms_total\": {:.3f}, \"ratio\": {:.4f}, \"ratio_of_best\": {:.4f}}}\n",
        total.native_ms, total.kiln_ms, total.kiln_ms / total.native_ms, total.kiln_best_ms / total.native_best_ms);
}
}  // namespace

int main(int argc, char** argv) {
    Options o;
    CLI::App app("matrix products of one training step: kiln's tiles against native oneDNN");
    app.add_option("--batch", o.batch, "sequences")->check(CLI::PositiveNumber)->capture_default_str();
    app.add_option("--context", o.context, "tokens of a sequence")->check(CLI::PositiveNumber)->capture_default_str();
    app.add_option("--layers", o.layers)->check(CLI::PositiveNumber)->capture_default_str();
    app.add_option("--embd", o.embd)->check(CLI::PositiveNumber)->capture_default_str();
    app.add_option("--vocab", o.vocab, "padded to a multiple of 128")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    app.add_option("--threads", o.threads)->check(CLI::PositiveNumber)->capture_default_str();
    app.add_option("--repeats", o.repeats)->check(CLI::PositiveNumber)->capture_default_str();
    CLI11_PARSE(app, argc, argv);
    omp_set_num_threads(o.threads);
    try {
        report(o);
    } catch (const Error& e) {
        fmt::print(stderr, "{}\n", e.what());
        return int(e.code);
    }
}
