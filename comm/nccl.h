// Messages between the devices of the ranks of one run, without a detour through host memory.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "comm/comm.h"
#include "kernels/ops.h"

// Every rank calls the same operations in the same order, on its compute stream, with the same counts.  Buffers are
// f32 in device memory.  Calls only enqueue; the host learns of their success or failure in wait().  Failures throw
// Error(Exit::peer_lost) where another rank or the network is to blame or nothing moved until the deadline, else
// Error(Exit::internal); after a failure the object is only good for destruction.
class DeviceComm {
  public:
    virtual ~DeviceComm() = default;
    virtual int rank() const = 0;
    virtual int size() const = 0;
    virtual void all_reduce_sum(Buf data, Stream s) = 0;
    // send holds size() blocks, block r for rank r; recv gets size() blocks, block r from rank r.  They do not overlap.
    virtual void all_to_all(Buf send, Buf recv, Stream s) = 0;
    // recv: size() blocks in rank order; send may be block rank() of recv.
    virtual void all_gather(Buf send, Buf recv, Stream s) = 0;
    // The host waits until the stream is done.
    virtual void wait(Stream s) = 0;
};

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
