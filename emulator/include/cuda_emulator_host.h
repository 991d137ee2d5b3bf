// What stands in for a library (cuBLASLt, NCCL) needs of the emulated runtime, and what tests do to it.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <functional>
#include <vector>

namespace emulator {
// Gives work on the host to a stream, like a kernel of a library: it runs when the stream gets there, which may be
// long after the call, so it must copy what it needs of its arguments.  Device memory can be read and written in it
// directly.  An exception from it is the device's fault: a sticky cudaErrorLaunchFailure with the exception's text.  It
// may not call the runtime, check_device_range excepted.
cudaError_t enqueue_host(cudaStream_t stream, std::function<void()> work);
// Likewise work that may have to wait for another process: it is called again and again until it returns true.  A query
// of the stream calls it once, so the host can give up on it.
cudaError_t enqueue_polled(cudaStream_t stream, std::function<bool()> work);

// cudaSuccess when [p, p + n_bytes) lies in one live allocation of device memory; else cudaErrorInvalidValue, with a
// text that cudaGetErrorString returns.  Anything is valid where n_bytes is 0.
cudaError_t check_device_range(const void* p, size_t n_bytes);

// When work given to a stream runs.
enum class StreamMode {
    late,   // not before the host waits for it: what forgets to wait sees old numbers
    eager,  // at the call
    random  // at any time between the two
};
struct Machine {
    StreamMode mode = StreamMode::late;     // KILN_EMULATOR_STREAMS=late|eager|random
    int n_devices = 16;                     // KILN_EMULATOR_DEVICES; 0: as on a machine without one
    int capability = 90;                    // KILN_EMULATOR_CAPABILITY: 80 for 8.0
    int n_multiprocessors = 4;              // KILN_EMULATOR_MULTIPROCESSORS
    size_t memory_bytes = size_t(8) << 30;  // KILN_EMULATOR_MEMORY: of each device
    // KILN_EMULATOR_CLOCK=1: events tell what the work between them is said to take, and never what it took here: a
    // kernel 10 us; a product 100 us by the algorithm that is fastest here, (2 + its number) * 100 us by another, and
    // what an epilogue costs on top.
    bool has_clock = false;
    int fastest_algorithm = 0;      // KILN_EMULATOR_FASTEST_ALGORITHM
    int epilogue_us = 0;            // KILN_EMULATOR_EPILOGUE_US
    bool splits = false;            // algorithm 0 can be told to split k
    int cublaslt_version = 130000;  // KILN_EMULATOR_CUBLASLT
};
// Read from the environment when first asked for; a test may change it.
Machine& machine();

// In an operation: it takes this much of the time that events tell.
void pass_us(double us);
// The algorithms of the matrix products given to streams, by their number; a test may clear it.
std::vector<int>& products_run();

// Drops all pending work and every error, the sticky one included, ends captures, and reads the environment again.
// Memory, streams and events stay.
void reset_device();
}  // namespace emulator
