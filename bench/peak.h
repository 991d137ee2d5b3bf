// The peak rate of a device, measured here and as the vendor states.  MFU (model FLOP utilization) divides by the peak.
#pragma once
#include <optional>
#include <span>
#include <string>

#include "comm/comm.h"
#include "kernels/ops.h"

// FLOP/s of one large square product by linear_forward, operands from N(0, 1) in `real` (f32 or bf16): zeros draw less
// power and would flatter a GPU.  Widths double from 256 until a product takes a millisecond, reaches 8192 or exceeds
// the memory.  The largest product, by the backend's first guess of an algorithm, is repeated for 50 ms, and the
// fastest call counts: other processes can only make calls longer.
// The function frees its device memory (at most 960 MiB, 480 in bf16); call it before the arenas are taken.
// 0 where memory does not hold even the smallest product.
double measured_peak(const Backend& k, DType real);

// Bytes/s that y += x in f32 reads and writes (12 for each element).  Buffers double until a pass takes 10 ms or both
// together are 1 GiB, larger than any cache.  Memory: as for measured_peak().
double measured_bandwidth(const Backend& k);

// The vendor's dense rate for products of `real` with sums in fp32, by the name that CUDA gives the GPU.  None for
// fp32, for a GPU that is not in the table, and for a part of a GPU (MIG).
std::optional<double> vendor_peak(const std::string& device_name, DType real);

// One rank's part of a Peak.
struct DevicePeak {
    bool counts = true;   // false: another rank speaks for the same device
    double measured = 0;  // FLOP/s; 0: could not be measured
    double vendor = 0;    // FLOP/s; 0: unknown
};

// All devices of a run together, each once.
struct Peak {
    int devices = 0;
    std::optional<double> measured_flops, vendor_flops;  // absent where a device's is unknown
    std::optional<double> flops() const { return vendor_flops ? vendor_flops : measured_flops; }  // divides MFU
    const char* used() const { return vendor_flops ? "vendor" : "measured"; }
};
Peak sum_peaks(std::span<const DevicePeak> ranks);

// MFU: the share that `flops` (FLOP/s) is of the peak.  None where no peak is known, nor above 1: then other programs
// had the processors while the peak was measured, or the vendor's peak is another device's.
std::optional<double> share_of(const Peak& peak, double flops);

// Measures on all ranks at the same time and sums up; every rank gets the same result.
//   GPUs    `counts` is true on one rank of each GPU.  That rank measures while the GPU's other ranks wait, so the
//           whole GPU counts once.
//   CPUs    every rank counts.  All ranks measure at once with their own threads, as in a step, and so share the
//           machine's clocks, caches and memory.  Where device.threads gives the ranks more threads than there are
//           cores, each rank reports its best moments, and the sum exceeds the cores' rate.
Peak measure_run_peak(Comm& comm, const Backend& k, DType real, const std::string& device_name, bool counts);
