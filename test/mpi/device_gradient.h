// Gradients in device memory: what the tests of their reduction share.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/gradient_all_reduce.h"
#include "comm/nccl.h"
#include "kernels/owners.h"
#include "test/mpi/addends.h"

inline int n_gpus() {
    static std::string why;
    static const int n = cuda_device_count(&why);
    return n;
}
// The GPU of this rank, or the one that it shares; null where there is none.
inline const Backend* gpu() {
    static const std::optional<CudaDevice> opened =
        n_gpus() ? std::optional(open_cuda_device(world().local_rank() % n_gpus())) : std::nullopt;
    return opened ? &cuda_backend() : nullptr;
}
// Every rank has a GPU of its own: NCCL can be had.
inline bool own_gpus() { return gpu() && world().local_size() <= n_gpus(); }
// All ranks, with NCCL between their GPUs.
inline Group nccl_group(double timeout_s) { return {*gpu(), world(), std::make_unique<NcclComm>(world(), timeout_s)}; }

// A gradient in a backend's memory, of exactly its own size.
class Gradient {
  public:
    Gradient(const Backend& k, const std::vector<float>& values)
        : k_(k), buf_(k.memory.alloc(values.size() * sizeof(float)), values.size(), DType::f32), host_(values) {}
    Gradient(const Gradient&) = delete;
    Gradient& operator=(const Gradient&) = delete;
    ~Gradient() { k_.memory.free(buf_.data); }
    Buf buf() const { return buf_; }
    void upload(Stream s) { k_.upload(buf_.data, host_.data(), buf_.n_bytes(), s); }
    void download(Stream s) { k_.download(host_.data(), buf_.data, buf_.n_bytes(), s); }
    const std::vector<float>& host() const { return host_; }

  private:
    const Backend& k_;
    Buf buf_;  // (n) f32
    std::vector<float> host_;
};

// This rank's addends up, summed, down again: the host waits only at the end.
inline std::vector<float> summed(const Group& group, GradientAllReduce& reduction, size_t n) {
    const Backend& k = group.backend();
    StreamOwner stream(k);
    Arena scratch("scratch");
    reduction.plan(scratch);
    scratch.allocate(k.memory, [&](void* p, size_t n_bytes) { k.zero(p, n_bytes, stream.get()); });
    Gradient grad(k, my_addends(n));
    grad.upload(stream.get());
    reduction.sum(grad.buf(), stream.get());
    grad.download(stream.get());
    group.device().wait(stream.get());
    return grad.host();
}
inline std::vector<float> host_sum(size_t n, AllReduce how) {
    std::vector<float> v = my_addends(n);
    all_reduce(world(), v, how);
    return v;
}
