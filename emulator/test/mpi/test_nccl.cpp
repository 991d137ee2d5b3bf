// The reduction by NCCL, on the emulated NCCL: the calls that it makes, and the errors on ranks when one fails.
// Seen to fail, or to hang, with: no abort after a failure; no deadline in a call, or in the wait; no look at the
// asynchronous error in the wait; a group left open; ncclCommDestroy while an exception flies.
#include <cuda_emulator_host.h>
#include <doctest/doctest.h>
#include <nccl_emulator.h>

#include <chrono>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <set>

#include "model/gpt2.h"
#include "test/mpi/device_gradient.h"
#include "test/shown_gradient.h"
#include "trainer/trainer.h"

namespace {
constexpr double kTimeout = 60;  // of communicators that are not expected to fail

// Sets a variable of the environment for a while.
class Setting {
  public:
    Setting(const char* name, const std::string& value) : name_(name) {
        if (const char* before = std::getenv(name)) before_ = before;
        setenv(name, value.c_str(), 1);
    }
    ~Setting() { before_ ? setenv(name_, before_->c_str(), 1) : unsetenv(name_); }

  private:
    const char* name_;
    std::optional<std::string> before_;
};

// Late streams: in the other modes a call of the emulated runtime may last until the device is done, and no deadline
// could end it.
class LateStreams {
  public:
    LateStreams() : before_(emulator::machine().mode) { emulator::machine().mode = emulator::StreamMode::late; }
    ~LateStreams() { emulator::machine().mode = before_; }

  private:
    emulator::StreamMode before_;
};

// Runs f, which must throw, and returns the error; fails the test when f took longer than `limit` seconds.
template <class F>
Error thrown_within(double limit, F&& f) {
    const auto start = std::chrono::steady_clock::now();
    Error thrown(Exit::complete, "nothing was thrown");
    try {
        f();
    } catch (const Error& e) { thrown = e; }
    CHECK(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < limit);
    return thrown;
}
bool says(const Error& e, const std::string& text) { return std::string(e.what()).find(text) != std::string::npos; }

using Calls = std::vector<emulator::NcclCall>;
Calls calls_of(const std::function<void()>& f) {
    emulator::nccl_calls().clear();
    f();
    return emulator::nccl_calls();
}
}  // namespace

// With one or two ranks every order gives the same bits.
TEST_CASE("nccl: a sum repeats its bits, which it would not in the switch") {
    const auto n_results = [&] {
        const Group group = nccl_group(kTimeout);
        const auto reduction = make_gradient_all_reduce(group, AllReduce::nccl, 4001);
        std::set<std::vector<float>> seen;
        for (int call = 0; call < 12; call++) seen.insert(summed(group, *reduction, 4001));
        return seen.size();
    };
    unsetenv("NCCL_ALGO");
    CHECK(n_results() == 1);
#if NCCL_STAND_IN_VERSION >= 23100
    CHECK(nccl_algorithms() == "all-reduce RING,TREE, reduce-scatter RING");
#else
    CHECK(nccl_algorithms() == "^NVLS,NVLSTree");
#endif
    const Setting user("NCCL_ALGO", "NVLS");
    if (world().size() > 2) CHECK(n_results() > 1);  // 12 equal of size() orders: less than once in 10^5 runs
    CHECK(nccl_algorithms() == "NVLS");
}

TEST_CASE("nccl: exactly one call for a gradient") {
    const Group group = nccl_group(kTimeout);
    const auto reduction = make_gradient_all_reduce(group, AllReduce::nccl, 1001);
    const Calls want = {{"ncclAllReduce", 1001, "float32"}};
    for (int step = 0; step < 2; step++)
        CHECK(calls_of([&] { summed(group, *reduction, 1001); }) == (world().size() == 1 ? Calls{} : want));
}

