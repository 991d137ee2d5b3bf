#include "comm/device_comm.h"

#include <optional>

#include "comm/staging.h"

namespace {
// `whole` is one block of the size of `block` per rank.
void expect_blocks(const char* call, Buf whole, Buf block, int size) {
    CHECK_THAT(whole.dtype == block.dtype && whole.count == block.count * size_t(size),
               "{} over {} ranks: {} {} are not {} blocks of {} {}", call, size, whole.count, dtype_name(whole.dtype),
               size, block.count, dtype_name(block.dtype));
}
void expect_f32(const char* call, Buf data) {
    CHECK_THAT(data.dtype == DType::f32, "{} of {} numbers; sums are of f32", call, dtype_name(data.dtype));
}
void expect_peer(const char* call, int peer, int rank, int size) {
    CHECK_THAT(peer >= 0 && peer < size, "{}: rank {} of {}", call, peer, size);
    CHECK_THAT(peer != rank, "{}: rank {} and itself would wait for each other; use send_recv", call, rank);
}
}  // namespace

void DeviceComm::all_reduce_sum(Buf data, Stream s) {
    expect_f32("all_reduce_sum", data);
    if (data.count) do_all_reduce_sum(data, s);
}
void DeviceComm::reduce_scatter_sum(Buf send, Buf recv, Stream s) {
    expect_f32("reduce_scatter_sum", send);
    expect_blocks("reduce_scatter_sum", send, recv, size_);
    if (recv.count) do_reduce_scatter_sum(send, recv, s);
}
void DeviceComm::all_gather(Buf send, Buf recv, Stream s) {
    expect_blocks("all_gather", recv, send, size_);
    if (send.count) do_all_gather(send, recv, s);
}
void DeviceComm::all_to_all(Buf send, Buf recv, Stream s) {
    CHECK_THAT(send.dtype == recv.dtype && send.count == recv.count && send.count % size_t(size_) == 0,
               "all_to_all over {} ranks: {} {} to {} {}; both must be {} blocks of one length", size_, send.count,
               dtype_name(send.dtype), recv.count, dtype_name(recv.dtype), size_);
    if (send.count) do_all_to_all(send, recv, s);
}
void DeviceComm::broadcast(Buf data, int root, Stream s) {
    CHECK_THAT(root >= 0 && root < size_, "broadcast from rank {} of {}", root, size_);
    if (data.count) do_broadcast(data, root, s);
}
void DeviceComm::send(Buf data, int to, Stream s) {
    expect_peer("send", to, rank_, size_);
    if (data.count) do_send_recv(data, to, Buf(), -1, s);
}
void DeviceComm::recv(Buf data, int from, Stream s) {
    expect_peer("recv", from, rank_, size_);
    if (data.count) do_send_recv(Buf(), -1, data, from, s);
}
void DeviceComm::send_recv(Buf send, int to, Buf recv, int from, Stream s) {
    CHECK_THAT(to >= 0 && to < size_ && from >= 0 && from < size_, "send_recv to rank {}, from rank {} of {}", to, from,
               size_);
    CHECK_THAT(send.dtype == recv.dtype, "send_recv of {} and {}", dtype_name(send.dtype), dtype_name(recv.dtype));
    CHECK_THAT((to == rank_) == (from == rank_) && (to != rank_ || send.count == recv.count),
               "send_recv on rank {}: {} numbers to rank {}, {} from rank {}; a rank gets from itself what it sends",
               rank_, send.count, to, recv.count, from);
    if (send.count || recv.count) do_send_recv(send.count ? send : Buf(), to, recv.count ? recv : Buf(), from, s);
}

namespace {
class Copies final : public DeviceComm {
  public:
    explicit Copies(const Backend& k) : DeviceComm(0, 1), k_(k) {}
    bool needs_host() const override { return false; }
    void wait(Stream s) override { k_.synchronize(s); }
    std::unique_ptr<DeviceComm> split(Comm&) const override { return std::make_unique<Copies>(k_); }

  private:
    void do_all_reduce_sum(Buf, Stream) override {}
    void do_reduce_scatter_sum(Buf send, Buf recv, Stream s) override { copy(send, recv, s); }
    void do_all_gather(Buf send, Buf recv, Stream s) override { copy(send, recv, s); }
    void do_all_to_all(Buf send, Buf recv, Stream s) override { copy(send, recv, s); }
    void do_broadcast(Buf, int, Stream) override {}
    void do_send_recv(Buf send, int, Buf recv, int, Stream s) override { copy(send, recv, s); }
    void copy(Buf from, Buf to, Stream s) const {
        if (from.data != to.data) k_.copy(to.data, from.data, from.n_bytes(), s);
    }

