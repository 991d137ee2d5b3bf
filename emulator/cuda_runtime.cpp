// The CUDA runtime of the emulated build: errors, the machine, devices, launches.  cuda_memory.cpp: memory and copies;
// cuda_streams.cpp: when work runs; cuda_graphs.cpp: graphs.  The runtime is as strict as the hardware, or stricter:
//
//   - a kernel's failure is sticky; its text is the emulator's report, with the kernel's name
//   - the limits of a launch are those of the compute capability
//   - an error that no cudaGetLastError has fetched shows at the next launch
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>

#include "cuda_state.h"

namespace emulator::runtime {
namespace {
thread_local cudaError_t t_last_error = cudaSuccess;
thread_local std::map<cudaError_t, std::string> t_texts;  // noted by explain()
thread_local cudaError_t t_explained = cudaSuccess;       // by the current call
thread_local int t_device = 0;

struct ErrorText {
    cudaError_t error;
    const char *name, *text;
};
#define ERROR_TEXT(error, text) \
    { error, #error, text }
constexpr ErrorText kErrors[] = {
    ERROR_TEXT(cudaSuccess, "no error"),
    ERROR_TEXT(cudaErrorInvalidValue, "invalid argument"),
    ERROR_TEXT(cudaErrorMemoryAllocation, "out of memory"),
    ERROR_TEXT(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    ERROR_TEXT(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"),
    ERROR_TEXT(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    ERROR_TEXT(cudaErrorInvalidDevice, "invalid device ordinal"),
    ERROR_TEXT(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device"),
    ERROR_TEXT(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    ERROR_TEXT(cudaErrorNotReady, "device not ready"),
    ERROR_TEXT(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    ERROR_TEXT(cudaErrorLaunchFailure, "unspecified launch failure"),
    ERROR_TEXT(cudaErrorNotPermitted, "operation not permitted"),
    ERROR_TEXT(cudaErrorNotSupported, "operation not supported"),
    ERROR_TEXT(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    ERROR_TEXT(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    ERROR_TEXT(cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences"),
    ERROR_TEXT(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    ERROR_TEXT(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    ERROR_TEXT(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    ERROR_TEXT(cudaErrorStreamCaptureImplicit,
               "operation would make the legacy stream depend on a capturing blocking stream"),
    ERROR_TEXT(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
    ERROR_TEXT(cudaErrorStreamCaptureWrongThread,
               "attempt to terminate a thread-local capture sequence from another thread"),
};
#undef ERROR_TEXT
const ErrorText* find_text(cudaError_t error) {
    for (const ErrorText& e : kErrors)
        if (e.error == error) return &e;
    return nullptr;
}

// ---- the machine
template <class T>
void read_env(const char* name, T& value) {
    const char* const text = std::getenv(name);
    if (!text || !*text) return;
    char* end = nullptr;
    errno = 0;
    const long long v = std::strtoll(text, &end, 10);
    if (*end || errno || v < 0) {
        std::fprintf(stderr, "%s=%s is not a number of 0 or more\n", name, text);
        std::abort();
    }
    value = T(v);
}
Machine read_machine() {
    Machine m;
    const char* const streams = std::getenv("KILN_EMULATOR_STREAMS");
    const std::string mode = streams && *streams ? streams : "late";
    if (mode != "late" && mode != "eager" && mode != "random") {
        std::fprintf(stderr, "KILN_EMULATOR_STREAMS=%s is not late, eager or random\n", streams);
        std::abort();
    }
    m.mode = mode == "late" ? StreamMode::late : mode == "eager" ? StreamMode::eager : StreamMode::random;
    read_env("KILN_EMULATOR_DEVICES", m.n_devices);
    read_env("KILN_EMULATOR_CAPABILITY", m.capability);
    read_env("KILN_EMULATOR_MULTIPROCESSORS", m.n_multiprocessors);
    read_env("KILN_EMULATOR_MEMORY", m.memory_bytes);
    read_env("KILN_EMULATOR_CLOCK", m.has_clock);
    read_env("KILN_EMULATOR_FASTEST_ALGORITHM", m.fastest_algorithm);
    read_env("KILN_EMULATOR_EPILOGUE_US", m.epilogue_us);
    read_env("KILN_EMULATOR_CUBLASLT", m.cublaslt_version);
    return m;
}
constexpr size_t kSharedPerBlock = 48 << 10;  // without cudaFuncSetAttribute
size_t shared_limit(int capability) {
    switch (capability) {
        case 75:
            return 64 << 10;
        case 80:
        case 87:
            return 163 << 10;
        case 86:
        case 89:
            return 99 << 10;
        default:
            return capability >= 90 ? 227 << 10 : 48 << 10;
    }
}
bool is_device(int ordinal) { return ordinal >= 0 && ordinal < machine().n_devices; }
cudaError_t bad_device(int ordinal) {
    return explain(cudaErrorInvalidDevice,
                   "device " + std::to_string(ordinal) + " of " + std::to_string(machine().n_devices));
}

// ---- kernels
constexpr double kKernelUs = 10;  // duration on the nominal clock (Machine::has_clock)
// Bytes of dynamic shared memory that a block of this kernel may have: set by cudaFuncSetAttribute, or the default.
size_t limit_of(const State& s, const void* kernel) {
    const auto asked = s.shared_limit.find(kernel);
    return asked == s.shared_limit.end() ? kSharedPerBlock : asked->second;
}
cudaError_t check_launch(const State& s, const void* kernel, dim3 grid, dim3 block, size_t n_shared) {
    const auto text = [](const char* what, dim3 d) {
        return std::string(what) + " (" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " +
               std::to_string(d.z) + ")";
    };
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return explain(cudaErrorInvalidConfiguration, text("grid", grid));
    if (!block.x || !block.y || !block.z || block.x > 1024 || block.y > 1024 || block.z > 64 ||
        size_t(block.x) * block.y * block.z > 1024)
        return explain(cudaErrorInvalidConfiguration, text("block", block));
    const size_t limit = limit_of(s, kernel);
    if (n_shared > limit || n_shared > shared_limit(machine().capability))
        return explain(cudaErrorInvalidValue, std::to_string(n_shared) + " bytes of dynamic shared memory, " +
                                                  std::to_string(limit) + " asked for by cudaFuncSetAttribute");
    return cudaSuccess;
}
}  // namespace

// ---- declared in cuda_state.h
State& state() {
    static State& s = *new State;
    return s;
}
uint64_t State::draw() {  // xorshift
    if (random == 0) random = config().seed * 0x9e3779b97f4a7c15u | 1;
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random >> 11;
}
std::chrono::steady_clock::time_point State::now() {
    using std::chrono::steady_clock;
    if (!machine().has_clock) return steady_clock::now();
    return steady_clock::time_point(
        std::chrono::duration_cast<steady_clock::duration>(std::chrono::duration<double, std::micro>(passed_us)));
}
int current_device() { return t_device; }
cudaError_t explain(cudaError_t error, std::string text) {
    t_texts[error] = std::move(text);
    t_explained = error;
    return error;
}
void set_last_error(cudaError_t error) {
    t_last_error = error;
    if (t_explained != error) t_texts.erase(error);
    t_explained = cudaSuccess;
}
void fault(State& s, cudaError_t error, std::string text) {
    s.sticky = error;
    s.sticky_text = std::move(text);
    for (const auto& stream : s.streams) {
        for (const OpPtr& op : stream->queue) {
            op->done = true;
            op->work = nullptr;
            op->after.clear();
        }
        stream->queue.clear();
    }
}
}  // namespace emulator::runtime

using namespace emulator::runtime;
using emulator::machine;
using emulator::Machine;

// ---- declared in cuda_emulator_host.h and emulator.h
namespace emulator {
Machine& machine() {
    static Machine m = read_machine();
    return m;
}
void pass_us(double us) { state().passed_us += us; }  // called by operations, which run under the lock
void reset_device() {
    State& s = state();
    const std::lock_guard<std::mutex> lock(s.mutex);
    fault(s, cudaSuccess, "");
    for (const auto& stream : s.streams) stream->capture = nullptr;
    for (const auto& event : s.events) event->capture = nullptr;
    s.captures.clear();
    s.random = 0;
    t_last_error = cudaSuccess;
    t_texts.clear();
    t_device = 0;
    machine() = read_machine();
}
cudaError_t enqueue_kernel(const void* kernel, dim3 grid, dim3 block, size_t n_shared_bytes, cudaStream_t handle,
                           std::function<void()> body) {
    call([&](State& s) -> cudaError_t {
        CUstream_st* const stream = find_stream(s, handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (stream->device != t_device)
            return explain(cudaErrorInvalidResourceHandle, "the stream belongs to another device than the current one");
        if (const cudaError_t e = check_launch(s, kernel, grid, block, n_shared_bytes); e != cudaSuccess) return e;
        // Static arrays included: after cudaFuncSetAttribute a block may have all that the device has.
        const size_t limit = s.shared_limit.contains(kernel) ? shared_limit(machine().capability) : kSharedPerBlock;
        return enqueue(s, *stream, [=, body = std::move(body)] {
            pass_us(kKernelUs);
            return launch_impl(grid, block, n_shared_bytes, body, kernel, limit), true;
        });
    });
    return cudaGetLastError();  // like a launch under nvcc: an older error that nobody fetched shows here
}
}  // namespace emulator

// ---- errors
cudaError_t cudaPeekAtLastError() {
    State& s = state();
    if (t_inside_op) return cudaErrorNotPermitted;
    const std::lock_guard<std::mutex> lock(s.mutex);
    return s.sticky != cudaSuccess ? s.sticky : t_last_error;
}
cudaError_t cudaGetLastError() {
    const cudaError_t error = cudaPeekAtLastError();
    t_last_error = cudaSuccess;
    return error;
}
const char* cudaGetErrorString(cudaError_t error) {
    thread_local std::map<cudaError_t, std::string> answers;
    const ErrorText* const known = find_text(error);
    std::string text = known ? known->text : "unrecognized error code";
    std::string more;
    if (const auto noted = t_texts.find(error); noted != t_texts.end()) more = noted->second;
    if (!t_inside_op) {
        State& s = state();
        const std::lock_guard<std::mutex> lock(s.mutex);
        if (s.sticky == error && error != cudaSuccess) more = s.sticky_text;
    }
    if (error != cudaSuccess && !more.empty()) text += ": " + more;
    return (answers[error] = text).c_str();
}
const char* cudaGetErrorName(cudaError_t error) {
    const ErrorText* const known = find_text(error);
    return known ? known->name : "unrecognized error code";
}

// ---- device
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* n) {
    *n = machine().n_devices;
    return call([](State&) { return cudaSuccess; });
}
cudaError_t cudaGetDevice(int* ordinal) {
    return call([&](State&) { return *ordinal = t_device, cudaSuccess; });
}
cudaError_t cudaSetDevice(int ordinal) {
    return call([&](State&) -> cudaError_t {
        if (!is_device(ordinal)) return bad_device(ordinal);
        t_device = ordinal;
        return cudaSuccess;
    });
}
cudaError_t cudaDeviceSynchronize() {
    return call([](State& s) -> cudaError_t {
        if (!s.captures.empty())
            return spoil(*s.captures.front(), cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize");
        run_all(s, t_device);
        return s.sticky;
    });
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal) {
    return call([&](State&) -> cudaError_t {
        if (!is_device(ordinal)) return bad_device(ordinal);
        const Machine& m = machine();
        switch (attribute) {
            case cudaDevAttrMaxThreadsPerBlock:
                return *value = 1024, cudaSuccess;
            case cudaDevAttrMaxSharedMemoryPerBlock:
                return *value = int(kSharedPerBlock), cudaSuccess;
            case cudaDevAttrWarpSize:
                return *value = 32, cudaSuccess;
            case cudaDevAttrMultiProcessorCount:
                return *value = m.n_multiprocessors, cudaSuccess;
            case cudaDevAttrL2CacheSize:
                return *value = 50 << 20, cudaSuccess;
            case cudaDevAttrMaxThreadsPerMultiProcessor:
                return *value = m.capability == 86 || m.capability == 89 ? 1536 : 2048, cudaSuccess;
            case cudaDevAttrComputeCapabilityMajor:
                return *value = m.capability / 10, cudaSuccess;
            case cudaDevAttrComputeCapabilityMinor:
                return *value = m.capability % 10, cudaSuccess;
            case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
                return *value = int(shared_limit(m.capability)) + 1024, cudaSuccess;
            case cudaDevAttrMaxSharedMemoryPerBlockOptin:
                return *value = int(shared_limit(m.capability)), cudaSuccess;
        }
        return explain(cudaErrorInvalidValue, "an attribute that the emulator does not know");
    });
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int ordinal) {
    return call([&](State&) -> cudaError_t {
        if (!is_device(ordinal)) return bad_device(ordinal);
        const Machine& m = machine();
        *p = {};
        std::snprintf(p->name, sizeof p->name, "emulated GPU");
        p->totalGlobalMem = m.memory_bytes;
        p->sharedMemPerBlock = kSharedPerBlock;
        p->sharedMemPerBlockOptin = shared_limit(m.capability);
        p->sharedMemPerMultiprocessor = p->sharedMemPerBlockOptin + 1024;
        p->major = m.capability / 10;
        p->minor = m.capability % 10;
        p->multiProcessorCount = m.n_multiprocessors;
        p->maxThreadsPerBlock = 1024;
        p->maxThreadsPerMultiProcessor = m.capability == 86 || m.capability == 89 ? 1536 : 2048;
        p->l2CacheSize = 50 << 20;
        p->pciBusID = ordinal + 1;
        return cudaSuccess;
    });
}
cudaError_t cudaDeviceGetPCIBusId(char* bus_id, int n_bytes, int ordinal) {
    return call([&](State&) -> cudaError_t {
        if (!is_device(ordinal)) return bad_device(ordinal);
        if (!bus_id || n_bytes < 13) return explain(cudaErrorInvalidValue, "a bus id takes 13 bytes");
        std::snprintf(bus_id, size_t(n_bytes), "0000:%02x:00.0", unsigned(ordinal + 1) & 0xffu);
        return cudaSuccess;
    });
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    return call([&](State& s) -> cudaError_t {
        if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
        const size_t limit = shared_limit(machine().capability);
        if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || size_t(value) > limit)
            return explain(cudaErrorInvalidValue, std::to_string(value) +
                                                      " bytes of dynamic shared memory asked for, " +
                                                      std::to_string(limit) + " at most");
        s.shared_limit[kernel] = size_t(value);
        return cudaSuccess;
    });
}
cudaError_t cudaFuncGetName(const char** name, const void* kernel) {
    static std::set<std::string> names;  // stay as long as the process
    *name = names.insert(emulator::name_of_kernel(kernel)).first->c_str();
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
    return call([&](State& s) -> cudaError_t {
        const auto asked = s.shared_limit.find(kernel);
        *attributes = {
            .sharedSizeBytes = 0,
            .maxThreadsPerBlock = 1024,
            .maxDynamicSharedSizeBytes = int(asked == s.shared_limit.end() ? kSharedPerBlock : asked->second)};
        return cudaSuccess;
    });
}