TEST_CASE("nccl: a training step of two micro-batches makes one fused reduction of the whole gradient") {
    const Group group = nccl_group(kTimeout);
    TrainerOptions o;
    o.model = {.architecture = &gpt2, .L = 1, .NH = 2, .C = 16, .T = 4, .V = 11, .bias = true, .dropout = 0.1f};
    o.train.micro_batch_size = 1;
    o.train.global_batch_size = 2 * world().size();
    o.train.grad_clip = 0, o.optimizer.weight_decay = 0;
    o.allreduce = AllReduce::nccl;
    o.real = DType::bf16;
    std::optional<Trainer> made;
    size_t n = 0;  // elements of the flat gradient
    const auto count = [&](std::span<double> g) { n = g.size(); };
    const Calls connecting = calls_of([&] { made.emplace(group, o, show_gradient(count)); });
    Trainer& trainer = *made;
    trainer.initialize();
    trainer.distribute_state();
    const std::vector<int32_t> tokens = {1, 2, 3, 4, 5};
    const auto next = [&]() -> Trainer::Tokens { return {std::span(tokens).first(4), std::span(tokens).last(4)}; };
    for (int step = 0; step < 2; step++) {
        const Calls calls = calls_of([&] { trainer.step(step, 1e-2, next); });
        if (world().size() == 1) CHECK(calls.empty());
        if (world().size() > 1) CHECK(calls == Calls{{"ncclAllReduce", n, "float32"}});
    }
    CHECK(n >= count_params(o.model));
    // NCCL allocates memory at its first call: the trainer makes one before the first step.
    CHECK(connecting == (world().size() == 1 ? Calls{} : Calls{{"ncclAllReduce", n, "float32"}}));
}

TEST_CASE("ordered, moved by nccl: which calls, and how long") {
    if (!power_of_two_ranks() || world().size() == 1) return;
    const Group group = nccl_group(kTimeout);
    const size_t size = size_t(world().size()), n = size * 24 + 5;  // two pieces of shards of 16 and 8, and a tail
    const auto reduction = make_gradient_all_reduce(group, AllReduce::ordered, n, Payload::fp32, 16);
    Calls want;
    for (const size_t shard : {16, 8}) {
        for (size_t r = 0; r < size; r++) {
            want.push_back({"ncclSend", shard, "float32"});
            want.push_back({"ncclRecv", shard, "float32"});
        }
        want.push_back({"ncclAllGather", shard, "float32"});
    }
    const size_t tail = n % (4 * size);
    if (tail) want.push_back({"ncclAllGather", tail, "float32"});
    CHECK(calls_of([&] { summed(group, *reduction, n); }) == want);
}

TEST_CASE("a clean end destroys the communicator, an exception aborts it") {
    gpu();  // opens the GPU
    const Calls clean = calls_of([] { NcclComm nccl(world(), kTimeout); });
    CHECK(clean.back().name == "ncclCommDestroy");
    const Calls unwound = calls_of([] {
        try {
            NcclComm nccl(world(), kTimeout);
            fail(Exit::data, "elsewhere");
        } catch (const Error&) {}
    });
    CHECK(unwound.back().name == "ncclCommAbort");
}

TEST_CASE("a network error ends the wait on every rank, and names the call") {
    const Backend& k = *gpu();
    const Setting fault("KILN_EMULATOR_NCCL_FAIL", "2");
    NcclComm nccl(world(), kTimeout);
    StreamOwner stream(k);
    Gradient grad(k, my_addends(100));
    grad.upload(stream.get());
    const Error e = thrown_within(kTimeout / 2, [&] {
        nccl.all_reduce_sum(grad.buf(), stream.get());
        nccl.wait(stream.get());
    });
    CHECK(e.code == Exit::peer_lost);
    CHECK(says(e, fmt::format("in ncclAllReduce of 100 floats over {} ranks", world().size())));
    CHECK(says(e, "remote process exited"));
    const Error again = thrown_within(1, [&] { nccl.all_reduce_sum(grad.buf(), stream.get()); });
    CHECK(again.code == Exit::internal);
    CHECK(says(again, "after a failure"));
    k.synchronize(stream.get());
}

// The rank with the fault hangs in the call itself, the others in the wait: their stream never gets past the call.
TEST_CASE("a rank that hangs is a lost rank after the deadline") {
    const LateStreams late;
    const Backend& k = *gpu();
    NcclComm nccl(world(), 0.5);
    const Setting fault("KILN_EMULATOR_NCCL_HANG", world().rank() == 0 ? "2" : "0");
    StreamOwner stream(k);
    Gradient grad(k, my_addends(100));
    grad.upload(stream.get());
    const Error e = thrown_within(kTimeout / 2, [&] {
        nccl.all_reduce_sum(grad.buf(), stream.get());
        nccl.wait(stream.get());
    });
    CHECK(e.code == Exit::peer_lost);
    CHECK(says(e, "within 0.5 s"));
    CHECK(says(e, "in ncclAllReduce of 100 floats"));
    k.synchronize(stream.get());  // aborted: nothing is left on the stream
}

