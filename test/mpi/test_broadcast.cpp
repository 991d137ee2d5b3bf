// The messages by which rank 0's state reaches the others.  Made to fail by: moments sent before the first update,
// moments not sent after it, moments of a fresh state left as they were.
#include <doctest/doctest.h>

#include <algorithm>

#include "comm/group.h"
#include "model/gpt2.h"
#include "test/mpi/world.h"
#include "trainer/trainer.h"

namespace {
// The world; counts the bytes of its broadcasts.
class CountedComm final : public Comm {
  public:
    size_t n_broadcast = 0;

    const char* name() const override { return world().name(); }
    int rank() const override { return world().rank(); }
    int size() const override { return world().size(); }
    int local_rank() const override { return world().local_rank(); }
    int local_size() const override { return world().local_size(); }
    void all_reduce_sum(std::span<float> data) override { world().all_reduce_sum(data); }
    void reduce_scatter_sum(float* send, float* recv, size_t n) override { world().reduce_scatter_sum(send, recv, n); }
    void all_gather(const void* send, void* recv, size_t n) override { world().all_gather(send, recv, n); }
    void all_to_all(const void* send, void* recv, size_t n) override { world().all_to_all(send, recv, n); }
    void broadcast(void* data, size_t n_bytes, int root) override {
        n_broadcast += n_bytes;
        world().broadcast(data, n_bytes, root);
    }
    void send(const void* data, size_t n, int to, int tag) override { world().send(data, n, to, tag); }
    void recv(void* data, size_t n, int from, int tag) override { world().recv(data, n, from, tag); }
    void send_recv(const void* send, size_t n_send, int to, void* recv, size_t n_recv, int from) override {
        world().send_recv(send, n_send, to, recv, n_recv, from);
    }
    void barrier() override { world().barrier(); }
    std::unique_ptr<Comm> split(int color, int key) override { return world().split(color, key); }
    void abort(Exit code) override { world().abort(code); }
};

TrainerOptions options() {
    TrainerOptions o;
    o.model = {.architecture = &gpt2, .L = 1, .NH = 2, .C = 64, .T = 5, .V = 128};
    o.train.global_batch_size = world().size();
    o.train.micro_batch_size = 1;
    o.allreduce = AllReduce::mpi;
    return o;
}
size_t n_bytes(const std::vector<StateTensor>& tensors) {
    size_t n = 0;
    for (const StateTensor& t : tensors) n += t.data.n_bytes();
    return n;
}
}  // namespace

TEST_CASE("broadcast: moments travel once they are more than zeros") {
    CountedComm comm;
    const Backend& k = cpu_backend();
    const Group group(k, comm);
    Trainer trainer(group, options());
    if (world().rank() == 0) trainer.initialize();
    const size_t of_parameters = n_bytes(trainer.parameters()), of_moments = n_bytes(trainer.moments());
    REQUIRE(of_moments == 2 * of_parameters);
    for (const StateTensor& m : trainer.moments()) std::fill_n(m.data.as<float>(), m.data.count, 1.0f);

    // Beside tensors: padding between them, and a few numbers.
    const size_t slack = of_parameters / 2;
    trainer.distribute_state();
    for (const StateTensor& m : trainer.moments())
        for (size_t i = 0; i < m.data.count; i++) REQUIRE(m.data.as<float>()[i] == 0);
    if (world().size() == 1) return;  // no messages
    CHECK(comm.n_broadcast >= of_parameters);
    CHECK(comm.n_broadcast < of_parameters + slack);

    const std::vector<int32_t> tokens = {1, 2, 3, 4, 5};
    REQUIRE(trainer.step(0, 1e-3, [&]() -> Trainer::Tokens { return {tokens, tokens}; }).updated);
    comm.n_broadcast = 0;
    trainer.distribute_state();
    CHECK(comm.n_broadcast >= of_parameters + of_moments);
}
