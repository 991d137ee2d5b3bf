// Power, clocks, temperature, memory and utilisation of a GPU, by NVIDIA's management library (NVML), which comes with
// the driver: loaded at run time, and absent without harm.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

struct GpuSample {  // what this GPU does not tell is absent
    std::optional<double> power_w, sm_mhz, memory_mhz, temperature_c;
    std::optional<uint64_t> memory_bytes;  // in use, by all processes
    std::optional<double> utilization;     // percent of the last sampling period (up to a second) in which a kernel ran
};

// Samples one GPU about once a second from a thread of its own: NVML's calls take up to milliseconds, and no step waits
// for them.
class GpuMonitor {
  public:
    // The GPU by its PCI bus id ("0000:01:00.0"), because NVML numbers GPUs otherwise than CUDA does.  `say` gets one
    // line from the thread where there is nothing to sample, with the reason; it is not called after the destructor.
    GpuMonitor(const std::string& bus_id, std::function<void(const std::string&)> say);
    GpuMonitor(const GpuMonitor&) = delete;
    GpuMonitor& operator=(const GpuMonitor&) = delete;
    // Ends the thread; one that a driver does not let go is left behind after two seconds.
    ~GpuMonitor();
    // The newest sample; absent before the first, when the GPU tells nothing, or when the newest is older than 5 s.
    std::optional<GpuSample> latest() const;

  private:
    struct State;
    std::shared_ptr<State> state_;  // the thread's too
};
