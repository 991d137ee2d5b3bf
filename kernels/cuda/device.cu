// The device of this process: found, opened, its workspace; errors named with the kernels that may have caused them.
#include "kernels/cuda/cuda.h"

#include <atomic>
#include <cstdlib>
#include <string_view>

namespace {
constexpr int kMinCapability = 80;  // bf16 mma, cp.async

int capability_of(int ordinal) {
    int major = 0, minor = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal));
    CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal));
    return major * 10 + minor;
}
std::string version_text(int v) { return fmt::format("{}.{}", v / 1000, v % 1000 / 10); }
std::string too_old(int ordinal, const char* name, int capability) {
    return fmt::format("GPU {} ({}) has compute capability {}.{}, kiln needs {}.{} or newer", ordinal, name,
                       capability / 10, capability % 10, kMinCapability / 10, kMinCapability % 10);
}

// Why cudaGetDeviceCount failed.
std::string why_none(cudaError_t error) {
    const std::string text = cudaGetErrorString(error);
    cudaGetLastError();
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0) return text + " (no NVIDIA driver is installed)";
    if (driver >= runtime) return text;
    return fmt::format("{} (the driver is for CUDA {}, this binary needs {})", text, version_text(driver),
                       version_text(runtime));
}

// Exists to ask whether this binary holds code for a device.
__global__ void probe_kernel() {}

// The texts of the last launches' calls, for error messages; texts are literals.
constexpr unsigned kLaunchesKept = 4;
std::atomic<const char*> launches[kLaunchesKept];
std::atomic<unsigned> n_launches{0};

constexpr std::string_view kLaunch = "simt::launch(";
bool is_launch(const char* call) { return std::string_view(call).starts_with(kLaunch); }
// "gemm_kernel<T, 64>" of "simt::launch(gemm_kernel<T, 64>, dim3(...".
std::string_view kernel_of(std::string_view call) {
    call.remove_prefix(kLaunch.size());
    int depth = 0;
    for (size_t i = 0; i < call.size(); i++) {
        if (call[i] == '<' || call[i] == '(') depth++;
        if (call[i] == '>' || call[i] == ')') depth--;
        if (call[i] == ',' && depth == 0) return call.substr(0, i);
    }
    return call;
}
// "a<T>, b<T>", the newest last.
std::string last_launches() {
    const unsigned end = n_launches, begin = end > kLaunchesKept ? end - kLaunchesKept : 0;
    std::string out;
    for (unsigned i = begin; i < end; i++)
        if (const char* const call = launches[i % kLaunchesKept]; call)
            out += fmt::format("{}{}", out.empty() ? "" : ", ", kernel_of(call));
    return out;
}
// Not while a graph is captured, which no wait survives.
bool sync_each_launch() {
    const char* const text = std::getenv("KILN_CUDA_SYNC");
    return text && std::string_view(text) == "1";
}

int open_ordinal = 0;  // tests open none: the first
}  // namespace

namespace cuda {
void check_cuda(cudaError_t error, const char* call) {
    if (is_launch(call)) {
        launches[n_launches % kLaunchesKept] = call;
        n_launches++;
        if (error == cudaSuccess && sync_each_launch()) error = cudaDeviceSynchronize();
    }
    if (error == cudaSuccess) return;
    std::string text = fmt::format("CUDA: {} in {}", cudaGetErrorString(error), call);
    cudaGetLastError();  // what is not sticky must not show again at the next launch
    if (const std::string last = last_launches(); !last.empty() && !sync_each_launch())
        text += fmt::format("; launched last: {} (KILN_CUDA_SYNC=1 names the guilty one)", last);
    throw Error(error == cudaErrorMemoryAllocation ? Exit::memory : Exit::internal, text);
}

Buf workspace_bytes(size_t n_bytes, const char* op) {
    // Never freed: at exit the driver may be gone before static objects are.
    static void* const p = cuda_backend().memory.alloc(kWorkspaceBytes);
    CHECK_THAT(n_bytes <= kWorkspaceBytes, "{} needs {} bytes of scratch, the workspace has {}", op, n_bytes,
               kWorkspaceBytes);
    return Buf(p, n_bytes, DType::u8);
}

int n_multiprocessors() {
    int n = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, open_ordinal));
    return n;
}
}  // namespace cuda

int cuda_device_count(std::string* why) {
    int n = 0;
    if (const cudaError_t error = cudaGetDeviceCount(&n); error != cudaSuccess) {
        *why = why_none(error);
        return 0;
    }
    // Ordinals run from 0: devices from the first unusable one on are left alone.  CUDA lists the fastest first.
    for (int i = 0; i < n; i++)
        if (const int capability = capability_of(i); capability < kMinCapability) {
            cudaDeviceProp properties{};
            CUDA_CHECK(cudaGetDeviceProperties(&properties, i));
            *why = too_old(i, properties.name, capability);
            return i;
        }
    if (n == 0) *why = "no GPU is there";
    return n;
}

CudaDevice open_cuda_device(int ordinal) {
    int n = 0;
    if (const cudaError_t error = cudaGetDeviceCount(&n); error != cudaSuccess)
        fail(Exit::usage, "GPU {} cannot be used: {}", ordinal, why_none(error));
    if (ordinal < 0 || ordinal >= n) fail(Exit::usage, "GPU {} cannot be used: this machine has {}", ordinal, n);
    cudaDeviceProp properties{};
    CUDA_CHECK(cudaGetDeviceProperties(&properties, ordinal));
    const int capability = properties.major * 10 + properties.minor;
    if (capability < kMinCapability) fail(Exit::usage, "{}", too_old(ordinal, properties.name, capability));
    char bus_id[32] = "";
    CUDA_CHECK(cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, ordinal));

    cudaError_t error = cudaSetDevice(ordinal);
    cudaFuncAttributes attributes{};
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel));
    if (error != cudaSuccess) {
        const std::string reason = cudaGetErrorString(error);
        cudaGetLastError();
        fail(Exit::usage, "GPU {} ({}, compute capability {}.{}) cannot be used: {}", ordinal, properties.name,
             properties.major, properties.minor, reason);
    }
    open_ordinal = ordinal;
    cuda::workspace_bytes(0, "the device");
    return {.name = properties.name,
            .ordinal = ordinal,
            .capability = capability,
            .memory_bytes = properties.totalGlobalMem,
            .bus_id = bus_id};
}
