// Shared by the benchmarks of ops: memory of the measured ops, samples, the device's limits, and the file of
// results.
//
// A sample times one call between two marks.  Before each sample a scratch buffer larger than the L2 cache is
// overwritten: the op finds none of its operands in the cache, and the host has queued all of the op's launches before
// the overwriting ends.  The figure is the median of the samples, after two calls that are not counted.
#pragma once
#include <nlohmann/json.hpp>

#include <fstream>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "kernels/owners.h"

namespace bench {
struct Settings {
    int samples = 21, flush_mib = 256;
    std::string json;  // path of the results; empty: none
};

using Samples = std::vector<double>;  // microseconds
double median(Samples v);
std::string shape_of(std::initializer_list<size_t> dims);  // "64x1024"

// A stream of the backend, and the memory of the op that is being measured.
class Bench {
  public:
    using Run = std::function<void()>;

    Bench(const Backend& k, DType real, const Settings& settings);
    ~Bench() { release(0); }
    Bench(const Bench&) = delete;
    Bench& operator=(const Bench&) = delete;

    const Backend& k() const { return k_; }
    Stream stream() const { return stream_.get(); }
    DType real_type() const { return real_; }
    double real_bytes(double n) const { return n * double(dtype_bytes(real_)); }

    // Normally distributed numbers: a matrix product's power, and so its time, depends on the values.
    Buf real(size_t n, double scale = 1) { return filled(n, real_, scale); }
    Buf stat(size_t n, double scale = 1) { return filled(n, DType::f32, scale); }
    Buf zeros(size_t n, DType t);
    // A buffer of b's size and dtype; integers are zeros, and an absent buffer stays absent.
    Buf like(const Buf& b, double scale = 1);
    template <class T>
    Buf copy_of(const std::vector<T>& v) {
        const Buf b = take(v.size(), dtype_of<T>::value);
        k_.upload(b.data, v.data(), b.n_bytes(), stream());
        k_.synchronize(stream());
        return b;
    }
    void forget();  // frees the buffers made so far

    // Makes the two calls that are not counted; the first chooses algorithms of matrix products by timing, as before a
    // training run.  Rethrows the errors of `run`.
    void warm_up(const Run& run);
    const std::string& notes() const { return notes_; }  // on warm_up()'s choices, a line each
    // Samples of each run, taken in turn, so that a change of clocks hits all runs.
    std::vector<Samples> sample(const std::vector<Run>& runs);
    Samples time(const Run& run);

  private:
    Buf take(size_t n, DType t);
    void release(size_t keep);
    Buf filled(size_t n, DType t, double scale);
    template <class T>
    Buf fill(const Buf& b, double scale);

    const Backend& k_;
    const DType real_;
    const int n_samples_;
    const StreamOwner stream_;
    Buf flush_;        // (flush_mib MiB) u8
    size_t kept_ = 0;  // so many of taken_ stay to the end
    std::vector<void*> taken_;
    std::vector<float> numbers_;
    std::string notes_;
};

// The device's rates at the two things that bound an op, measured in this process: copying memory (bytes read and
// written both count) and a square matrix product in the computing type.  The fastest sample of each counts.  Sizes
// grow until one call is long enough, so the same code serves a GPU, a CPU and the emulator.
struct Peaks {
    double gb_per_s = 0, tflop_per_s = 0;
    size_t copy_bytes = 0;  // read and written by one copy
    int gemm_side = 0;      // M = N = K
    // The least time in microseconds that so much work takes on this device.
    double bound_us(double n_bytes, double flop) const;
    bool bound_by_flop(double n_bytes, double flop) const;
};
Peaks measure_peaks(Bench& bench);

// The file of Settings::json: one JSON object per line, flushed after every line.  Without a path nothing is written.
class JsonLines {
  public:
    explicit JsonLines(const std::string& path);
    void write(const nlohmann::ordered_json& line);
    void write_run(const std::string& device, const std::string& dtype, const Settings& s);

  private:
    void check();
    std::string path_;
    std::ofstream file_;
};
}  // namespace bench
