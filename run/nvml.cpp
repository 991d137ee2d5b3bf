#include "run/nvml.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace {
using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;
constexpr auto kPeriod = 1s, kTooOld = 5s, kPatience = 2s;

// The part of NVML's declarations that is used here.  An nvmlReturn_t of 0 means success.
struct nvmlDevice_st;
using nvmlDevice_t = nvmlDevice_st*;
using nvmlReturn_t = int;
enum nvmlClockType_t : int { NVML_CLOCK_SM = 1, NVML_CLOCK_MEM = 2 };
enum nvmlTemperatureSensors_t : int { NVML_TEMPERATURE_GPU = 0 };
struct nvmlMemory_t {
    unsigned long long total, free, used;  // bytes
};
struct nvmlUtilization_t {
    unsigned gpu, memory;  // percent
};

struct Nvml {
    nvmlReturn_t (*nvmlInit_v2)() = nullptr;
    nvmlReturn_t (*nvmlShutdown)() = nullptr;
    const char* (*nvmlErrorString)(nvmlReturn_t) = nullptr;
    nvmlReturn_t (*nvmlDeviceGetHandleByPciBusId_v2)(const char* bus_id, nvmlDevice_t*) = nullptr;
    nvmlReturn_t (*nvmlDeviceGetPowerUsage)(nvmlDevice_t, unsigned* milliwatts) = nullptr;
    nvmlReturn_t (*nvmlDeviceGetClockInfo)(nvmlDevice_t, nvmlClockType_t, unsigned* mhz) = nullptr;
    nvmlReturn_t (*nvmlDeviceGetTemperature)(nvmlDevice_t, nvmlTemperatureSensors_t, unsigned* celsius) = nullptr;
    nvmlReturn_t (*nvmlDeviceGetMemoryInfo)(nvmlDevice_t, nvmlMemory_t*) = nullptr;
    nvmlReturn_t (*nvmlDeviceGetUtilizationRates)(nvmlDevice_t, nvmlUtilization_t*) = nullptr;

    std::string error(const char* call, nvmlReturn_t code) const {
        return fmt::format("{}: {}", call, nvmlErrorString ? nvmlErrorString(code) : fmt::format("error {}", code));
    }
};

// Loads NVML; returns why that failed, or empty.  NVML is never unloaded, because NVML may have threads of its own.
std::string load(Nvml& n) {
    void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) return dlerror();
    std::string missing;
    const auto find = [&]<class F>(F*& function, const char* name, bool needed) {
        function = reinterpret_cast<F*>(dlsym(library, name));
        if (!function && needed && missing.empty()) missing = fmt::format("libnvidia-ml.so.1 has no {}", name);
    };
    find(n.nvmlInit_v2, "nvmlInit_v2", true);
    find(n.nvmlShutdown, "nvmlShutdown", true);
    find(n.nvmlErrorString, "nvmlErrorString", false);
    find(n.nvmlDeviceGetHandleByPciBusId_v2, "nvmlDeviceGetHandleByPciBusId_v2", true);
    find(n.nvmlDeviceGetPowerUsage, "nvmlDeviceGetPowerUsage", false);
    find(n.nvmlDeviceGetClockInfo, "nvmlDeviceGetClockInfo", false);
    find(n.nvmlDeviceGetTemperature, "nvmlDeviceGetTemperature", false);
    find(n.nvmlDeviceGetMemoryInfo, "nvmlDeviceGetMemoryInfo", false);
    find(n.nvmlDeviceGetUtilizationRates, "nvmlDeviceGetUtilizationRates", false);
    return missing;
}

