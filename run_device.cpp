#include "run_device.h"

#include <unistd.h>

#include <algorithm>
#include <vector>

#ifndef KILN_CUDA
#define KILN_CUDA 0
#endif
#if KILN_CUDA
#include "comm/nccl.h"
#endif

namespace {
RunDevice cpu(const Config& config) {
    if (config.device.dtype != "fp32")
        fail(Exit::usage, "device.dtype: {} needs a GPU; the CPU computes in fp32", config.device.dtype);
    return {.k = cpu_backend(), .name = "cpu"};
}

#if KILN_CUDA
// Ranks in ascending order: "1, 3".
std::string ranks_without(const std::vector<int>& devices) {
    std::string out;
    for (size_t r = 0; r < devices.size(); r++)
        if (devices[r] == 0) out += fmt::format("{}{}", out.empty() ? "" : ", ", r);
    return out;
}

RunDevice gpu(Comm& comm, Log& log, int n_devices) {
    const CudaDevice device = open_cuda_device(comm.local_rank() % n_devices);
    RunDevice chosen{.k = cuda_backend(), .name = device.name};
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    chosen.own = every_rank_has_its_own_device(comm, fmt::format("{}/{}", host, device.bus_id));
    if (!chosen.own)
        log.warn("{} ranks of this host share {} GPU(s): gradients are reduced through host memory", comm.local_size(),
                 n_devices);
    if (chosen.own && comm.size() > 1) chosen.nccl = std::make_shared<NcclComm>(comm);
    return chosen;
}
#endif
}  // namespace

RunDevice choose_device(const Config& config, [[maybe_unused]] Comm& comm, [[maybe_unused]] Log& log) {
    if (config.device.kind == "cpu") return cpu(config);
#if KILN_CUDA
    std::string why;
    const int mine = cuda_device_count(&why);
    std::vector<int> all(size_t(comm.size()));  // (ranks) devices that each sees
    comm.all_gather(&mine, all.data(), sizeof mine);
    const bool everywhere = std::ranges::all_of(all, [](int n) { return n > 0; });
    const std::string none = mine > 0 ? fmt::format("rank(s) {} have no GPU", ranks_without(all)) : "no GPU: " + why;
    if (everywhere) return gpu(comm, log, mine);
    if (config.device.kind == "cuda") fail(Exit::usage, "device.kind: cuda, but {}; use device.kind: cpu", none);
    RunDevice chosen = cpu(config);
    chosen.note = "device.kind: auto uses the CPU; " + none;
#else
    if (config.device.kind == "cuda")
        fail(Exit::usage,
             "device.kind: cuda is not available in this build, which was made without CUDA (make CUDA=1)");
    RunDevice chosen = cpu(config);
    chosen.note = "device.kind: auto uses the CPU; this build was made without CUDA";
#endif
    return chosen;
}
