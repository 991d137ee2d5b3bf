// DeviceComm: messages between the memories of the backends of one run's ranks.
#pragma once
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
