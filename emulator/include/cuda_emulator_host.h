// The emulated runtime as the stand-ins for libraries (cuBLASLt, NCCL) and the tests use it.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <functional>
#include <vector>

namespace emulator {
// Queues host work on a stream, in place of a library's kernel.  `work` runs when the stream reaches it, perhaps long
// after the call, so `work` must own copies of the arguments that it needs.  `work` may read and write device memory
// directly.  An exception from `work` becomes a sticky cudaErrorLaunchFailure with the exception's text.  Of the
// runtime `work` may call nothing but check_device_range.
cudaError_t enqueue_host(cudaStream_t stream, std::function<void()> work);
// Like enqueue_host, for work that may have to wait for another process: `work` is called again and again until it
// returns true.  A query of the stream calls `work` once, so the host can poll and give up.
cudaError_t enqueue_polled(cudaStream_t stream, std::function<bool()> work);

// cudaSuccess when [p, p + n_bytes) lies in one live allocation of device memory; else cudaErrorInvalidValue, with a
// text that cudaGetErrorString returns.  Any p is valid where n_bytes is 0.
cudaError_t check_device_range(const void* p, size_t n_bytes);

// When work given to a stream runs.
enum class StreamMode {
    late,   // only when the host waits for it: code that forgets to wait sees old numbers
    eager,  // at the call
    random  // at any time between the two
};
struct Machine {
    StreamMode mode = StreamMode::late;     // KILN_EMULATOR_STREAMS=late|eager|random
    int n_devices = 16;                     // KILN_EMULATOR_DEVICES; 0: a machine without a GPU
    int capability = 90;                    // KILN_EMULATOR_CAPABILITY: 80 for 8.0
    int n_multiprocessors = 4;              // KILN_EMULATOR_MULTIPROCESSORS
    size_t memory_bytes = size_t(8) << 30;  // KILN_EMULATOR_MEMORY: of each device
    // KILN_EMULATOR_CLOCK=1: events read a nominal clock, on which a kernel takes 10 us, a copy or a fill 5 us, and a
    // matrix product 100 us by algorithm `fastest_algorithm` or (2 + n) * 100 us by another algorithm n, plus
    // `epilogue_us` where the product has an epilogue.  A product of 256^3 multiply-adds or more takes another 20 ms
    // for each 256^3 of them, so that a peak is measured on small products.  Otherwise events read the host's clock.
    bool has_clock = false;
    int fastest_algorithm = 0;      // KILN_EMULATOR_FASTEST_ALGORITHM
    int epilogue_us = 0;            // KILN_EMULATOR_EPILOGUE_US
    bool splits = false;            // algorithm 0 can be told to split k
    int cublaslt_version = 130000;  // KILN_EMULATOR_CUBLASLT
    int dropped_terms = 0;          // the last ones of k, by products that split k: a defect that was reported
};
// The emulated machine, read from the environment at the first call; a test may change it.
Machine& machine();

// Called by an operation: advances the nominal clock by `us`.
void pass_us(double us);
// The algorithm numbers of all matrix products given to streams so far; a test may clear the list.
std::vector<int>& products_run();

// Drops all pending work and every error, the sticky one included, ends captures, and reads the environment again.
// Memory, streams and events stay.
void reset_device();
}  // namespace emulator
