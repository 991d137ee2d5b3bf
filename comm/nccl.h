// DeviceComm over NCCL: from GPU to GPU, without a detour through host memory.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "comm/comm.h"
#include "comm/device_comm.h"

// All ranks of `comm` construct theirs at the same time, each with its own device opened before; NCCL refuses ranks
// that share a device.  The communicator is non-blocking: a call that does not end within timeout_s is an Error, not a
// hang.  split() makes a new communicator.
class NcclComm final : public DeviceComm {
  public:
    explicit NcclComm(Comm& comm, double timeout_s = 600);
    ~NcclComm() override;
    bool needs_host() const override { return false; }
    void wait(Stream s) override;
    std::unique_ptr<DeviceComm> split(Comm& part) const override;

  private:
    void do_all_reduce_sum(Buf data, Stream s) override;
    void do_reduce_scatter_sum(Buf send, Buf recv, Stream s) override;
    void do_all_gather(Buf send, Buf recv, Stream s) override;
    void do_all_to_all(Buf send, Buf recv, Stream s) override;
    void do_broadcast(Buf data, int root, Stream s) override;
    void do_send_recv(Buf send, int to, Buf recv, int from, Stream s) override;

    struct State;  // hides NCCL's and CUDA's headers
    std::unique_ptr<State> state_;
};

// The algorithms that sums by NCCL may take: the value of NCCL_ALGO, or, where kiln was compiled with NCCL 2.31 or
// later and NCCL_ALGO is not set, what each call names.  Unless the user has set it, sums in an NVLink switch are
// excluded: their bits differ from call to call.  Call it after the first NcclComm was made.
std::string nccl_algorithms();

// No two ranks name the same device.
bool every_rank_has_its_own_device(const std::vector<std::string>& device_of_rank);
// The same on every rank; `mine` names host and device of this one.
bool every_rank_has_its_own_device(Comm& comm, const std::string& mine);