    const Backend& k_;
};

// The backend's memory is the host's, and its work is done when a call returns.
class InPlace final : public DeviceComm {
  public:
    InPlace(const Backend& k, Comm& host) : DeviceComm(host.rank(), host.size()), k_(k), host_(host) {}
    bool needs_host() const override { return true; }
    void wait(Stream) override {}
    std::unique_ptr<DeviceComm> split(Comm& part) const override { return make_device_comm(k_, part); }

  private:
    void do_all_reduce_sum(Buf data, Stream) override { host_.all_reduce_sum({data.as<float>(), data.count}); }
    void do_reduce_scatter_sum(Buf send, Buf recv, Stream) override {
        host_.reduce_scatter_sum(send.as<float>(), recv.as<float>(), recv.count);
    }
    void do_all_gather(Buf send, Buf recv, Stream) override { host_.all_gather(send.data, recv.data, send.n_bytes()); }
    void do_all_to_all(Buf send, Buf recv, Stream) override {
        host_.all_to_all(send.data, recv.data, send.n_bytes() / size_t(size()));
    }
    void do_broadcast(Buf data, int root, Stream) override { host_.broadcast(data.data, data.n_bytes(), root); }
    void do_send_recv(Buf send, int to, Buf recv, int from, Stream) override {
        if (!recv) return host_.send(send.data, send.n_bytes(), to);
        if (!send) return host_.recv(recv.data, recv.n_bytes(), from);
        host_.send_recv(send.data, send.n_bytes(), to, recv.data, recv.n_bytes(), from);
    }

    const Backend& k_;
    Comm& host_;
};

class Staged final : public DeviceComm {
  public:
    Staged(const Backend& k, Comm& host) : DeviceComm(host.rank(), host.size()), k_(k), host_(host) {}
    bool needs_host() const override { return true; }
    void wait(Stream s) override { k_.synchronize(s); }
    std::unique_ptr<DeviceComm> split(Comm& part) const override { return make_device_comm(k_, part); }

  private:
    void do_all_reduce_sum(Buf data, Stream s) override {
        staging().transform(data, s, [&](std::span<float> piece) { host_.all_reduce_sum(piece); });
    }
    void do_reduce_scatter_sum(Buf send, Buf recv, Stream s) override {
        exchange({send, ranks()}, {recv, 1}, s, [&](char* down, size_t, char* up, size_t n) {
            host_.reduce_scatter_sum(reinterpret_cast<float*>(down), reinterpret_cast<float*>(up), n / sizeof(float));
        });
    }
    void do_all_gather(Buf send, Buf recv, Stream s) override {
        exchange({send, 1}, {recv, ranks()}, s,
                 [&](char* down, size_t n, char* up, size_t) { host_.all_gather(down, up, n); });
    }
    void do_all_to_all(Buf send, Buf recv, Stream s) override {
        exchange({send, ranks()}, {recv, ranks()}, s,
                 [&](char* down, size_t n, char* up, size_t) { host_.all_to_all(down, up, n); });
    }
    void do_broadcast(Buf data, int root, Stream s) override {
        const Staging::Blocks all{data, 1}, none;
        if (rank() == root)
            exchange(all, none, s, [&](char* down, size_t n, char*, size_t) { host_.broadcast(down, n, root); });
        else
            exchange(none, all, s, [&](char*, size_t, char* up, size_t n) { host_.broadcast(up, n, root); });
    }
    void do_send_recv(Buf send, int to, Buf recv, int from, Stream s) override {
        exchange({send, send ? 1u : 0u}, {recv, recv ? 1u : 0u}, s,
                 [&](char* down, size_t n_down, char* up, size_t n_up) {
                     if (n_up == 0) return host_.send(down, n_down, to);
                     if (n_down == 0) return host_.recv(up, n_up, from);
                     host_.send_recv(down, n_down, to, up, n_up, from);
                 });
    }

    template <class F>
    void exchange(Staging::Blocks from, Staging::Blocks to, Stream s, F&& messages) {
        staging().exchange(from, to, s, messages);
    }
    // Pinned when the first call comes: most runs send nothing this way.
    Staging& staging() {
        if (!staging_) staging_.emplace(k_, kPiece * ranks());
        return *staging_;
    }
    size_t ranks() const { return size_t(size()); }

    static constexpr size_t kPiece = size_t(1) << 20;  // bytes per rank and message
    const Backend& k_;
    Comm& host_;
    std::optional<Staging> staging_;
};
}  // namespace

std::unique_ptr<DeviceComm> make_device_comm(const Backend& k, Comm& host) {
    if (host.size() == 1) return std::make_unique<Copies>(k);
    if (k.host_addressable) return std::make_unique<InPlace>(k, host);
    return std::make_unique<Staged>(k, host);
}
