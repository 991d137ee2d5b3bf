// Measures the peak of a device whose speed is known: the CPU backend with a clock of its own.  Broken on purpose and
// seen to fail: FLOPs of n^3; the mean of the calls; growth decided by one call; the first call timed; a buffer kept;
// operands of zeros; growth until 10 ms; making operands counted as calls.
#include <chrono>
#include <cmath>
#include <map>
#include <thread>
#include <vector>

#include "bench/peak.h"
#include "test/op_test.h"

namespace {
// A device that computes nothing and takes time by the rate.
struct Device {
    double flops = 1e12, bytes_per_s = 1e11;  // its speed
    double slow_every = 0;                    // every so many calls takes ten times as long
    double first_ms = 0;                      // more, of the first call of a size
    size_t memory = SIZE_MAX;                 // bytes
    int alloc_ms = 0;                         // by the host's clock

    double now_ms = 0;
    int calls = 0;
    std::map<int, int> calls_of;         // size -> products
    std::map<void*, size_t> allocated;   // live
    size_t in_use = 0, most_in_use = 0;  // bytes
    double mean = 0, square = 0;         // of x of the last product

    void spend(double ms) {
        calls++;
        now_ms += slow_every > 0 && calls % int(slow_every) == 0 ? 10 * ms : ms;
    }
};
Device device;
constexpr size_t kTouched = size_t(16) << 20;  // bytes; larger operands are never written or read

void* alloc(size_t n_bytes) {
    if (device.in_use + n_bytes > device.memory) fail(Exit::memory, "no {} bytes", n_bytes);
    std::this_thread::sleep_for(std::chrono::milliseconds(device.alloc_ms));
    void* p = cpu_backend().memory.alloc(n_bytes);  // pages that are never touched cost nothing
    device.allocated[p] = n_bytes;
    device.most_in_use = std::max(device.most_in_use, device.in_use += n_bytes);
    return p;
}
void release(void* p) {
    device.in_use -= device.allocated.at(p);
    device.allocated.erase(p);
    cpu_backend().memory.free(p);
}
double* time_of(const Mark* m) { return reinterpret_cast<double*>(const_cast<Mark*>(m)); }
Mark* new_mark() { return reinterpret_cast<Mark*>(new double(-1)); }
void free_mark(Mark* m) { delete time_of(m); }
void set_mark(Mark* m, Stream) { *time_of(m) = device.now_ms; }
double ms_between(const Mark* from, const Mark* to) { return *time_of(to) - *time_of(from); }
void cast_small(const Cast& a, Stream s) {  // large operands stay untouched
    if (device.in_use < kTouched) cpu_backend().cast(a, s);
}
void linear(const Linear& a, Stream) {
    REQUIRE(a.BT == a.C);
    REQUIRE(a.C == a.OC);
    REQUIRE(a.x.count == size_t(a.BT) * a.C);
    const bool first = device.calls_of[a.C]++ == 0;
    device.spend(2.0 * a.BT * a.C * a.OC / device.flops * 1e3);
    if (!first) return;
    device.now_ms += device.first_ms;
    if (device.in_use >= kTouched || a.x.dtype != DType::f32) return;
    device.mean = device.square = 0;
    for (size_t i = 0; i < a.x.count; i++) {
        device.mean += a.x.as<float>()[i] / double(a.x.count);
        device.square += a.x.as<float>()[i] * a.w.as<float>()[a.x.count - 1 - i] / double(a.x.count);
    }
}
void add(const Add& a, Stream) {
    REQUIRE(a.y.n_bytes() == a.x.n_bytes());
    device.spend(3.0 * double(a.x.n_bytes()) / device.bytes_per_s * 1e3);
}

Backend backend(const Device& d) {
    device = d;
    Backend k = cpu_backend();
    k.memory = {.alloc = alloc, .free = release};
    k.new_mark = new_mark;
    k.free_mark = free_mark;
    k.set_mark = set_mark;
    k.ms_between = ms_between;
    k.cast = cast_small;
    k.linear_forward = linear;
    k.add = add;
    return k;
}
int largest() { return device.calls_of.rbegin()->first; }
}  // namespace

TEST_CASE("peak: a device's rate is found, in less than half a second, on the smallest product that takes 1 ms") {
    struct Case {
        double flops;
        int n;  // 2 n^3 / flops >= 1 ms, by hand
    };
    for (const Case& c : {Case{1e11, 512}, Case{1e12, 1024}, Case{1e14, 4096}, Case{8e14, 8192}, Case{1e18, 8192}}) {
        CAPTURE(c.flops);
        const Backend k = backend({.flops = c.flops});
        CHECK(measured_peak(k, DType::f32) == doctest::Approx(c.flops).epsilon(1e-9));
        CHECK(largest() == c.n);
        CHECK(device.now_ms < 500);
        CHECK(device.calls_of[c.n] >= 3);
        CHECK(device.allocated.empty());
        CHECK(device.most_in_use <=
              size_t(4) * c.n * c.n * 4 + (size_t(1) << 19));  // three matrices, those before, numbers
    }
}

TEST_CASE("peak: a slow device is asked three times for the smallest product") {
    const Backend k = backend({.flops = 1e8});  // a third of a second each
    CHECK(measured_peak(k, DType::f32) == doctest::Approx(1e8));
    CHECK(device.calls_of == std::map<int, int>{{256, 3}});
}

