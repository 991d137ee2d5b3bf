// DeviceComm over NCCL.  The only file that sees nccl.h.
//
// The communicator is non-blocking: a call may return ncclInProgress, and is then polled until it has ended.  Every
// call and every wait has a deadline.  A communicator that fails is aborted before the exception is thrown: a kernel
// that waits for a lost rank would else hold up the release of the device's memory.  An abort stops the kernels at
// once, but returns only when no graph holds calls of the communicator, even a non-blocking one: commDestroySync in
// NCCL's init.cc.  Such a graph is destroyed when the exception unwinds, so the abort has a thread of its own.
#include "comm/nccl.h"

#include <cuda_runtime.h>
#include <nccl.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <future>
#include <thread>
#include <utility>

namespace {
using Clock = std::chrono::steady_clock;
constexpr std::chrono::seconds kAbortWait{1};    // for an abort that no graph holds up
constexpr std::chrono::seconds kAbortLimit{10};  // for an abort whose graphs are destroyed; then nothing waits on

// A switch with NVLink SHARP (NVLS) adds in an order that differs from call to call (NCCL issue 1497).  Where kiln was
// compiled with NCCL 2.31 or later, each sum names its algorithms, and all-gathers keep NVLS.  With an older one
// NCCL_ALGO says it for all calls.  An NCCL_ALGO of the user's holds in both cases.
#ifdef NCCL_COLLCONFIG_INITIALIZER
constexpr const char *kAllReduce = "RING,TREE", *kReduceScatter = "RING";
#else
constexpr const char* kNotInTheSwitch = "^NVLS,NVLSTree";
#endif

// Variables that NCCL reads when it makes the first communicator.  A value that the environment has stays.  A value in
// a file nccl.conf counts where kiln sets none: NCCL puts it into the environment then.
void set_environment(const Comm& comm) {
#ifndef NCCL_COLLCONFIG_INITIALIZER
    setenv("NCCL_ALGO", kNotInTheSwitch, 0);
#endif
    // In a graph NCCL registers the whole allocation of a buffer with the network, here all of kiln's memory; some
    // networks hang then (NCCL issue 2389).
    if (comm.size() > comm.local_size()) setenv("NCCL_GRAPH_REGISTER", "0", 0);
}

#ifdef NCCL_COLLCONFIG_INITIALIZER
// `names` must outlive the calls: NCCL keeps the pointer.  With forceAlgSelection a name that NCCL does not know is an
// error; without it NCCL would choose another algorithm.
ncclCollConfig_t by_algorithms(const char* names) {
    ncclCollConfig_t config = NCCL_COLLCONFIG_INITIALIZER;
    config.algSelection = names;
    config.forceAlgSelection = 1;
    return config;
}
#endif

// Waits between two polls: at first by yielding, after 1 ms by short sleeps, so that a long step costs no core.
class Patience {
  public:
    explicit Patience(double seconds) : seconds_(seconds) {}
    bool over() const { return waited() > seconds_; }
    void rest() const {
        if (waited() < 1e-3) return std::this_thread::yield();
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    }

  private:
    double waited() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }
    double seconds_;
    Clock::time_point start_ = Clock::now();
};

// NCCL's text of an error without its advice in parentheses: messages here end with such advice of their own.
std::string text_of(ncclResult_t result) {
    const std::string text = ncclGetErrorString(result);
    return text.substr(0, text.find(" ("));
}

ncclDataType_t type_of(Buf b) {
    switch (b.dtype) {
        case DType::f32:
            return ncclFloat32;
        case DType::f64:
            return ncclFloat64;
        case DType::bf16:
            return ncclBfloat16;
        case DType::i32:
            return ncclInt32;
        case DType::u32:
            return ncclUint32;
        case DType::u8:
            return ncclUint8;
    }
    fail(Exit::internal, "NCCL has no type for {}", dtype_name(b.dtype));
}

ncclUniqueId agree_on_id(Comm& comm) {
    int version = 0;
    ncclGetVersion(&version);
    require_same(comm, uint64_t(version), Exit::usage,
                 "another version of NCCL than rank 0; install the same everywhere");
    ncclUniqueId id{};
    const ncclResult_t made = comm.rank() == 0 ? ncclGetUniqueId(&id) : ncclSuccess;
    if (made != ncclSuccess)
        fail(Exit::internal, "NCCL: {} in ncclGetUniqueId; NCCL_DEBUG=WARN tells more", text_of(made));
    comm.broadcast(&id, sizeof id, 0);
    return id;
}
}  // namespace

