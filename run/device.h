// The device that computes for this rank: the CPU or one GPU.
#pragma once
#include <string>

#include "comm/group.h"
#include "common/config.h"
#include "common/log.h"
#include "kernels/ops.h"

struct RunDevice {
    const Backend& k;
    Group world;                  // the ranks that step together: by NCCL where gradients are reduced so, else by
                                  // messages of the host
    std::string name;             // "cpu", or the GPU's name
    std::string attention;        // name of the attention kernels: "portable"; empty on the CPU
    std::string bus_id;           // PCI bus id of the GPU: "0000:01:00.0"; empty on the CPU
    bool has_own_gpu = false;     // every rank has a GPU of its own
    bool is_first_on_gpu = true;  // false: a rank before this one has the same GPU
    size_t workspace_bytes = 0;   // of the GPU's memory: scratch of the computing stream
    size_t nccl_bytes = 0;        // of the GPU's memory: taken by NCCL so far
    std::string nccl_algorithms;  // that NCCL may take (comm/nccl.h); empty without NCCL
    MemoryState memory;           // of the GPU, with CUDA's context but nothing else taken; zero on the CPU
    std::string note;             // why `auto` took the CPU, or SelectedAttention::note
};

// Bytes of a GPU's memory that CUDA's libraries take before the first step.
struct LibraryBytes {
    size_t all = 0;   // of all libraries
    size_t nccl = 0;  // NCCL's part of `all`
};

// By device.kind: `auto` takes a GPU where every rank finds one, else the CPU with a note.  Error(Exit::usage): `cuda`
// without a usable device, a device that cannot be opened, or a dtype or device.attention that the device cannot
// compute with.  Ranks of a host take its GPUs in turn; all use the same attention kernels (run/attention_kernels.h).
// `training`: gradients will be reduced, by NCCL where parallel.allreduce and the devices allow NCCL.
// `together`: those of all ranks, `comm`, that step together with this one.
RunDevice choose_device(const Config& config, Comm& comm, Comm& together, Log& log, bool training);
