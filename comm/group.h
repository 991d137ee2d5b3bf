// Group: ranks of one run that share a part of its work, and the messages between them: the same words for host memory,
// group.host().all_gather(...), and for memory of the backend, group.device().all_gather(...).
#pragma once
#include <memory>
#include <utility>

#include "comm/comm.h"
#include "comm/device_comm.h"

class Group {
  public:
    // The ranks of `host`, which outlives the group.  Its messages also carry memory of `k`.
    Group(const Backend& k, Comm& host) : Group(host, make_device_comm(k, host)) {}
    // `device`, between the same ranks, carries the backend's memory.
    Group(Comm& host, std::unique_ptr<DeviceComm> device) : host_(&host), device_(std::move(device)) {}

    int rank() const { return host_->rank(); }
    int size() const { return host_->size(); }
    Comm& host() const { return *host_; }
    DeviceComm& device() const { return *device_; }

    // The ranks of each color, ordered by key and then by rank.  All ranks of this group call it.
    Group split(int color, int key) const {
        std::unique_ptr<Comm> host = host_->split(color, key);
        Group part(*host, device_->split(*host));
        part.owned_ = std::move(host);
        return part;
    }

  private:
    std::unique_ptr<Comm> owned_;  // of a part; outlives device_
    Comm* host_;
    std::unique_ptr<DeviceComm> device_;
};
