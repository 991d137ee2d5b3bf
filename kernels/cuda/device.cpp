// Finds and opens the device of this process.  Errors name the kernels that may have caused them.
#include "kernels/cuda/cuda.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
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

// The reason why cudaGetDeviceCount failed.
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

// The last launches, for error messages: the kernel, or the call of the library that chose the kernel.
struct Launch {
    const void* kernel = nullptr;
    const char* call = nullptr;
};
constexpr unsigned kLaunchesKept = 4;
Launch launches[kLaunchesKept];  // of the thread that computes
unsigned n_launches = 0;

// "gelu_kernel<float>" of "void (anonymous namespace)::gelu_kernel<float>(float*, ...)", without namespaces.
std::string short_name(std::string text) {
    constexpr std::string_view kAnonymous = "(anonymous namespace)::";
    if (const size_t at = text.find(kAnonymous); at != std::string::npos) text.erase(at, kAnonymous.size());
    const size_t stop = std::min(text.find_first_of("<("), text.size());  // where arguments begin
    const size_t scope = text.rfind("::", stop), space = text.rfind(' ', stop);
    size_t begin = 0;
    if (space != std::string::npos) begin = space + 1;
    if (scope != std::string::npos) begin = std::max(begin, scope + 2);
    const size_t closed = text.rfind(">(");
    return text.substr(begin, (closed != std::string::npos ? closed + 1 : text.find('(', stop)) - begin);
}
std::string name_of(const Launch& launch) {
    if (launch.call) return launch.call;
    const char* name = nullptr;
    if (cudaFuncGetName(&name, launch.kernel) != cudaSuccess) return fmt::format("the kernel at {}", launch.kernel);
    int status = 0;
    const std::unique_ptr<char, decltype(&std::free)> plain(abi::__cxa_demangle(name, nullptr, nullptr, &status),
                                                            std::free);
    return short_name(status == 0 ? plain.get() : name);
}
// "a<float>, b<float>", the newest last.
std::string last_launches() {
    std::string out;
    for (unsigned i = n_launches > kLaunchesKept ? n_launches - kLaunchesKept : 0; i < n_launches; i++)
        out += fmt::format("{}{}", out.empty() ? "" : ", ", name_of(launches[i % kLaunchesKept]));
    return out;
}

[[noreturn]] void report(cudaError_t error, const std::string& where) {
    std::string text = fmt::format("CUDA: {} in {}", cudaGetErrorString(error), where);
    cudaGetLastError();  // clears an error that is not sticky: the next launch must not report it again
    if (const std::string last = last_launches(); !last.empty() && !cuda::waits_for_each_launch())
        text += fmt::format("; launched last: {} (KILN_CUDA_SYNC=1 names the guilty one)", last);
    throw Error(error == cudaErrorMemoryAllocation ? Exit::memory : Exit::internal, text);
}
void note(const Launch& launch, cudaError_t error) {
    launches[n_launches++ % kLaunchesKept] = launch;
    if (error == cudaSuccess && cuda::waits_for_each_launch()) error = cudaDeviceSynchronize();
    if (error != cudaSuccess) report(error, name_of(launch));
}

int open_ordinal = 0;  // the first device, for tests, which open none
}  // namespace

namespace cuda {
bool waits_for_each_launch() {
    const char* const text = std::getenv("KILN_CUDA_SYNC");
    return text && std::string_view(text) == "1";
}

void check_cuda(cudaError_t error, const char* call) {
    if (error != cudaSuccess) report(error, call);
}
void check_launch(cudaError_t error, const void* kernel) { note({.kernel = kernel}, error); }
void check_launch(cudaError_t error, const char* call) { note({.call = call}, error); }

int n_multiprocessors() {
    int n = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, open_ordinal));
    return n;
}

int open_capability() { return capability_of(open_ordinal); }
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
    if (error == cudaSuccess) error = cuda::find_code();
    if (error != cudaSuccess) {
        const std::string reason = cudaGetErrorString(error);
        cudaGetLastError();
        fail(Exit::usage, "GPU {} ({}, compute capability {}.{}) cannot be used: {}", ordinal, properties.name,
             properties.major, properties.minor, reason);
    }
    open_ordinal = ordinal;
    return {.name = properties.name,
            .ordinal = ordinal,
            .capability = capability,
            .memory_bytes = properties.totalGlobalMem,
            .workspace_bytes = cuda::kWorkspaceBytes + cuda::gemm_workspace_bytes(),
            .bus_id = bus_id,
            .memory = cuda_backend().memory_state()};
}
