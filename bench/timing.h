// What benchmarks of ops share: the memory of what is measured, the samples, the device's own limits, the file of
// results.
//
// One sample is one call between two marks.  Before it a scratch buffer larger than the L2 cache is overwritten: the op
// starts with nothing of its operands in the cache, and the host has given all its launches to the stream before the
// overwriting ends.  The figure is the median of the samples, after two calls that are not counted.
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
    std::string json;  // file; empty: none
};

using Samples = std::vector<double>;  // microseconds
double median(Samples v);
std::string shape_of(std::initializer_list<size_t> dims);  // "64x1024"

// A stream of the backend, and the memory of what is being measured.
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

    // Normal numbers: what data holds decides how much power, and so time, a matrix product takes.
    Buf real(size_t n, double scale = 1) { return filled(n, real_, scale); }
    Buf stat(size_t n, double scale = 1) { return filled(n, DType::f32, scale); }
    Buf zeros(size_t n, DType t);
    // As many numbers of that dtype; integers are zeros, and an absent buffer stays absent.
    Buf like(const Buf& b, double scale = 1);
    template <class T>
    Buf copy_of(const std::vector<T>& v) {
        const Buf b = take(v.size(), dtype_of<T>::value);
        k_.upload(b.data, v.data(), b.n_bytes(), stream());
        k_.synchronize(stream());
        return b;
    }
    void forget();  // gives back what was taken

    // The two calls that are not counted; matrix products are chosen by timing in the first, as before a training run.
    // Throws what they end with.
    void warm_up(const Run& run);
    const std::string& notes() const { return notes_; }  // of these choices, a line each
    // The samples of each, taken in turn, so that a change of clocks hits all.
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
    size_t kept_ = 0;  // of taken_, to the end
    std::vector<void*> taken_;
    std::vector<float> numbers_;
    std::string notes_;
};

// What this device reaches at the two things that bound an op, measured in this process: copying memory, bytes read and
// written counted, and a square matrix product in the computing type; the fastest sample of each.  Sizes grow until one
// call is long enough for the device, so the same lines serve a GPU, a CPU and the emulator.
struct Peaks {
    double gb_per_s = 0, tflop_per_s = 0;
    size_t copy_bytes = 0;  // read and written by one copy
    int gemm_side = 0;      // M = N = K
    // The least time in microseconds that so much work takes here.
    double bound_us(double n_bytes, double flop) const;
    bool bound_by_flop(double n_bytes, double flop) const;
};
Peaks measure_peaks(Bench& bench);

// The file of Settings::json, an object per line, complete after every line; without one nothing is written.
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
