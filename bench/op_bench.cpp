#include "bench/op_bench.h"

#include <algorithm>
#include <cstdio>
#include <map>

#include "common/clock.h"
#include "common/config_words.h"

using namespace bench;

namespace {
struct Timed {
    OpRow row;
    Samples us;
    double mid = 0;                                     // microseconds
    double step_us() const { return row.calls * mid; }  // of one training step
};

class Report {
  public:
    Report(const OpBench& o, int n_micro) : o_(o), n_micro_(n_micro), json_(o.settings.json) {}

    void begin(const Peaks& p) {
        const TrainerOptions& z = o_.step;
        const ModelConfig& c = z.model;
        peaks_ = p;
        json_.write({{"type", "run"},
                     {"device", o_.device},
                     {"attention", o_.attention},
                     {"dtype", dtype_name(z.real)},
                     {"commit", o_.commit},
                     {"samples", o_.settings.samples},
                     {"flush_mib", o_.settings.flush_mib},
                     {"time", utc_now()},
                     {"B", z.train.micro_batch_size},
                     {"T", c.T},
                     {"n_layer", c.L},
                     {"n_head", c.NH},
                     {"n_embd", c.C},
                     {"vocab_size", c.V},
                     {"bias", c.bias},
                     {"dropout", c.dropout},
                     {"recompute", word_of(z.train.recompute)},
                     {"n_micro", n_micro_}});
        json_.write({{"type", "peak"},
                     {"gb_per_s", p.gb_per_s},
                     {"copy_bytes", p.copy_bytes},
                     {"tflop_per_s", p.tflop_per_s},
                     {"gemm_side", p.gemm_side}});
        fmt::print("{}, {}{}; {} micro-batch(es) of B {} T {}, L {} NH {} C {} V {}; median of {}\n", o_.device,
                   dtype_name(z.real), o_.attention.empty() ? "" : ", attention " + o_.attention, n_micro_,
                   z.train.micro_batch_size, c.T, c.L, c.NH, c.C, c.V, o_.settings.samples);
        fmt::print("peak, copy of {:.1f} MiB         {:10.1f} GB/s\n", double(p.copy_bytes) / 2 / (1 << 20),
                   p.gb_per_s);
        fmt::print("peak, product of {0} x {0} x {0} {1:10.3f} TFLOP/s\n\n", p.gemm_side, p.tflop_per_s);
        std::fflush(stdout);
    }

    void add(Timed t) {
        const double n_bytes = t.row.cost.n_bytes, flop = t.row.cost.flop;
        const auto [least, most] = std::ranges::minmax_element(t.us);
        json_.write({{"type", "op"},
                     {"op", t.row.name},
                     {"part", t.row.part},
                     {"shape", t.row.shape},
                     {"us", t.mid},
                     {"us_min", *least},
                     {"us_max", *most},
                     {"n_bytes", n_bytes},
                     {"flop", flop},
                     {"gb_per_s", n_bytes / t.mid / 1e3},
                     {"tflop_per_s", flop / t.mid / 1e6},
                     {"bound", peaks_.bound_by_flop(n_bytes, flop) ? "flop" : "bytes"},
                     {"of_peak", peaks_.bound_us(n_bytes, flop) / t.mid},
                     {"calls", t.row.calls}});
        all_.push_back(std::move(t));
    }

    void leave_out(const std::string& op, const Error& e) {
        // The other ops still count; lack of memory is no failure of an op.
        const bool memory = e.code == Exit::memory;
        left_out_.push_back(fmt::format("{:32} {}", op, memory ? "left out: not enough memory" : e.what()));
        n_failed_ += !memory;
    }