TEST_CASE("peak: neither the first call of a size nor slow calls count") {
    const Backend k = backend({.slow_every = 2, .first_ms = 100});
    CHECK(measured_peak(k, DType::f32) == doctest::Approx(1e12));
    CHECK(largest() == 1024);
}

TEST_CASE("peak: where memory ends, the largest product that fits is taken, or none") {
    Backend k = backend({.flops = 1e15, .memory = size_t(20) << 20});
    CHECK(measured_peak(k, DType::f32) == doctest::Approx(1e15));
    CHECK(largest() == 1024);  // 12 MiB, and 3 for the one before; 2048 takes 48
    CHECK(device.allocated.empty());
    k = backend({.memory = 1000});
    CHECK(measured_peak(k, DType::f32) == 0);
    CHECK(measured_bandwidth(k) == 0);
    CHECK(device.allocated.empty());
}

TEST_CASE("peak: a host that is slow to make operands does not end the search") {
    const Backend k =
        backend({.alloc_ms = 30});  // with three matrices of each of three sizes longer than a search may be
    CHECK(measured_peak(k, DType::f32) == doctest::Approx(1e12));
    CHECK(largest() == 1024);
}

TEST_CASE("peak: operands are normal numbers") {
    const Backend k = backend({});
    measured_peak(k, DType::f32);
    CHECK(std::abs(device.mean) < 0.02);    // of a million, drawn from 65,560
    CHECK(std::abs(device.square) < 0.02);  // x against w
    CHECK(device.mean != 0);
}

TEST_CASE("peak: bandwidth counts two reads and a write, on buffers that no cache holds") {
    for (double bytes_per_s : {1e9, 2e10, 4.3e12}) {
        CAPTURE(bytes_per_s);
        const Backend k = backend({.bytes_per_s = bytes_per_s});
        CHECK(measured_bandwidth(k) == doctest::Approx(bytes_per_s).epsilon(1e-9));
        CHECK(device.now_ms < 500);
        CHECK(device.most_in_use >= (bytes_per_s > 1e10 ? size_t(128) << 20 : size_t(8) << 20));
        CHECK(device.allocated.empty());
    }
}

TEST_CASE("peak: every backend has one") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        const double flops = measured_peak(*t.k, t.real);
        CHECK(flops > 1e5);
        CHECK(flops < 1e17);
        CHECK(measured_bandwidth(*t.k) > 1e4);
    }
}

TEST_CASE("peak: the vendor's figure goes by the whole name, for bf16 only") {
    struct Case {
        const char* name;
        double tflops;  // 0: unknown
    };
    const Case cases[] = {{"NVIDIA H200", 989},
                          {"NVIDIA H200 NVL", 835},
                          {"NVIDIA H100 80GB HBM3", 989},
                          {"NVIDIA H100 PCIe", 756},
                          {"NVIDIA A100-SXM4-40GB", 312},
                          {"NVIDIA A100-PCIE-40GB", 312},
                          {"NVIDIA A100 80GB PCIe", 312},
                          {"NVIDIA A10", 125},
                          {"NVIDIA A10G", 0},
                          {"NVIDIA L4", 121},
                          {"NVIDIA L40", 181.05},
                          {"NVIDIA L40S", 362.05},
                          {"NVIDIA GeForce RTX 4090", 165.2},
                          {"NVIDIA GeForce RTX 4090 Laptop GPU", 0},
                          {"NVIDIA GeForce RTX 3090 Ti", 0},
                          {"NVIDIA A100-SXM4-40GB MIG 1g.5gb", 0},
                          {"emulated GPU", 0},
                          {"cpu", 0}};
    for (const Case& c : cases) {
        CAPTURE(c.name);
        CHECK(vendor_peak(c.name, DType::bf16).value_or(0) == doctest::Approx(c.tflops * 1e12));
        CHECK(!vendor_peak(c.name, DType::f32));
    }
}

TEST_CASE("peak: of a run, each device once; the vendor's figure where all have one") {
    const std::vector<DevicePeak> same = {{.measured = 7, .vendor = 10}, {.measured = 8, .vendor = 10}};
    CHECK(sum_peaks(same).devices == 2);
    CHECK(sum_peaks(same).measured_flops == 15);
    CHECK(sum_peaks(same).flops() == 20);
    CHECK(std::string(sum_peaks(same).used()) == "vendor");

    const std::vector<DevicePeak> shared = {{.measured = 7, .vendor = 10},
                                            {.counts = false, .measured = 7, .vendor = 10}};
    CHECK(sum_peaks(shared).devices == 1);
    CHECK(sum_peaks(shared).flops() == 10);

    const std::vector<DevicePeak> mixed = {{.measured = 7, .vendor = 10}, {.measured = 8}};
    CHECK(!sum_peaks(mixed).vendor_flops);
    CHECK(sum_peaks(mixed).flops() == 15);
    CHECK(std::string(sum_peaks(mixed).used()) == "measured");

    const std::vector<DevicePeak> unmeasured = {{.measured = 7}, {}};
    CHECK(!sum_peaks(unmeasured).flops());
}

TEST_CASE("peak: the share of one is none above it, which something else had slowed") {
    Peak p = sum_peaks(std::vector<DevicePeak>{{.measured = 2e12}, {.measured = 2e12}});
    CHECK(share_of(p, 1e12) == 0.25);
    CHECK(share_of(p, 4e12) == 1);
    CHECK(share_of(p, 4.1e12) == std::nullopt);
    p.vendor_flops = 8e12;
    CHECK(share_of(p, 4e12) == 0.5);
    CHECK(share_of({}, 1e12) == std::nullopt);
}
