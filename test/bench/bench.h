// What the benchmarks of ops share: the backend with the memory of what is measured, the samples, the flags, the file.
//
// One sample is one call between two marks.  Before it a scratch buffer larger than the L2 cache is overwritten: the op
// starts with nothing of its operands in the cache, and the host has given all its launches to the stream before the
// overwriting ends.  The figure is the median of the samples, after two calls that are not counted.
#pragma once
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/error.h"
#include "kernels/ops.h"

namespace bench {
struct Settings {
    int samples = 21, flush_mib = 256;
    std::string json;
};
inline void add_settings(CLI::App& app, Settings& s) {
    app.add_option("--samples", s.samples)->check(CLI::PositiveNumber)->capture_default_str();
    app.add_option("--flush-mib", s.flush_mib, "overwritten before each sample; more than the L2 cache holds")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    app.add_option("--json", s.json, "one JSON object per line");
}

using Samples = std::vector<double>;  // microseconds
inline double median(Samples v) {
    std::sort(v.begin(), v.end());
    const size_t h = v.size() / 2;
    return v.size() % 2 ? v[h] : (v[h - 1] + v[h]) / 2;
}

inline std::string shape_of(std::initializer_list<size_t> dims) {
    std::string out;
    for (size_t d : dims) out += fmt::format("{}{}", out.empty() ? "" : "x", d);
    return out;
}

// The backend, and the memory of what is being measured.
class Bench {
  public:
    using Run = std::function<void()>;

    Bench(const Backend& k, DType real, const Settings& settings)
        : k_(k), real_(real), n_samples_(settings.samples), s_(k.open_stream()) {
        if (settings.flush_mib > 0) flush_ = take(size_t(settings.flush_mib) << 20, DType::u8), kept_ = 1;
    }
    ~Bench() {
        release(0);
        k_.close_stream(s_);
    }
    Bench(const Bench&) = delete;
    Bench& operator=(const Bench&) = delete;

    const Backend& k() const { return k_; }
    Stream stream() const { return s_; }
    DType real_type() const { return real_; }
    double real_bytes(double n) const { return n * double(dtype_bytes(real_)); }

    // Normal numbers: what data holds decides how much power, and so time, a matrix product takes.
    Buf real(size_t n, double scale = 1) { return filled(n, real_, scale); }
    Buf stat(size_t n, double scale = 1) { return filled(n, DType::f32, scale); }
    Buf zeros(size_t n, DType t) {
        const Buf b = take(n, t);
        k_.zero(b.data, b.n_bytes(), s_);
        return b;
    }
    template <class T>
    Buf copy_of(const std::vector<T>& v) {
        const Buf b = take(v.size(), dtype_of<T>::value);
        k_.upload(b.data, v.data(), b.n_bytes(), s_);
        k_.synchronize(s_);
        return b;
    }
    void forget() {
        k_.synchronize(s_);
        release(kept_);
    }

    // The two calls that are not counted.  Throws what they end with.
    void warm_up(const Run& run) {
        run();
        run();
        k_.synchronize(s_);
    }
    // The samples of each, taken in turn, so that a change of clocks hits all.
    std::vector<Samples> sample(const std::vector<Run>& runs) {
        const auto mark = [&] { return std::unique_ptr<Mark, void (*)(Mark*)>(k_.new_mark(), k_.free_mark); };
        const auto from = mark(), to = mark();
        std::vector<Samples> us(runs.size());
        for (int round = 0; round < n_samples_; round++)
            for (size_t i = 0; i < runs.size(); i++) {
                if (flush_) k_.zero(flush_.data, flush_.n_bytes(), s_);
                k_.set_mark(from.get(), s_);
                runs[i]();
                k_.set_mark(to.get(), s_);
                k_.wait_mark(to.get());
                us[i].push_back(1e3 * k_.ms_between(from.get(), to.get()));
            }
        return us;
    }
    Samples time(const Run& run) {
        warm_up(run);
        return sample({run})[0];
    }

  private:
    Buf take(size_t n, DType t) {
        const Buf b(k_.memory.alloc(n * dtype_bytes(t)), n, t);
        taken_.push_back(b.data);
        return b;
    }
    void release(size_t keep) {
        for (; taken_.size() > keep; taken_.pop_back()) k_.memory.free(taken_.back());
    }
    Buf filled(size_t n, DType t, double scale) {
        if (numbers_.empty()) {
            std::mt19937 gen(1);
            std::normal_distribution<float> dist;
            for (size_t i = 0; i < (size_t(1) << 20) + 7; i++) numbers_.push_back(dist(gen));  // no power of two
        }
        return t == DType::bf16 ? fill<bf16>(take(n, t), scale) : fill<float>(take(n, t), scale);
    }
    template <class T>
    Buf fill(const Buf& b, double scale) {
        std::vector<T> piece(std::min(b.count, numbers_.size()));
        for (size_t i = 0; i < piece.size(); i++) piece[i] = T(numbers_[i] * float(scale));
        for (size_t first = 0; first < b.count; first += piece.size()) {
            const size_t n = std::min(piece.size(), b.count - first);
            k_.upload(b.slice(first, n).data, piece.data(), n * sizeof(T), s_);
        }
        k_.synchronize(s_);
        return b;
    }

    const Backend& k_;
    DType real_;
    int n_samples_;
    Stream s_;
    Buf flush_;
    size_t kept_ = 0;  // of taken_, to the end
    std::vector<void*> taken_;
    std::vector<float> numbers_;
};

// The file of --json, complete after every line; without one nothing is written.
class JsonLines {
  public:
    explicit JsonLines(const std::string& path) : path_(path) {
        if (!path.empty()) file_.open(path);
        check();
    }
    void write(const nlohmann::ordered_json& line) {
        if (path_.empty()) return;
        file_ << line.dump() << std::endl;
        check();
    }
    void write_run(const std::string& device, const std::string& dtype, const Settings& s) {
        write({{"type", "run"},
               {"device", device},
               {"dtype", dtype},
               {"samples", s.samples},
               {"flush_mib", s.flush_mib},
               {"time", utc_now()}});
    }

  private:
    void check() {
        if (!file_) fail(Exit::io, "{}: cannot be written", path_);
    }
    std::string path_;
    std::ofstream file_;
};

// The name of the first GPU, which is now this process's.
inline std::string open_gpu() {
    std::string why;
    if (cuda_device_count(&why) == 0) fail(Exit::usage, "no usable GPU: {}", why);
    return open_cuda_device(0).name;
}

// The exit code of a benchmark.
inline int exit_code_of(const std::function<void()>& run) {
    try {
        run();
        return 0;
    } catch (const Error& e) {
        fmt::print(stderr, "error: {}\n", e.what());
        return int(e.code);
    }
}
}  // namespace bench
