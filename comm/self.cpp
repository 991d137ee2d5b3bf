// One rank: every collective is a copy.
#include <cstring>

#include "comm/comm.h"

namespace {
class SelfComm final : public Comm {
  public:
    using Comm::Comm;
    const char* name() const override { return "self"; }
    int rank() const override { return 0; }
    int size() const override { return 1; }
    int local_rank() const override { return 0; }
    int local_size() const override { return 1; }
    void all_reduce_sum(std::span<float>) override {}
    void reduce_scatter_sum(float* send, float* recv, size_t n) override { copy(send, recv, n * sizeof(float)); }
    void all_gather(const void* send, void* recv, size_t n_bytes) override { copy(send, recv, n_bytes); }
    void all_to_all(const void* send, void* recv, size_t n_bytes) override { copy(send, recv, n_bytes); }
    void broadcast(void*, size_t, int) override {}
    void send(const void*, size_t n_bytes, int to, int) override { refuse(n_bytes, to); }
    void recv(void*, size_t n_bytes, int from, int) override { refuse(n_bytes, from); }
    void send_recv(const void* send, size_t n_send, int to, void* recv, size_t n_recv, int from) override {
        CHECK_THAT(to == 0 && from == 0 && n_send == n_recv, "a world of one: to {}, from {}, {} and {} bytes", to,
                   from, n_send, n_recv);
        copy(send, recv, n_send);
    }
    void barrier() override {}
    std::unique_ptr<Comm> split(int, int) override { return std::make_unique<SelfComm>(counter()); }
    [[noreturn]] void abort(Exit code) override { std::_Exit(int(code)); }

  private:
    [[noreturn]] static void refuse(size_t n_bytes, int peer) {
        fail(Exit::internal, "a message of {} bytes between rank {} and a world of one; use send_recv", n_bytes, peer);
    }
    static void copy(const void* from, void* to, size_t n_bytes) {
        if (from != to && n_bytes) std::memmove(to, from, n_bytes);
    }
};
}  // namespace

std::unique_ptr<Comm> make_self_comm() { return std::make_unique<SelfComm>(); }
