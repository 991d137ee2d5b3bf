#include "run_device.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <vector>

#ifndef KILN_CUDA
#define KILN_CUDA 0
#endif
#if KILN_CUDA
#include "comm/nccl.h"
#endif

namespace {
// `why` says why it is not a GPU; empty where the CPU was asked for.
RunDevice cpu(const Config& config, const std::string& why) {
    if (config.device.dtype != "fp32")
        fail(Exit::usage, "device.dtype: {} needs a GPU{}{}; the CPU computes in fp32", config.device.dtype,
             why.empty() ? "" : "; ", why);
    RunDevice chosen{.k = cpu_backend(), .name = "cpu"};
    if (!why.empty()) chosen.note = "device.kind: auto uses the CPU; " + why;
    return chosen;
}

#if KILN_CUDA
// Ranks in ascending order: "1, 3".
std::string ranks_without(const std::vector<int>& devices) {
    std::string out;
    for (size_t r = 0; r < devices.size(); r++)
        if (devices[r] == 0) out += fmt::format("{}{}", out.empty() ? "" : ", ", r);
    return out;
}

// The same for all processes of one running system, containers included; names of hosts may repeat.
std::string this_host() {
    std::string id;
    std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
    char name[256] = "";
    gethostname(name, sizeof name - 1);
    return id.empty() ? name : id;
}

RunDevice gpu(const Config& config, Comm& comm, Log& log, int n_devices, bool training) {
    const CudaDevice device = open_cuda_device(comm.local_rank() % n_devices);
    RunDevice chosen{.k = cuda_backend(), .name = device.name};
    chosen.workspace_bytes = device.workspace_bytes;
    chosen.own = every_rank_has_its_own_device(comm, this_host() + "/" + device.bus_id);
    if (!chosen.own)
        log.warn(
            "ranks share GPUs (on rank 0's host {} ranks share {} GPU(s)): gradients are reduced through host memory",
            comm.local_size(), n_devices);
    const std::string& how = config.parallel.allreduce;
    if (training && chosen.own && comm.size() > 1 && (how == "auto" || how == "nccl" || how == "ordered"))
        chosen.nccl = std::make_shared<NcclComm>(comm);
    return chosen;
}
#endif
}  // namespace

RunDevice choose_device(const Config& config, [[maybe_unused]] Comm& comm, [[maybe_unused]] Log& log,
                        [[maybe_unused]] bool training) {
    if (config.device.kind == "cpu") return cpu(config, "");
#if KILN_CUDA
    std::string why;
    const int mine = cuda_device_count(&why);
    std::vector<int> all(size_t(comm.size()));  // (ranks) devices that each sees
    comm.all_gather(&mine, all.data(), sizeof mine);
    if (std::ranges::all_of(all, [](int n) { return n > 0; })) return gpu(config, comm, log, mine, training);
    const std::string none = mine > 0 ? fmt::format("rank(s) {} have no GPU", ranks_without(all)) : "no GPU: " + why;
    if (config.device.kind == "cuda") fail(Exit::usage, "device.kind: cuda, but {}; use device.kind: cpu", none);
    return cpu(config, none);
#else
    if (config.device.kind == "cuda")
        fail(Exit::usage,
             "device.kind: cuda is not available in this build, which was made without nvcc; use device.kind: cpu");
    return cpu(config, "no GPU: this build was made without CUDA");
#endif
}