struct NcclComm::State {
    ncclComm_t nccl = nullptr;  // null before it is made and after it was given up
    int size;
    double timeout_s;
    std::shared_ptr<TrafficCounter> counter;
    std::string call;  // the last one, for messages: "ncclAllReduce of 1000 floats over 4 ranks"
    int n_exceptions = std::uncaught_exceptions();
    std::future<void> aborted;  // valid after a failure

    void begin(const char* name, size_t n, DType type) {
        if (!nccl) fail(Exit::internal, "NCCL: {} after a failure in {}", name, call);
        call =
            fmt::format("{} of {} {} over {} ranks", name, n, type == DType::f32 ? "floats" : dtype_name(type), size);
    }

    void abort() {
        std::packaged_task<void()> task([c = std::exchange(nccl, nullptr)] { ncclCommAbort(c); });
        aborted = task.get_future();
        std::thread(std::move(task)).detach();
        aborted.wait_for(kAbortWait);
    }
    // Aborts the communicator, then throws.
    [[noreturn]] void give_up(Exit code, const std::string& what) {
        std::string detail = nccl ? ncclGetLastError(nccl) : "";
        if (!detail.empty()) detail = fmt::format(" ({})", detail);
        if (nccl) abort();
        fail(code, "NCCL: {}{} in {}; NCCL_DEBUG=WARN tells more", what, detail, call);
    }
    void check(ncclResult_t result) {
        if (result == ncclSuccess || result == ncclInProgress) return;
        give_up(result == ncclRemoteError ? Exit::peer_lost : Exit::internal, text_of(result));
    }
    [[noreturn]] void give_up_waiting() {
        give_up(Exit::peer_lost,
                fmt::format("nothing came of it within {} s: another rank is gone or hangs,", timeout_s));
    }
    bool in_progress() {
        ncclResult_t state = ncclSuccess;
        check(ncclCommGetAsyncError(nccl, &state));
        check(state);
        return state == ncclInProgress;
    }
    // Waits until the call that returned `result` has ended.
    void finish(ncclResult_t result) {
        check(result);
        const Patience patience(timeout_s);
        while (in_progress()) {
            if (patience.over()) give_up_waiting();
            patience.rest();
        }
    }
    // calls(add) makes the calls of a group and hands the result of each to add.
    template <class F>
    void finish_group(F&& calls) {
        ncclResult_t result = ncclGroupStart();
        calls([&](ncclResult_t r) {
            if (r != ncclSuccess && r != ncclInProgress && result == ncclSuccess) result = r;
        });
        const ncclResult_t ended = ncclGroupEnd();  // always: an open group would swallow the calls that follow
        finish(result == ncclSuccess ? ended : result);
    }
};

NcclComm::NcclComm(Comm& comm, double timeout_s)
    : DeviceComm(comm.rank(), comm.size()),
      state_(new State{.size = comm.size(), .timeout_s = timeout_s, .counter = comm.counter()}) {
    set_environment(comm);
    const ncclUniqueId id = agree_on_id(comm);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    state_->call = fmt::format("ncclCommInitRankConfig of {} ranks", comm.size());
    state_->finish(ncclCommInitRankConfig(&state_->nccl, comm.size(), id, comm.rank(), &config));
}

// While an exception unwinds, other ranks may be in the middle of a call: the communicator is aborted, as a clean end
// would wait for those ranks.
NcclComm::~NcclComm() {
    if (state_->aborted.valid()) state_->aborted.wait_for(kAbortLimit);  // its graphs have gone
    if (!state_->nccl) return;
    const bool unwinding = std::uncaught_exceptions() > state_->n_exceptions;
    try {
        if (unwinding) state_->give_up(Exit::internal, "an exception");
        state_->call = "ncclCommFinalize";
        state_->finish(ncclCommFinalize(state_->nccl));
        ncclCommDestroy(state_->nccl);
    } catch (const Error&) {
        // given up: nothing is left to release
    }
}

std::unique_ptr<DeviceComm> NcclComm::split(Comm& part) const {
    if (part.size() == 1) return make_device_comm(cuda_backend(), part);
    return std::make_unique<NcclComm>(part, state_->timeout_s);
}

void NcclComm::do_all_reduce_sum(Buf data, Stream s) {
    state_->begin("ncclAllReduce", data.count, data.dtype);
    state_->counter->add(Traffic::all_reduce(data.n_bytes(), size()));
#ifdef NCCL_COLLCONFIG_INITIALIZER
    ncclCollConfig_t config = by_algorithms(kAllReduce);
    if (!std::getenv("NCCL_ALGO"))
        return state_->finish(
            ncclAllReduceConfig(data.data, data.data, data.count, type_of(data), ncclSum, state_->nccl, s, &config));
#endif
    state_->finish(ncclAllReduce(data.data, data.data, data.count, type_of(data), ncclSum, state_->nccl, s));
}