// One sample; absent when the GPU reports nothing.
std::optional<GpuSample> sample(const Nvml& n, nvmlDevice_t device) {
    GpuSample s;
    bool any = false;
    const auto keep = [&]<class T>(std::optional<T>& to, nvmlReturn_t code, auto value) {
        if (code == 0) to = T(value);
        any |= code == 0;
    };
    unsigned value = 0;
    nvmlMemory_t memory{};
    nvmlUtilization_t busy{};
    const auto ask = [&](auto* function, auto... arguments) { return function ? function(device, arguments...) : -1; };
    nvmlReturn_t code = ask(n.nvmlDeviceGetPowerUsage, &value);
    keep(s.power_w, code, value / 1e3);
    code = ask(n.nvmlDeviceGetClockInfo, NVML_CLOCK_SM, &value);
    keep(s.sm_mhz, code, value);
    code = ask(n.nvmlDeviceGetClockInfo, NVML_CLOCK_MEM, &value);
    keep(s.memory_mhz, code, value);
    code = ask(n.nvmlDeviceGetTemperature, NVML_TEMPERATURE_GPU, &value);
    keep(s.temperature_c, code, value);
    code = ask(n.nvmlDeviceGetMemoryInfo, &memory);
    keep(s.memory_bytes, code, memory.used);
    code = ask(n.nvmlDeviceGetUtilizationRates, &busy);
    keep(s.utilization, code, busy.gpu);
    return any ? std::optional(s) : std::nullopt;
}
}  // namespace

struct GpuMonitor::State {
    std::mutex mutex;  // guards all members below
    std::condition_variable changed;
    bool stop = false, ended = false;
    std::optional<GpuSample> newest;
    Clock::time_point at;
    std::function<void(const std::string&)> say;
    std::thread thread;

    void watch(const std::string& bus_id);
    std::string sample_until_stop(const std::string& bus_id);
    std::string sample_until_stop(const Nvml& n, const std::string& bus_id);
};

std::string GpuMonitor::State::sample_until_stop(const Nvml& n, const std::string& bus_id) {
    nvmlDevice_t device = nullptr;
    if (const nvmlReturn_t code = n.nvmlDeviceGetHandleByPciBusId_v2(bus_id.c_str(), &device); code != 0)
        return n.error("nvmlDeviceGetHandleByPciBusId_v2", code) + " (" + bus_id + ")";
    for (;;) {
        const std::optional<GpuSample> now = sample(n, device);
        std::unique_lock lock(mutex);
        newest = now;
        at = Clock::now();
        if (changed.wait_for(lock, kPeriod, [this] { return stop; })) return "";
    }
}

// Samples until `stop`; returns why nothing can be sampled, or empty after `stop`.
std::string GpuMonitor::State::sample_until_stop(const std::string& bus_id) {
    Nvml n;
    if (const std::string why = load(n); !why.empty()) return why;
    if (const nvmlReturn_t code = n.nvmlInit_v2(); code != 0) return n.error("nvmlInit_v2", code);
    const std::string why = sample_until_stop(n, bus_id);
    n.nvmlShutdown();
    return why;
}

void GpuMonitor::State::watch(const std::string& bus_id) {
    const std::string why = sample_until_stop(bus_id);
    const std::lock_guard lock(mutex);
    if (!why.empty() && !stop) say("the GPU's power and clocks are not recorded: " + why);
    ended = true;
    changed.notify_all();
}

GpuMonitor::GpuMonitor(const std::string& bus_id, std::function<void(const std::string&)> say)
    : state_(std::make_shared<State>()) {
    state_->say = std::move(say);
    state_->thread = std::thread([state = state_, bus_id] { state->watch(bus_id); });
}

GpuMonitor::~GpuMonitor() {
    std::unique_lock lock(state_->mutex);
    state_->stop = true;
    state_->changed.notify_all();
    const bool ended = state_->changed.wait_for(lock, kPatience, [this] { return state_->ended; });
    lock.unlock();
    if (ended) state_->thread.join();
    if (!ended) state_->thread.detach();
}

std::optional<GpuSample> GpuMonitor::latest() const {
    const std::lock_guard lock(state_->mutex);
    return Clock::now() - state_->at < kTooOld ? state_->newest : std::nullopt;
}
