// Power, clocks, temperature, memory and utilisation of a GPU, from NVML, NVIDIA's management library.  NVML comes with
// the driver and is loaded at run time; runs work without NVML.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

struct GpuSample {  // figures that the GPU does not report are absent
    std::optional<double> power_w, sm_mhz, memory_mhz, temperature_c;
    std::optional<uint64_t> memory_bytes;  // in use, by all processes
    std::optional<double> utilization;     // percent of the last sampling period (up to a second) in which a kernel ran
};

// Samples one GPU about once a second in a thread of its own: NVML's calls take up to milliseconds, and no step waits
// for NVML.
class GpuMonitor {
  public:
    // `bus_id`: the GPU's PCI bus id ("0000:01:00.0"), because NVML and CUDA number GPUs differently.  Where nothing
    // can be sampled the thread calls `say` with the reason, in one line, but never after the destructor.
    GpuMonitor(const std::string& bus_id, std::function<void(const std::string&)> say);
    GpuMonitor(const GpuMonitor&) = delete;
    GpuMonitor& operator=(const GpuMonitor&) = delete;
    // Ends the thread; leaves behind a thread that the driver still blocks after two seconds.
    ~GpuMonitor();
    // The newest sample; absent before the first, when the GPU reports nothing, or when the newest is older than 5 s.
    std::optional<GpuSample> latest() const;

  private:
    struct State;
    std::shared_ptr<State> state_;  // shared with the thread
};