// As in a replayed step: the graph is destroyed only when the exception unwinds past its owner.
TEST_CASE("a rank that is lost while a graph holds calls is no hang") {
    const LateStreams late;
    const Backend& k = *gpu();
    const bool lost = world().rank() == 0;
    StreamOwner stream(k);
    Gradient grad(k, my_addends(100));
    grad.upload(stream.get());
    const auto give_up = [&](NcclComm& nccl) {
        const GraphOwner graph(k, stream.get(), [&] { nccl.all_reduce_sum(grad.buf(), stream.get()); });
        graph.launch(stream.get());
        nccl.wait(stream.get());  // all ranks are here
        if (lost) return;
        graph.launch(stream.get());
        const Error e = thrown_within(kTimeout / 2, [&] { nccl.wait(stream.get()); });
        CHECK(e.code == Exit::peer_lost);
        CHECK(says(e, "in ncclAllReduce of 100 floats"));
        k.synchronize(stream.get());
    };
    auto nccl = std::make_unique<NcclComm>(world(), 0.5);
    give_up(*nccl);
    nccl.reset();  // waits for the end of the abort, which the graph held up
    CHECK(emulator::nccl_calls().back().name == (lost ? "ncclCommDestroy" : "ncclCommAbort"));
}

TEST_CASE("a communicator that does not come about is an error after the deadline") {
    gpu();  // opens the GPU
    const Setting fault("KILN_EMULATOR_NCCL_HANG", world().rank() == world().size() - 1 ? "1" : "0");
    const Error e = thrown_within(kTimeout / 2, [&] { NcclComm(world(), 0.5); });
    CHECK(e.code == Exit::peer_lost);
    CHECK(says(e, "ncclCommInitRankConfig"));
    CHECK(emulator::nccl_calls().back().name == "ncclCommAbort");
}

TEST_CASE("ranks that call different things are told what") {
    if (world().size() == 1) return;
    const LateStreams late;
    const Backend& k = *gpu();
    StreamOwner stream(k);
    Gradient grad(k, my_addends(100));
    grad.upload(stream.get());
    const size_t size = size_t(world().size());
    const auto told = [&](const std::string& text, const std::function<void(NcclComm&)>& f) {
        NcclComm nccl(world(), kTimeout);
        const Error e = thrown_within(kTimeout / 2, [&] {
            f(nccl);
            nccl.wait(stream.get());
        });
        CAPTURE(std::string(e.what()));
        CHECK(e.code == Exit::internal);
        CHECK(says(e, text));
    };
    const bool odd = world().rank() == 1;
    told(
        "rank 0 calls ncclAllReduce as call 2 with count 100 of float32, rank 1 calls ncclAllReduce as call 2 with "
        "count 99 of float32",
        [&](NcclComm& c) { c.all_reduce_sum(grad.buf().slice(0, odd ? 99 : 100), stream.get()); });
    told("rank 1 calls ncclAllGather", [&](NcclComm& c) {
        if (odd) return c.all_gather(grad.buf().slice(0, 3), grad.buf().slice(10, 3 * size), stream.get());
        c.all_reduce_sum(grad.buf().slice(0, 3), stream.get());
    });
    told("sends 1 elements to rank 1, which expects 2 elements", [&](NcclComm& c) {
        const size_t n = odd ? 2 : 1;
        c.all_to_all(grad.buf().slice(0, n * size), grad.buf().slice(50, n * size), stream.get());
    });
    told("rank 1 calls ncclReduceScatter as call 2 with count 3 of float32", [&](NcclComm& c) {
        if (odd) return c.reduce_scatter_sum(grad.buf().slice(0, 3 * size), grad.buf().slice(50, 3), stream.get());
        c.all_reduce_sum(grad.buf().slice(0, 3), stream.get());
    });
    told("rank 1 calls ncclBroadcast as call 2 with count 3 from root 1 of float32",
         [&](NcclComm& c) { c.broadcast(grad.buf().slice(0, 3), odd ? 1 : 0, stream.get()); });
    told("buffers overlap", [&](NcclComm& c) {  // the sum does not belong into another rank's block
        const size_t other = (size_t(world().rank()) + 1) % size;
        c.reduce_scatter_sum(grad.buf().slice(0, 3 * size), grad.buf().slice(3 * other, 3), stream.get());
    });
    if (world().rank() < 2)  // the others have no part in it
        told("which expects nothing", [&](NcclComm& c) { c.send(grad.buf(), 1 - world().rank(), stream.get()); });
    else
        NcclComm(world(), kTimeout);
}