    // Prints the table and, when every op was measured, each part's share of the step.
    void end(bool all) {
        double step_us = 0;
        for (const Timed& t : all_) step_us += t.step_us();
        all = all && left_out_.empty();
        fmt::print("{:32} {:>20} {:>11} {:>9} {:>9} {:>8} {:>6} {:>7}\n", "op", "shape", "us", "GB/s", "TFLOP/s",
                   "of peak", "calls", "share");
        for (const Timed& t : all_)
            fmt::print("{:32} {:>20} {:11.1f} {:9.1f} {:>9} {:7.1f}% {:6} {:>7}\n", t.row.name, t.row.shape, t.mid,
                       t.row.cost.n_bytes / t.mid / 1e3,
                       t.row.cost.flop > 0 ? fmt::format("{:.3f}", t.row.cost.flop / t.mid / 1e6) : "",
                       100 * peaks_.bound_us(t.row.cost.n_bytes, t.row.cost.flop) / t.mid, t.row.calls,
                       all && t.row.calls > 0 ? fmt::format("{:.1f}%", 100 * t.step_us() / step_us) : "");
        for (const std::string& line : left_out_) fmt::print("{}\n", line);
        if (all) print_step(step_us);
        std::fflush(stdout);
        if (n_failed_ > 0) fail(Exit::internal, "{} op(s) failed", n_failed_);
    }

  private:
    void print_step(double step_us) {
        std::map<std::string, double> parts;
        std::vector<std::string> order;
        double bound_us = 0;
        for (const Timed& t : all_) {
            if (t.row.calls > 0 && !parts.contains(t.row.part)) order.push_back(t.row.part);
            if (t.row.calls > 0) parts[t.row.part] += t.step_us();
            bound_us += t.row.calls * peaks_.bound_us(t.row.cost.n_bytes, t.row.cost.flop);
        }
        nlohmann::ordered_json shares = nlohmann::ordered_json::object();
        std::string text;
        for (const std::string& part : order) {
            shares[part] = parts[part] / step_us;
            text += fmt::format("{}{} {:.1f}%", text.empty() ? "" : ", ", part, 100 * parts[part] / step_us);
        }
        const double rate = 1e6 * double(o_.step.train.micro_batch_size) * o_.step.model.T * n_micro_ / step_us;
        fmt::print("\nall ops of a step in a row: {:.2f} ms, {:.0f} tokens/s; at the peaks {:.2f} ms\n{}\n",
                   step_us / 1e3, rate, bound_us / 1e3, text);
        json_.write({{"type", "step"},
                     {"step_ms", step_us / 1e3},
                     {"tokens_per_s", rate},
                     {"bound_ms", bound_us / 1e3},
                     {"share", shares}});
    }

    const OpBench& o_;
    const int n_micro_;
    JsonLines json_;
    Peaks peaks_;
    std::vector<Timed> all_;
    std::vector<std::string> left_out_;
    int n_failed_ = 0;
};
}  // namespace

void run_op_bench(const Backend& k, const OpBench& o) {
    StepRecord step = record_step(o.step);
    const auto is_wanted = [&](const OpRow& row) {
        const auto has = [&](const std::string& part) { return row.name.find(part) != std::string::npos; };
        return o.only.empty() || std::ranges::any_of(o.only, has);
    };
    const bool all = std::ranges::all_of(step.rows, is_wanted);
    if (std::ranges::none_of(step.rows, is_wanted)) {
        std::vector<std::string> names;
        for (const OpRow& row : step.rows) names.push_back(row.name);
        fail(Exit::usage, "--only {}: no op has this in its name; there are {}", fmt::join(o.only, " --only "),
             fmt::join(names, ", "));
    }
    Report report(o, step.n_micro);
    Bench bench(k, o.step.real, o.settings);
    report.begin(measure_peaks(bench));
    for (OpRow& row : step.rows) {
        if (!is_wanted(row)) continue;
        try {
            Samples us = bench.time(prepare(bench, row.op));
            const double mid = median(us);
            report.add({row, std::move(us), mid});
        } catch (const Error& e) { report.leave_out(row.name, e); }
        bench.forget();
    }
    if (!bench.notes().empty()) fmt::print("{}\n", bench.notes());
    report.end(all);
}
