#include "bench/timing.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "common/clock.h"

namespace bench {
double median(Samples v) {
    std::sort(v.begin(), v.end());
    const size_t h = v.size() / 2;
    return v.size() % 2 ? v[h] : (v[h - 1] + v[h]) / 2;
}

std::string shape_of(std::initializer_list<size_t> dims) {
    std::string out;
    for (size_t d : dims) out += fmt::format("{}{}", out.empty() ? "" : "x", d);
    return out;
}

// ---- measuring

Bench::Bench(const Backend& k, DType real, const Settings& settings)
    : k_(k), real_(real), n_samples_(settings.samples), stream_(k) {
    if (settings.flush_mib > 0) flush_ = take(size_t(settings.flush_mib) << 20, DType::u8), kept_ = 1;
}

Buf Bench::zeros(size_t n, DType t) {
    const Buf b = take(n, t);
    k_.zero(b.data, b.n_bytes(), stream());
    return b;
}

Buf Bench::like(const Buf& b, double scale) {
    if (!b) return {};
    const bool real = b.dtype == DType::f32 || b.dtype == DType::bf16;
    return real ? filled(b.count, b.dtype, scale) : zeros(b.count, b.dtype);
}

void Bench::forget() {
    k_.synchronize(stream());
    release(kept_);
}

void Bench::warm_up(const Run& run) {
    k_.tune(true);
    try {
        run();
    } catch (...) {
        k_.tune(false);
        throw;
    }
    notes_ += k_.tune(false);
    run();
    k_.synchronize(stream());
}

std::vector<Samples> Bench::sample(const std::vector<Run>& runs) {
    const MarkOwner from(k_), to(k_);
    std::vector<Samples> us(runs.size());
    for (int round = 0; round < n_samples_; round++)
        for (size_t i = 0; i < runs.size(); i++) {
            if (flush_) k_.zero(flush_.data, flush_.n_bytes(), stream());
            k_.set_mark(from.get(), stream());
            runs[i]();
            k_.set_mark(to.get(), stream());
            k_.wait_mark(to.get());
            us[i].push_back(1e3 * k_.ms_between(from.get(), to.get()));
        }
    return us;
}

Samples Bench::time(const Run& run) {
    warm_up(run);
    return sample({run})[0];
}

Buf Bench::take(size_t n, DType t) {
    const Buf b(k_.memory.alloc(n * dtype_bytes(t)), n, t);
    taken_.push_back(b.data);
    return b;
}

void Bench::release(size_t keep) {
    for (; taken_.size() > keep; taken_.pop_back()) k_.memory.free(taken_.back());
}

Buf Bench::filled(size_t n, DType t, double scale) {
    if (numbers_.empty()) {
        std::mt19937 gen(1);
        std::normal_distribution<float> dist;
        for (size_t i = 0; i < (size_t(1) << 20) + 7; i++) numbers_.push_back(dist(gen));  // no power of two
    }
    return t == DType::bf16 ? fill<bf16>(take(n, t), scale) : fill<float>(take(n, t), scale);
}

template <class T>
Buf Bench::fill(const Buf& b, double scale) {
    std::vector<T> piece(std::min(b.count, numbers_.size()));
    for (size_t i = 0; i < piece.size(); i++) piece[i] = T(numbers_[i] * float(scale));
    for (size_t first = 0; first < b.count; first += piece.size()) {
        const size_t n = std::min(piece.size(), b.count - first);
        k_.upload(b.slice(first, n).data, piece.data(), n * sizeof(T), stream());
    }
    k_.synchronize(stream());
    return b;
}

// ---- peaks

namespace {
constexpr double kLongEnoughUs = 5e3;

// Doubles the work until the fastest of a few calls is long enough, or up to `largest`, and measures the last size:
// smaller work shows launches and caches, not the device's limit.  Returns the size and its least time.
template <class Make>
std::pair<int, double> grow(Bench& bench, int smallest, int largest, const Make& make) {
    for (int size = smallest;; size *= 2) {
        const Bench::Run run = make(size);
        run();
        run();
        bench.k().synchronize(bench.stream());
        double us = HUGE_VAL;
        for (int i = 0; i < 3; i++) {
            const Stopwatch watch;
            run();
            bench.k().synchronize(bench.stream());
            us = std::min(us, 1e3 * watch.ms());
        }
        const bool enough = us > kLongEnoughUs || size >= largest;
        if (enough) us = std::ranges::min(bench.time(run));
        bench.forget();
        if (enough) return {size, us};
    }
}
}  // namespace

Peaks measure_peaks(Bench& bench) {
    Peaks p;
    const auto [kib, copy_us] = grow(bench, 64, 1 << 20, [&](int size) -> Bench::Run {
        const size_t n = size_t(size) * 1024 / 8;  // floats; read once and written once
        const Cast c{.y = bench.stat(n), .x = bench.stat(n)};
        return [=, &bench] { bench.k().cast(c, bench.stream()); };
    });
    p.copy_bytes = size_t(kib) << 10;
    p.gb_per_s = double(p.copy_bytes) / copy_us / 1e3;
    const auto [side, gemm_us] = grow(bench, 64, 8192, [&](int size) -> Bench::Run {
        const size_t n = size_t(size) * size_t(size);
        const Linear l{
            .y = bench.real(n), .x = bench.real(n), .w = bench.real(n, 0.02), .BT = size, .C = size, .OC = size};
        return [=, &bench] { bench.k().linear_forward(l, bench.stream()); };
    });
    p.gemm_side = side;
    p.tflop_per_s = 2.0 * side * double(side) * side / gemm_us / 1e6;
    return p;
}

double Peaks::bound_us(double n_bytes, double flop) const {
    return std::max(n_bytes / gb_per_s / 1e3, flop / tflop_per_s / 1e6);
}

bool Peaks::bound_by_flop(double n_bytes, double flop) const {
    return flop / tflop_per_s / 1e6 > n_bytes / gb_per_s / 1e3;
}

// ---- results

JsonLines::JsonLines(const std::string& path) : path_(path) {
    if (!path.empty()) file_.open(path);
    check();
}

void JsonLines::write(const nlohmann::ordered_json& line) {
    if (path_.empty()) return;
    file_ << line.dump() << std::endl;
    check();
}

void JsonLines::write_run(const std::string& device, const std::string& dtype, const Settings& s) {
    write({{"type", "run"},
           {"device", device},
           {"dtype", dtype},
           {"samples", s.samples},
           {"flush_mib", s.flush_mib},
           {"time", utc_now()}});
}

void JsonLines::check() {
    if (!file_) fail(Exit::io, "{}: cannot be written", path_);
}
}  // namespace bench