TEST_CASE("a message that is not received is a lost rank after the deadline") {
    if (world().size() == 1) return;
    const LateStreams late;
    const Backend& k = *gpu();
    NcclComm nccl(world(), 0.5);
    StreamOwner stream(k);
    Gradient grad(k, my_addends(100));
    grad.upload(stream.get());
    if (world().rank() > 0) return world().barrier();
    const Error e = thrown_within(kTimeout / 2, [&] {
        nccl.send(grad.buf(), 1, stream.get());
        nccl.wait(stream.get());
    });
    world().barrier();
    CHECK(e.code == Exit::peer_lost);
    CHECK(says(e, "in ncclSend of 100 floats"));
}

TEST_CASE("each word is one call of NCCL's, and a part of the ranks has a communicator of its own") {
    gpu();  // opens it
    const int rank = world().rank(), size = world().size();
    const Group group = nccl_group(kTimeout);
    StreamOwner stream(*gpu());
    const Stream s = stream.get();
    Gradient grad(*gpu(), my_addends(size_t(size) * 4));
    grad.upload(s);
    const Buf all = grad.buf(), mine = all.slice(size_t(rank) * 4, 4);
    const auto calls = [&](const std::function<void(DeviceComm&)>& f) {
        const Calls made = calls_of([&] { f(group.device()); });
        group.device().wait(s);
        return made;
    };
    CHECK(calls([&](DeviceComm& d) { d.all_reduce_sum(mine, s); }) == Calls{{"ncclAllReduce", 4, "float32"}});
    CHECK(calls([&](DeviceComm& d) { d.reduce_scatter_sum(all, mine, s); }) ==
          Calls{{"ncclReduceScatter", 4, "float32"}});
    CHECK(calls([&](DeviceComm& d) { d.all_gather(mine, all, s); }) == Calls{{"ncclAllGather", 4, "float32"}});
    CHECK(calls([&](DeviceComm& d) { d.broadcast(all, 0, s); }) == Calls{{"ncclBroadcast", all.count, "float32"}});
    if (rank < 2 && size > 1) {
        const char* const name = rank == 0 ? "ncclSend" : "ncclRecv";
        CHECK(calls([&](DeviceComm& d) { rank == 0 ? d.send(mine, 1, s) : d.recv(mine, 0, s); }) ==
              Calls{{name, 4, "float32"}});
    }
    const Calls made = calls_of([&] {
        const Group part = group.split(rank % 2, rank);
        part.device().all_reduce_sum(mine, s);
        part.device().wait(s);
    });
    const bool alone = (size + 1 - rank % 2) / 2 == 1;
    CHECK(made.size() == (alone ? 0 : 4));  // the communicator, the sum, its end
    if (!alone) CHECK(made.front().name == "ncclCommInitRankConfig");
    if (!alone) CHECK(made[1] == Calls::value_type{"ncclAllReduce", 4, "float32"});
}

TEST_CASE("a shared device is refused by nccl, and the sum goes through host memory") {
    if (world().size() == 1) return;
    const Backend& k = *gpu();
    cudaSetDevice(0);
    const Error e = thrown_within(kTimeout / 2, [&] { NcclComm(world(), kTimeout); });
    CHECK(e.code == Exit::internal);
    CHECK(says(e, "Duplicate GPU"));
    const Group group(k, world());
    const auto reduction = make_gradient_all_reduce(group, AllReduce::mpi, 1000);
    CHECK(std::string(reduction->name()) == "mpi through host memory");
    CHECK(summed(group, *reduction, 1000) == host_sum(1000, AllReduce::mpi));
    cudaSetDevice(world().local_rank());
}
