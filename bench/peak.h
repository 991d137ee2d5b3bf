// What a device can compute at most: measured here, and by its vendor's word.  MFU divides by it.
#pragma once
#include <optional>
#include <span>
#include <string>

#include "comm/comm.h"
#include "kernels/ops.h"

// FLOP/s of one large square product by linear_forward, operands from N(0, 1) in `real` (f32 or bf16): zeros draw less
// power and would flatter a GPU.  Widths double from 256 until a product takes a millisecond, or 8192 is reached, or
// memory ends; the largest, by the backend's first guess of an algorithm, is repeated for 50 ms, and the fastest call
// taken: other processes only make calls longer.
// Device memory (at most 960 MiB, 480 in bf16) is given back before it returns: call it before the arenas are taken.
// 0 where there is no memory even for the smallest.
double measured_peak(const Backend& k, DType real);

// Bytes/s that y += x in f32 reads and writes (12 for each element), on buffers that double until a pass takes 10 ms or
// both together are 1 GiB: larger than any cache.  Memory as above.
double measured_bandwidth(const Backend& k);

// The vendor's dense rate for products of `real` with sums in fp32, by the name that CUDA gives the GPU.  None for
// fp32, for a GPU that is not in the table, and for a part of one (MIG).
std::optional<double> vendor_peak(const std::string& device_name, DType real);

// What one rank knows of its device.
struct DevicePeak {
    bool counts = true;   // false: another rank speaks for the same device
    double measured = 0;  // FLOP/s; 0: could not be measured
    double vendor = 0;    // FLOP/s; 0: unknown
};

// All devices of a run together, each once.
struct Peak {
    int devices = 0;
    std::optional<double> measured_flops, vendor_flops;  // absent where any device's is
    std::optional<double> flops() const { return vendor_flops ? vendor_flops : measured_flops; }  // what MFU divides by
    const char* used() const { return vendor_flops ? "vendor" : "measured"; }
};
Peak sum_peaks(std::span<const DevicePeak> ranks);

// The share of the peak at this many FLOP/s: MFU.  None where no peak is known, nor above 1: such a peak was measured
// while other programs had the processors, or is another device's.
std::optional<double> share_of(const Peak& peak, double flops);

// Measures, on all ranks at the same time, and sums up; the same on every rank.
//   GPUs    `counts` is true on one rank of each GPU.  It measures alone: the others wait, so it sees the whole GPU
//           once.
//   CPUs    every rank counts.  Each measures with its own threads while the others do, as in a step: they share the
//           machine's clocks, caches and memory.  Where device.threads gives the ranks more threads than there are
//           cores, each reports its best moments, and the sum is more than the cores can do.
Peak measure_run_peak(Comm& comm, const Backend& k, DType real, const std::string& device_name, bool counts);
