#include "run/device.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <vector>

#include "common/hash.h"
#include "run/attention_kernels.h"
#include "run/roles.h"

#ifndef KILN_CUDA
#define KILN_CUDA 0
#endif
#if KILN_CUDA
#include "comm/nccl.h"
#endif

namespace {
bool needs_gpu(UseAttention kernels) {
    switch (kernels) {
        case UseAttention::automatic:
        case UseAttention::portable:
            return false;
        case UseAttention::sm90:
        case UseAttention::cudnn:
            return true;
    }
    return true;
}

// `why`: the reason for using no GPU; empty where the config asks for the CPU.
RunDevice cpu(const Config& config, Comm& together, const std::string& why) {
    if (config.device.dtype != Precision::fp32)
        fail(Exit::usage, "device.dtype: {} needs a GPU{}{}; the CPU computes in fp32", word_of(config.device.dtype),
             why.empty() ? "" : "; ", why);
    if (needs_gpu(config.device.attention))
        fail(Exit::usage, "device.attention: {} needs a GPU{}{}; use device.attention: auto",
             word_of(config.device.attention), why.empty() ? "" : "; ", why);
    RunDevice chosen{.k = cpu_backend(), .world = Group(cpu_backend(), together), .name = "cpu"};
    if (!why.empty()) chosen.note = "device.kind: auto uses the CPU; " + why;
    return chosen;
}

#if KILN_CUDA
// The ranks whose entry in `all` is 0, in ascending order: "1, 3".
std::string ranks_without(const std::vector<int>& all) {
    std::string out;
    for (size_t r = 0; r < all.size(); r++)
        if (all[r] == 0) out += fmt::format("{}{}", out.empty() ? "" : ", ", r);
    return out;
}

// A host's id, equal in all processes of one running system, containers included; host names may repeat.
std::string this_host() {
    std::string id;
    std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
    char name[256] = "";
    gethostname(name, sizeof name - 1);
    return id.empty() ? name : id;
}

// True where no rank before this one has the same value.
bool first_with(Comm& comm, uint64_t mine) {
    std::vector<uint64_t> all(size_t(comm.size()));  // (ranks)
    comm.all_gather(&mine, all.data(), sizeof mine);
    return std::ranges::find(all, mine) - all.begin() == comm.rank();
}

// True for the algorithms that move gradients by NCCL where every rank has a GPU of its own.
bool takes_nccl(UseAllReduce how) {
    switch (how) {
        case UseAllReduce::automatic:
        case UseAllReduce::ordered:
        case UseAllReduce::nccl:
            return true;
        case UseAllReduce::mpi:
        case UseAllReduce::ring:
            return false;
    }
    return false;
}

// Why `kernel` cannot run on every rank's open device: the reason of the first rank where it cannot.  All ranks get the
// same text, although their GPUs may differ.
std::string attention_refusal(Comm& comm, AttentionKernel kernel) {
    using Text = std::array<char, 256>;
    Text mine{};
    cuda_attention_refusal(kernel).copy(mine.data(), mine.size() - 1);
    std::vector<Text> all(size_t(comm.size()));  // (ranks) why not
    comm.all_gather(mine.data(), all.data(), sizeof mine);
    const auto first = std::ranges::find_if(all, [](const Text& why) { return why[0] != 0; });
    if (first == all.end()) return "";
    if (comm.size() == 1) return first->data();
    std::vector<int> able;  // (ranks)
    for (const Text& why : all) able.push_back(why[0] == 0);
    return fmt::format("rank(s) {}: {}", ranks_without(able), first->data());
}

RunDevice gpu(const Config& config, Comm& comm, Comm& together, Log& log, int n_devices, bool training) {
    const CudaDevice device = open_cuda_device(comm.local_rank() % n_devices);
    const SelectedAttention attention =
        select_attention(config, attention_refusal(comm, preferred_attention(config)), training);
    const Backend& k = cuda_backend(attention.kernel);
    const std::string place = this_host() + "/" + device.bus_id;
    const bool has_own_gpu = every_rank_has_its_own_device(comm, place),
               is_first_on_gpu = first_with(comm, hash64(place));
    if (!has_own_gpu)
        log.warn(
            "ranks share GPUs (on rank 0's host {} ranks share {} GPU(s)): gradients are reduced through host memory",
            comm.local_size(), n_devices);
    const bool by_nccl = training && has_own_gpu && together.size() > 1 && !has_servers(config) &&
                         takes_nccl(config.parallel.allreduce) && config.parallel.reduce_dtype == Precision::fp32;
    const size_t before = k.memory_state().n_free;
    Group world = by_nccl ? Group(k, together, std::make_unique<NcclComm>(together, config.run.timeout_seconds))
                          : Group(k, together);
    const size_t nccl_bytes = by_nccl ? before - std::min(before, k.memory_state().n_free) : 0;
    return {.k = k,
            .world = std::move(world),
            .name = device.name,
            .attention = attention_name(attention.kernel),
            .bus_id = device.bus_id,
            .has_own_gpu = has_own_gpu,
            .is_first_on_gpu = is_first_on_gpu,
            .workspace_bytes = device.workspace_bytes,
            .nccl_bytes = nccl_bytes,
            .nccl_algorithms = by_nccl ? nccl_algorithms() : "",
            .memory = device.memory,
            .note = attention.note};
}
#endif
}  // namespace

RunDevice choose_device(const Config& config, [[maybe_unused]] Comm& comm, Comm& together, [[maybe_unused]] Log& log,
                        [[maybe_unused]] bool training) {
    switch (config.device.kind) {
        case DeviceKind::cpu:
            return cpu(config, together, "");
        case DeviceKind::automatic:
        case DeviceKind::cuda:
            break;
    }
    const bool gpu_only = config.device.kind == DeviceKind::cuda;
#if KILN_CUDA
    std::string why;
    const int mine = cuda_device_count(&why);
    std::vector<int> all(size_t(comm.size()));  // (ranks) devices that each rank sees
    comm.all_gather(&mine, all.data(), sizeof mine);
    if (std::ranges::all_of(all, [](int n) { return n > 0; })) return gpu(config, comm, together, log, mine, training);
    const std::string none = mine > 0 ? fmt::format("rank(s) {} have no GPU", ranks_without(all)) : "no GPU: " + why;
    if (gpu_only) fail(Exit::usage, "device.kind: cuda, but {}; use device.kind: cpu", none);
    return cpu(config, together, none);
#else
    if (gpu_only)
        fail(Exit::usage,
             "device.kind: cuda is not available in this build, which was made without nvcc; use device.kind: cpu");
    return cpu(config, together, "no GPU: this build was made without CUDA");
#endif
}
