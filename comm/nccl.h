// DeviceComm over NCCL: from GPU to GPU, without a detour through host memory.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "comm/comm.h"
#include "comm/device_comm.h"

// DeviceComm by NCCL.  All ranks of `comm` construct theirs at the same time, each with its own device opened before;
// NCCL refuses ranks that share a device.  The communicator is non-blocking: a call that does not end within timeout_s
// is an Error, not a hang.
class NcclComm final : public DeviceComm {
  public:
    explicit NcclComm(Comm& comm, double timeout_s = 600);
    ~NcclComm() override;
    NcclComm(const NcclComm&) = delete;
    NcclComm& operator=(const NcclComm&) = delete;
    int rank() const override;
    int size() const override;
    void all_reduce_sum(Buf data, Stream s) override;
    void all_to_all(Buf send, Buf recv, Stream s) override;
    void all_gather(Buf send, Buf recv, Stream s) override;
    void wait(Stream s) override;

  private:
    struct State;  // hides NCCL's and CUDA's headers
    std::unique_ptr<State> state_;
};

// No two ranks name the same device.
bool every_rank_has_its_own_device(const std::vector<std::string>& device_of_rank);
// The same on every rank; `mine` names host and device of this one.
bool every_rank_has_its_own_device(Comm& comm, const std::string& mine);
