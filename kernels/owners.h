// Owners of what a backend hands out: never copied, given back at the end of their scope.
#pragma once
#include <utility>

#include "kernels/ops.h"

class StreamOwner {
  public:
    explicit StreamOwner(const Backend& k) : k_(k), stream_(k.open_stream()) {}
    StreamOwner(const StreamOwner&) = delete;
    StreamOwner& operator=(const StreamOwner&) = delete;
    ~StreamOwner() { k_.close_stream(stream_); }
    Stream get() const { return stream_; }

  private:
    const Backend& k_;
    Stream stream_;
};

class MarkOwner {
  public:
    explicit MarkOwner(const Backend& k) : k_(&k), mark_(k.new_mark()) {}
    MarkOwner(MarkOwner&& o) noexcept : k_(o.k_), mark_(std::exchange(o.mark_, nullptr)) {}
    MarkOwner& operator=(MarkOwner&&) = delete;
    ~MarkOwner() {
        if (mark_) k_->free_mark(mark_);
    }
    Mark* get() const { return mark_; }

  private:
    const Backend* k_;
    Mark* mark_;
};

// Pinned host memory.
class HostBuffer {
  public:
    HostBuffer(const Backend& k, size_t n_bytes) : k_(&k), data_(k.host_memory.alloc(n_bytes)) {}
    HostBuffer(HostBuffer&& o) noexcept : k_(o.k_), data_(std::exchange(o.data_, nullptr)) {}
    HostBuffer& operator=(HostBuffer&&) = delete;
    ~HostBuffer() {
        if (data_) k_->host_memory.free(data_);
    }
    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }

  private:
    const Backend* k_;
    void* data_;
};