void NcclComm::do_reduce_scatter_sum(Buf send, Buf recv, Stream s) {
    state_->begin("ncclReduceScatter", recv.count, recv.dtype);
    state_->counter->add(Traffic::blocks(recv.n_bytes(), size()));
#ifdef NCCL_COLLCONFIG_INITIALIZER
    ncclCollConfig_t config = by_algorithms(kReduceScatter);
    if (!std::getenv("NCCL_ALGO"))
        return state_->finish(ncclReduceScatterConfig(send.data, recv.data, recv.count, type_of(recv), ncclSum,
                                                      state_->nccl, s, &config));
#endif
    state_->finish(ncclReduceScatter(send.data, recv.data, recv.count, type_of(recv), ncclSum, state_->nccl, s));
}

void NcclComm::do_all_gather(Buf send, Buf recv, Stream s) {
    state_->begin("ncclAllGather", send.count, send.dtype);
    state_->counter->add(Traffic::blocks(send.n_bytes(), size()));
    state_->finish(ncclAllGather(send.data, recv.data, send.count, type_of(send), state_->nccl, s));
}

void NcclComm::do_all_to_all(Buf send, Buf recv, Stream s) {
    const size_t n = send.count / size_t(size());
    state_->begin("ncclSend and ncclRecv", n, send.dtype);
    state_->counter->add(Traffic::blocks(n * dtype_bytes(send.dtype), size()));
    state_->finish_group([&](auto&& add) {
        for (int r = 0; r < size(); r++) {
            add(ncclSend(send.slice(size_t(r) * n, n).data, n, type_of(send), r, state_->nccl, s));
            add(ncclRecv(recv.slice(size_t(r) * n, n).data, n, type_of(recv), r, state_->nccl, s));
        }
    });
}

void NcclComm::do_broadcast(Buf data, int root, Stream s) {
    state_->begin("ncclBroadcast", data.count, data.dtype);
    state_->counter->add(Traffic::broadcast(data.n_bytes(), size(), rank() == root));
    state_->finish(ncclBroadcast(data.data, data.data, data.count, type_of(data), root, state_->nccl, s));
}

void NcclComm::do_send_recv(Buf send, int to, Buf recv, int from, Stream s) {
    const char* const name = !recv ? "ncclSend" : !send ? "ncclRecv" : "ncclSend and ncclRecv";
    state_->begin(name, send ? send.count : recv.count, send ? send.dtype : recv.dtype);
    if (to != rank() && from != rank()) state_->counter->add({.sent = send.n_bytes(), .received = recv.n_bytes()});
    state_->finish_group([&](auto&& add) {
        if (send) add(ncclSend(send.data, send.count, type_of(send), to, state_->nccl, s));
        if (recv) add(ncclRecv(recv.data, recv.count, type_of(recv), from, state_->nccl, s));
    });
}

void NcclComm::wait(Stream s) {
    if (!state_->nccl) fail(Exit::internal, "NCCL: a wait after a failure in {}", state_->call);
    const Patience patience(state_->timeout_s);
    for (;;) {
        const cudaError_t done = cudaStreamQuery(s);
        if (done == cudaSuccess) return;
        if (done != cudaErrorNotReady) cuda_backend().synchronize(s);  // throws, and names the kernel
        cudaGetLastError();     // "not ready" would otherwise be taken for the error of the next launch
        state_->in_progress();  // throws when the communicator has failed
        if (patience.over()) state_->give_up_waiting();
        patience.rest();
    }
}

std::string nccl_algorithms() {
    if (const char* set = std::getenv("NCCL_ALGO")) return set;
#ifdef NCCL_COLLCONFIG_INITIALIZER
    return fmt::format("all-reduce {}, reduce-scatter {}", kAllReduce, kReduceScatter);
#else
    return "";
#endif
}

bool every_rank_has_its_own_device(const std::vector<std::string>& device_of_rank) {
    std::vector<std::string> sorted = device_of_rank;
    std::ranges::sort(sorted);
    return std::ranges::adjacent_find(sorted) == sorted.end();
}

bool every_rank_has_its_own_device(Comm& comm, const std::string& mine) {
    constexpr size_t kLongest = 512;
    CHECK_THAT(mine.size() < kLongest, "a device name of {} bytes", mine.size());
    std::vector<char> send(kLongest), recv(kLongest * size_t(comm.size()));
    std::ranges::copy(mine, send.begin());
    comm.all_gather(send.data(), recv.data(), kLongest);
    std::vector<std::string> all;  // (ranks)
    for (int r = 0; r < comm.size(); r++) all.emplace_back(&recv[size_t(r) * kLongest]);
    return every_rank_has_its_own_device(all);
}
