#include "bench/peak.h"

#include <fnmatch.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "kernels/owners.h"
#include "model/init.h"

namespace {
// A tensor that frees its memory at the end of its scope.
class Tensor {
  public:
    Tensor(const Backend& k, size_t count, DType t)
        : memory_(k, count * dtype_bytes(t)), buf_(memory_.get(), count, t) {}
    const Buf& get() const { return buf_; }

  private:
    const DeviceBuffer memory_;
    const Buf buf_;
};

// Times work in a stream of its own.
class Timer {
  public:
    explicit Timer(const Backend& k) : k_(k), stream_(k), from_(k), to_(k) {}
    Stream stream() const { return stream_.get(); }
    template <class Work>
    double ms(const Work& work) const {
        k_.set_mark(from_.get(), stream());
        work(stream());
        k_.set_mark(to_.get(), stream());
        k_.wait_mark(to_.get());
        return k_.ms_between(from_.get(), to_.get());
    }
    // The shortest of at most `most` calls, as many as fit into budget_ms by the device's clock and the host's, and at
    // least one.  Other programs can only make calls longer.
    template <class Work>
    double best_ms(const Work& work, double budget_ms, int most) const {
        const Stopwatch host;
        double best = ms(work), spent = best;
        for (int i = 1; i < most && spent < budget_ms && host.ms() < budget_ms; i++) {
            const double again = ms(work);
            best = std::min(best, again);
            spent += again;
        }
        return best;
    }

  private:
    const Backend& k_;
    const StreamOwner stream_;
    const MarkOwner from_, to_;
};

// Normally distributed numbers on the device, one block repeated: making every number on the host would take seconds.
class Normal {
  public:
    Normal(const Backend& k, Stream s) : k_(k), block_(k, kBlock, DType::f32) {
        init_tensor(k, Init::normal(1), block_.get(), 0, 0, s);
    }
    void fill(const Buf& y, Stream s) const {  // y (n) f32 or bf16  =
        for (size_t i = 0; i < y.count; i += kBlock) {
            const size_t n = std::min(kBlock, y.count - i);
            k_.cast({.y = y.slice(i, n), .x = block_.get().slice(0, n)}, s);
        }
    }

  private:
    static constexpr size_t kBlock = (size_t(1) << 16) + 24;  // no power of two: rows of a matrix differ
    const Backend& k_;
    const Tensor block_;  // (kBlock) f32
};

struct Product {  // y = x w
    Product(const Backend& k, size_t n, DType real, const Normal& normal, Stream s)
        : k(k), n(int(n)), y(k, n * n, real), x(k, n * n, real), w(k, n * n, real) {
        normal.fill(x.get(), s);
        normal.fill(w.get(), s);
    }
    double amount() const { return 2.0 * n * n * n; }  // FLOP
    void operator()(Stream s) const {
        k.linear_forward({.y = y.get(), .x = x.get(), .w = w.get(), .BT = n, .C = n, .OC = n}, s);
    }
    const Backend& k;
    const int n;
    const Tensor y, x, w;  // (n, n) real
};

struct Pass {  // y += x
    Pass(const Backend& k, size_t n, const Normal& normal, Stream s) : k(k), y(k, n, DType::f32), x(k, n, DType::f32) {
        normal.fill(y.get(), s);
        normal.fill(x.get(), s);
    }
    double amount() const { return 3 * double(x.get().n_bytes()); }  // bytes: two reads, one write
    void operator()(Stream s) const { k.add({.y = y.get(), .x = x.get()}, s); }
    const Backend& k;
    const Tensor y, x;  // (n) f32
};

// Amount per second of the work that make(n, normal, stream) returns, with n doubled until the work takes enough_ms.
template <class Make>
double rate(const Backend& k, size_t smallest, size_t largest, double enough_ms, const Make& make) {
    constexpr double kLongestMs = 200;  // of one size's calls by the host's clock, whatever the device's clock says
    const Timer timer(k);
    decltype(make(smallest, std::declval<const Normal&>(), timer.stream())) work;
    try {
        k.take_workspace(timer.stream());
        const Normal normal(k, timer.stream());
        for (size_t n = smallest; n <= largest; n *= 2) {
            work = make(n, normal, timer.stream());
            timer.ms(*work);        // the first call of a size also makes plans
            const Stopwatch calls;  // without making the operands: a slow host must not end the search on a fast device
            if (timer.best_ms(*work, 20 * enough_ms, 10) >= enough_ms || calls.ms() > kLongestMs) break;
        }
    } catch (const Error& e) {  // `work` is still the largest that fitted into memory
        if (e.code != Exit::memory) throw;
    }
    // A GPU needs 50 ms to leave its idle clocks; a CPU does not.
    const double total_ms = k.host_addressable ? 10 : 50;
    return work ? work->amount() / timer.best_ms(*work, total_ms, 200) * 1e3 : 0;
}

struct VendorPeak {
    const char* name;  // from cudaGetDeviceProperties; * matches any text
    double bf16;       // FLOP/s, dense, sums in fp32
};
// From NVIDIA's datasheets and architecture whitepapers; half the figure with sparsity where they give no other.
constexpr VendorPeak kVendorPeaks[] = {
    {"NVIDIA GB200", 2500e12},
    {"NVIDIA B200", 2250e12},
    {"NVIDIA H200", 989e12},
    {"NVIDIA H200 NVL", 835e12},
    {"NVIDIA H100 80GB HBM3", 989e12},  // SXM
    {"NVIDIA H100 NVL", 835e12},
    {"NVIDIA H100 PCIe", 756e12},
    {"NVIDIA A100-*", 312e12},  // SXM4 and PCIE, 40 and 80 GB
    {"NVIDIA A100 80GB PCIe", 312e12},
    {"NVIDIA A40", 149.7e12},
    {"NVIDIA A10", 125e12},
    {"NVIDIA L40S", 362.05e12},
    {"NVIDIA L40", 181.05e12},
    {"NVIDIA L4", 121e12},
    {"NVIDIA RTX A6000", 154.8e12},
    {"NVIDIA GeForce RTX 3090", 71e12},
    {"NVIDIA GeForce RTX 4090", 165.2e12},
    {"NVIDIA GeForce RTX 5090", 209.5e12},
};
}  // namespace

