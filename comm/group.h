// Group: ranks of one run that share a part of its work, and the messages between them: the same words for host memory,
// group.host().all_gather(...), and for memory of the backend, group.device().all_gather(...).
#pragma once
#include <memory>
#include <utility>

#include "comm/comm.h"
#include "comm/device_comm.h"

class Group {
  public:
    // One rank.
    explicit Group(const Backend& k)
        : k_(k), owned_(make_self_comm()), host_(*owned_), device_(make_device_comm(k, host_)) {}
    // The ranks of `host`, which outlives the group.  Its messages also carry memory of `k`.
    Group(const Backend& k, Comm& host) : Group(k, host, make_device_comm(k, host)) {}
    // `device`, between the same ranks, carries memory of `k`.
    Group(const Backend& k, Comm& host, std::unique_ptr<DeviceComm> device)
        : k_(k), host_(host), device_(std::move(device)) {}
    Group(Group&&) = default;

    const Backend& backend() const { return k_; }
    int rank() const { return host_.rank(); }
    int size() const { return host_.size(); }
    Comm& host() const { return host_; }
    DeviceComm& device() const { return *device_; }

    // The ranks of each color, ordered by key and then by rank.  All ranks of this group call it.
    Group split(int color, int key) const {
        std::unique_ptr<Comm> host = host_.split(color, key);
        Group part(k_, *host, device_->split(*host));
        part.owned_ = std::move(host);
        return part;
    }

  private:
    const Backend& k_;
    std::unique_ptr<Comm> owned_;  // host_, where no one else owns it
    Comm& host_;
    std::unique_ptr<DeviceComm> device_;
};
