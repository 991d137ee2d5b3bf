// Owners of a backend's resources: never copied; each gives its resource back at the end of its scope.
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

class GraphOwner {
  public:
    // Records the work that work() gives to the stream.  An exception of work() ends the recording.
    template <class F>
    GraphOwner(const Backend& k, Stream s, F&& work) : k_(&k) {
        k.begin_graph(s);
        try {
            work();
        } catch (...) {
            try {
                k.free_graph(k.end_graph(s));
            } catch (const Error&) {  // expected: work()'s exception spoiled the recording
            }
            throw;
        }
        graph_ = k.end_graph(s);
    }
    GraphOwner(GraphOwner&& o) noexcept : k_(o.k_), graph_(std::exchange(o.graph_, nullptr)) {}
    GraphOwner& operator=(GraphOwner&&) = delete;
    ~GraphOwner() {
        if (graph_) k_->free_graph(graph_);
    }
    void launch(Stream s) const { k_->launch_graph(graph_, s); }

  private:
    const Backend* k_;
    Graph* graph_ = nullptr;
};

// Memory of the device.
class DeviceBuffer {
  public:
    DeviceBuffer(const Backend& k, size_t n_bytes) : k_(&k), data_(k.memory.alloc(n_bytes)) {}
    DeviceBuffer(DeviceBuffer&& o) noexcept : k_(o.k_), data_(std::exchange(o.data_, nullptr)) {}
    DeviceBuffer& operator=(DeviceBuffer&&) = delete;
    ~DeviceBuffer() {
        if (data_) k_->memory.free(data_);
    }
    void* get() const { return data_; }

  private:
    const Backend* k_;
    void* data_;
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
