// What computes for this rank: the CPU, or one GPU.
#pragma once
#include <memory>
#include <string>

#include "comm/comm.h"
#include "common/config.h"
#include "common/log.h"
#include "kernels/ops.h"

class DeviceComm;

struct RunDevice {
    const Backend& k;
    std::string name;                  // "cpu", or the GPU's
    std::string attention;             // the GPU's kernels for it: "portable"; empty on the CPU
    std::string bus_id;                // the GPU's: "0000:01:00.0"; empty on the CPU
    bool own = false;                  // every rank has a GPU of its own
    bool counts = true;                // false: a rank before this one has the same GPU
    std::shared_ptr<DeviceComm> nccl;  // there on several ranks that have
    size_t workspace_bytes = 0;        // of the GPU's memory, for scratch of the stream that computes
    size_t nccl_bytes = 0;             // of it, that NCCL has taken until now
    MemoryState memory;                // before it was taken, with the context there; zero on the CPU
    std::string note;                  // why `auto` is the CPU, or what the attention kernels do not compute
};

// Of a GPU's memory: taken by CUDA's libraries before the first step.
struct LibraryBytes {
    size_t all = 0;   // by all of them
    size_t nccl = 0;  // NCCL's part of `all`
};

// By device.kind: `auto` takes a GPU where every rank finds one, else the CPU with a note; `cuda` without a usable
// device is Error(Exit::usage), and so is a device that cannot be opened, or a dtype or device.attention that it cannot
// compute with.  Ranks of a host take its GPUs in turn; all use the same attention kernels (run/attention_kernels.h).
// `training`: gradients will be reduced, by NCCL where parallel.allreduce and the devices allow it.
RunDevice choose_device(const Config& config, Comm& comm, Log& log, bool training);
