// DeviceComm: messages between ranks, from and to a backend's memory: the words of Comm (comm/comm.h) as work on a
// stream.  Carriers:
//
//   copies               one rank
//   messages of a Comm   in place where the host addresses the backend's memory, else through pinned host memory
//   NCCL                 from GPU to GPU (comm/nccl.h)
//
// Every rank calls the same operations in the same order, with the same counts.  Buffers of one call have one dtype;
// sums are of f32.  A call of no elements does nothing.  Calls only enqueue, unless the carrier needs the host; the
// host learns of their success or failure in wait().  Failures throw Error(Exit::peer_lost) where another rank or the
// network is to blame or nothing moved until the deadline, else Error(Exit::internal); after a failure the object is
// only good for destruction.
#pragma once
#include <memory>

#include "comm/comm.h"
#include "kernels/ops.h"

class DeviceComm {
  public:
    DeviceComm(int rank, int size) : rank_(rank), size_(size) {}
    DeviceComm(const DeviceComm&) = delete;
    DeviceComm& operator=(const DeviceComm&) = delete;
    virtual ~DeviceComm() = default;
    int rank() const { return rank_; }
    int size() const { return size_; }
    // True: the host takes part in every call, so a graph cannot record it (Backend::begin_graph).
    virtual bool needs_host() const = 0;

    void all_reduce_sum(Buf data, Stream s);
    // send holds size() blocks; recv gets the sum over ranks of their block rank().  recv may be block rank() of send;
    // then the other blocks of send are undefined afterwards.
    void reduce_scatter_sum(Buf send, Buf recv, Stream s);
    // recv gets size() blocks in rank order; send may be block rank() of recv.
    void all_gather(Buf send, Buf recv, Stream s);
    // send holds size() blocks, block r for rank r; recv gets size() blocks, block r from rank r.  They do not overlap.
    void all_to_all(Buf send, Buf recv, Stream s);
    void broadcast(Buf data, int root, Stream s);
    // Only the two ranks call these, with equal counts.  The sender's stream may wait until the other one receives.
    void send(Buf data, int to, Stream s);
    void recv(Buf data, int from, Stream s);
    // Both at once: rings of ranks that send and receive do not wait for each other.  The counts may differ.
    void send_recv(Buf send, int to, Buf recv, int from, Stream s);

    // The host waits until the stream is done.
    virtual void wait(Stream s) = 0;
    // The same carrier between the ranks of `part`, all of which call it; by copies where `part` is one rank.
    virtual std::unique_ptr<DeviceComm> split(Comm& part) const = 0;

  private:
    // The carriers' part.  The public functions have checked dtypes, counts and ranks; no buffer is empty, but in
    // do_send_recv() one of the two may be absent.
    virtual void do_all_reduce_sum(Buf data, Stream s) = 0;
    virtual void do_reduce_scatter_sum(Buf send, Buf recv, Stream s) = 0;
    virtual void do_all_gather(Buf send, Buf recv, Stream s) = 0;
    virtual void do_all_to_all(Buf send, Buf recv, Stream s) = 0;
    virtual void do_broadcast(Buf data, int root, Stream s) = 0;
    virtual void do_send_recv(Buf send, int to, Buf recv, int from, Stream s) = 0;

    const int rank_, size_;
};

// Carried by the messages of `host`, which outlives it, or by copies where `host` is one rank.
std::unique_ptr<DeviceComm> make_device_comm(const Backend& k, Comm& host);