double measured_peak(const Backend& k, DType real) {
    return rate(k, 256, 8192, 1, [&](size_t n, const Normal& normal, Stream s) {
        return std::make_unique<Product>(k, n, real, normal, s);
    });
}

double measured_bandwidth(const Backend& k) {
    return rate(k, size_t(1) << 16, size_t(1) << 27, 10,
                [&](size_t n, const Normal& normal, Stream s) { return std::make_unique<Pass>(k, n, normal, s); });
}

std::optional<double> vendor_peak(const std::string& device_name, DType real) {
    const bool part = device_name.find(" MIG ") != std::string::npos;
    if (real != DType::bf16 || part) return {};
    const auto* found = std::ranges::find_if(
        kVendorPeaks, [&](const VendorPeak& v) { return fnmatch(v.name, device_name.c_str(), 0) == 0; });
    return found != std::end(kVendorPeaks) ? std::optional(found->bf16) : std::nullopt;
}

std::optional<double> share_of(const Peak& peak, double flops) {
    if (!peak.flops() || flops > *peak.flops()) return std::nullopt;
    return flops / *peak.flops();
}

Peak sum_peaks(std::span<const DevicePeak> ranks) {
    Peak sum;
    const auto total = [&](double DevicePeak::*figure) -> std::optional<double> {
        double flops = 0;
        for (const DevicePeak& d : ranks) {
            if (d.counts && d.*figure <= 0) return {};
            if (d.counts) flops += d.*figure;
        }
        return flops;
    };
    sum.devices = int(std::ranges::count_if(ranks, &DevicePeak::counts));
    sum.measured_flops = total(&DevicePeak::measured);
    sum.vendor_flops = total(&DevicePeak::vendor);
    return sum;
}

Peak measure_run_peak(Comm& comm, const Backend& k, DType real, const std::string& device_name, bool counts) {
    comm.barrier();  // ranks that share cores must measure at the same time
    DevicePeak mine{.counts = counts};
    if (counts) mine.measured = measured_peak(k, real);
    if (counts) mine.vendor = vendor_peak(device_name, real).value_or(0);
    std::vector<DevicePeak> all(size_t(comm.size()));  // (ranks)
    comm.all_gather(&mine, all.data(), sizeof mine);
    return sum_peaks(all);
}
