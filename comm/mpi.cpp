// Comm over MPI.  The only file that sees mpi.h.
#include <mpi.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "comm/comm.h"

namespace {
using Clock = std::chrono::steady_clock;

// A call on the wire, for messages.
struct Call {
    const char* name;
    size_t n_bytes = 0;  // of the call's argument: a block, where it has several
    int to = -1, from = -1;
};

// Wrong arguments are kiln's own mistake.  Of the other errors none can be mended: a connection has broken, or a rank
// has ended.
Exit exit_of(int error_class) {
    switch (error_class) {
        case MPI_ERR_NO_MEM:
            return Exit::memory;
        case MPI_ERR_ARG:
        case MPI_ERR_BUFFER:
        case MPI_ERR_COMM:
        case MPI_ERR_COUNT:
        case MPI_ERR_OP:
        case MPI_ERR_RANK:
        case MPI_ERR_REQUEST:
        case MPI_ERR_ROOT:
        case MPI_ERR_TAG:
        case MPI_ERR_TRUNCATE:
        case MPI_ERR_TYPE:
            return Exit::internal;
        default:
            return Exit::peer_lost;
    }
}

constexpr const char* kGoOn = "--resume goes on from the newest checkpoint";

// `what` failed with MPI's own text of the error.
void check(int rc, const std::string& what) {
    if (rc == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING];
    int length = 0, error_class = MPI_ERR_OTHER;
    MPI_Error_string(rc, text, &length);
    MPI_Error_class(rc, &error_class);
    const Exit code = exit_of(error_class);
    const std::string advice =
        code == Exit::peer_lost ? fmt::format("; a rank has ended or the network has failed; {}", kGoOn) : "";
    fail(code, "{}: MPI: {}{}", what, std::string(text, size_t(length)), advice);
}
#define MPI_CHECK(call) check((call), #call)

// MPI's counts are int: longer messages go in pieces of at most this many units.
constexpr size_t kPiece = size_t(1) << 30;

// Calls done() until it is true, or until the deadline: then it returns false.  At first it polls at once or after a
// yield; after a millisecond it sleeps between bursts of polls, and a long wait costs no core.  MPI moves bytes only
// while it is polled: after a burst that takes longer than the shortest one, which moved none, the sleep is short again.
template <class Seconds, class Done>
bool wait_until(const Seconds& seconds, const Done& done) {
    using namespace std::chrono_literals;
    constexpr int kBurst = 64;
    constexpr Clock::duration kLeast = 20us, kMost = 1ms;
    for (int i = 0; i < kBurst; i++)
        if (done()) return true;
    const Clock::time_point start = Clock::now();
    Clock::duration shortest = Clock::duration::max(), pause = kLeast;
    for (Clock::time_point before = start; std::chrono::duration<double>(before - start).count() < seconds();
         before = Clock::now()) {
        const bool is_long = before - start > 1ms;
        for (int i = 0; i < kBurst; i++) {
            if (done()) return true;
            if (!is_long) std::this_thread::yield();
        }
        if (!is_long) continue;
        const Clock::duration burst = Clock::now() - before;
        shortest = std::min(shortest, burst);
        pause = burst > 2 * shortest ? kLeast : std::min(pause + pause / 8, kMost);
        std::this_thread::sleep_for(pause);
    }
    return false;
}

struct MpiTransfer final : Comm::Transfer {
    explicit MpiTransfer(std::vector<std::byte> message) { bytes = std::move(message); }
    ~MpiTransfer() override {
        if (request == MPI_REQUEST_NULL) return;
        MPI_Request_free(&request);
        new std::vector<std::byte>(std::move(bytes));  // MPI may still use the bytes: they stay
    }
    bool done() override {
        int flag = 0;
        MPI_CHECK(MPI_Test(&request, &flag, MPI_STATUS_IGNORE));
        return flag;
    }
    MPI_Request request = MPI_REQUEST_NULL;
};

class MpiComm final : public Comm {
  public:
    MpiComm(MPI_Comm comm, bool owned, std::shared_ptr<TrafficCounter> counter)
        : Comm(std::move(counter)), comm_(comm), owned_(owned) {
        MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
        MPI_CHECK(MPI_Comm_rank(comm_, &rank_));
        MPI_CHECK(MPI_Comm_size(comm_, &size_));
        MPI_Comm host;
        MPI_CHECK(MPI_Comm_split_type(comm_, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &host));
        MPI_CHECK(MPI_Comm_rank(host, &local_rank_));
        MPI_CHECK(MPI_Comm_size(host, &local_size_));
        MPI_Comm_free(&host);
    }
    ~MpiComm() override {
        if (owned_) MPI_Comm_free(&comm_);
    }
    const char* name() const override { return "mpi"; }
    int rank() const override { return rank_; }
    int size() const override { return size_; }
    int local_rank() const override { return local_rank_; }
    int local_size() const override { return local_size_; }

    void all_reduce_sum(std::span<float> data) override {
        counter()->add(Traffic::all_reduce(data.size_bytes(), size_));
        for (size_t i = 0; i < data.size(); i += kPiece) {
            const int n = int(std::min(kPiece, data.size() - i));
            run({"all_reduce_sum", data.size_bytes()}, [&](MPI_Request* r) {
                return MPI_Iallreduce(MPI_IN_PLACE, data.data() + i, n, MPI_FLOAT, MPI_SUM, comm_, r);
            });
        }
    }
    void reduce_scatter_sum(float* send, float* recv, size_t n) override {
        as_count(size_t(size_) * n * sizeof(float));  // MPICH counts all blocks together
        const bool in_place = recv == send + size_t(rank_) * n;
        counter()->add(Traffic::blocks(n * sizeof(float), size_));
        run({"reduce_scatter_sum", n * sizeof(float)}, [&](MPI_Request* r) {
            return MPI_Ireduce_scatter_block(in_place ? MPI_IN_PLACE : send, in_place ? send : recv, int(n), MPI_FLOAT,
                                             MPI_SUM, comm_, r);
        });
        if (in_place && rank_ > 0) std::copy_n(send, n, recv);  // MPI's result is in block 0
    }
    void all_gather(const void* send, void* recv, size_t n_bytes) override {
        exchange({"all_gather", n_bytes}, static_cast<const char*>(send), 0, static_cast<char*>(recv), n_bytes);
    }
    void all_to_all(const void* send, void* recv, size_t n_bytes) override {
        exchange({"all_to_all", n_bytes}, static_cast<const char*>(send), n_bytes, static_cast<char*>(recv), n_bytes);
    }
    void broadcast(void* data, size_t n_bytes, int root) override {
        counter()->add(Traffic::broadcast(n_bytes, size_, rank_ == root));
        for (size_t i = 0; i < n_bytes; i += kPiece) {
            const int n = int(std::min(kPiece, n_bytes - i));
            run({"broadcast", n_bytes, -1, root},
                [&](MPI_Request* r) { return MPI_Ibcast(static_cast<char*>(data) + i, n, MPI_BYTE, root, comm_, r); });
        }
    }
    void send(const void* data, size_t n_bytes, int to, int tag) override {
        run({"send", n_bytes, to}, [&](MPI_Request* r) { return start_send(data, n_bytes, to, checked(tag), r); });
    }
    void recv(void* data, size_t n_bytes, int from, int tag) override {
        run({"recv", n_bytes, -1, from},
            [&](MPI_Request* r) { return start_recv(data, n_bytes, from, checked(tag), r); });
    }
    std::optional<Message> probe(int tag) override {
        int there = 0, n_bytes = 0;
        MPI_Status status;
        MPI_CHECK(MPI_Iprobe(MPI_ANY_SOURCE, checked(tag), comm_, &there, &status));
        if (!there) return std::nullopt;
        MPI_CHECK(MPI_Get_count(&status, MPI_BYTE, &n_bytes));
        return Message{status.MPI_SOURCE, size_t(n_bytes)};
    }
    std::unique_ptr<Transfer> isend(std::vector<std::byte> message, int to, int tag) override {
        auto sending = std::make_unique<MpiTransfer>(std::move(message));
        MPI_CHECK(start_send(sending->bytes.data(), sending->bytes.size(), to, checked(tag), &sending->request));
        return sending;
    }
    std::unique_ptr<Transfer> irecv(size_t n_bytes, int from, int tag) override {
        auto coming = std::make_unique<MpiTransfer>(std::vector<std::byte>(n_bytes));
        MPI_CHECK(start_recv(coming->bytes.data(), n_bytes, from, checked(tag), &coming->request));
        return coming;
    }
    void send_recv(const void* send, size_t n_send, int to, void* recv, size_t n_recv, int from) override {
        run(
            {"send_recv", std::max(n_send, n_recv), to, from},
            [&](MPI_Request* r) { return start_recv(recv, n_recv, from, 0, r); },
            [&](MPI_Request* r) { return start_send(send, n_send, to, 0, r); });
    }
    void barrier() override {
        run({"barrier"}, [&](MPI_Request* r) { return MPI_Ibarrier(comm_, r); });
    }
    // MPI splits without a deadline: the barrier, which has one, comes first.
    std::unique_ptr<Comm> split(int color, int key) override {
        barrier();
        MPI_Comm part;
        MPI_CHECK(MPI_Comm_split(comm_, color, key, &part));
        auto made = std::make_unique<MpiComm>(part, true, counter());
        made->set_timeout(timeout());
        return made;
    }
    [[noreturn]] void abort(Exit code) override {
        MPI_Abort(MPI_COMM_WORLD, int(code));
        std::_Exit(int(code));
    }

  private:
    // Starts requests, start(&request), and waits until all have ended.
    template <class... Start>
    void run(const Call& call, Start&&... start) {
        std::array<MPI_Request, sizeof...(start)> requests;
        size_t n_started = 0;
        (check_call(start(&requests[n_started++]), call), ...);
        finish(call, requests);
    }
    void finish(const Call& call, std::span<MPI_Request> requests) {
        const auto done = [&](MPI_Request& r) {
            int flag = 0;
            check_call(MPI_Test(&r, &flag, MPI_STATUS_IGNORE), call);
            return flag != 0;
        };
        const auto seconds = [&] { return is_patient() ? kNoDeadline : timeout(); };
        if (wait_until(seconds, [&] { return std::ranges::all_of(requests, done); })) return;
        fail(Exit::peer_lost,
             "{}: no end within {} s (run.timeout_seconds): another rank has ended, hangs or is slow; start again with "
             "a longer time if ranks are slow, else without the rank that is lost: {}",
             describe(call), timeout(), kGoOn);
    }
    // n bytes to every rank, for rank r those at send + r * stride, and n from every rank, to recv + r * n.  MPI's
    // own non-blocking collectives take longer for short messages.
    void exchange(const Call& call, const char* send, size_t stride, char* recv, size_t n) {
        std::vector<MPI_Request> requests(2 * size_t(size_ - 1));
        for (size_t i = 0; i < requests.size(); i += 2) {
            const int r = (rank_ + 1 + int(i / 2)) % size_;
            check_call(start_recv(recv + size_t(r) * n, n, r, kExchangeTag, &requests[i]), call);
            check_call(start_send(send + size_t(r) * stride, n, r, kExchangeTag, &requests[i + 1]), call);
        }
        const char* mine = send + size_t(rank_) * stride;
        if (recv + size_t(rank_) * n != mine) std::copy_n(mine, n, recv + size_t(rank_) * n);
        finish(call, requests);
    }
    void check_call(int rc, const Call& call) const {
        if (rc != MPI_SUCCESS) [[unlikely]]
            check(rc, describe(call));
    }
    std::string describe(const Call& call) const {  // "recv of 8 bytes from rank 0, on rank 1 of 2"
        std::string text = call.name;
        if (call.n_bytes) text += fmt::format(" of {} bytes", call.n_bytes);
        if (call.to >= 0) text += fmt::format(" to rank {}", call.to);
        if (call.from >= 0) text += fmt::format(" from rank {}", call.from);
        return text + fmt::format(", on rank {} of {}", rank_, size_);
    }
    int start_send(const void* data, size_t n_bytes, int to, int tag, MPI_Request* r) {
        if (to != rank_) counter()->add({.sent = n_bytes});
        return MPI_Isend(data, as_count(n_bytes), MPI_BYTE, to, tag, comm_, r);
    }
    int start_recv(void* data, size_t n_bytes, int from, int tag, MPI_Request* r) {
        if (from != rank_) counter()->add({.received = n_bytes});
        return MPI_Irecv(data, as_count(n_bytes), MPI_BYTE, from, tag, comm_, r);
    }
    static constexpr int kExchangeTag = kTags;  // the emulated NCCL has those beyond, up to MPI's last
    static int checked(int tag) {
        CHECK_THAT(tag >= 0 && tag < kTags, "a message with tag {}; tags are 0 to {}", tag, kTags - 1);
        return tag;
    }
    static int as_count(size_t n_bytes) {
        CHECK_THAT(n_bytes <= size_t(INT_MAX), "a message of {} bytes; split it below {}", n_bytes, INT_MAX);
        return int(n_bytes);
    }
    MPI_Comm comm_;
    bool owned_;
    int rank_ = 0, size_ = 1, local_rank_ = 0, local_size_ = 1;
};

// Another MPI's mpirun starts N processes that each see a world of one: they would write one run directory N times
// over.
void refuse_singletons(int world_size) {
    for (const char* variable : {"PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "MV2_COMM_WORLD_SIZE"}) {
        const char* text = std::getenv(variable);
        const int launched = text ? std::atoi(text) : 1;
        if (launched > 1 && world_size == 1)
            fail(Exit::usage,
                 "started as one of {} ranks ({}={}), but MPI reports a world of 1: this mpirun belongs to another MPI "
                 "library; use the mpirun of the MPICH that ./train is linked with (mpirun.mpich on Debian)",
                 launched, variable, text);
    }
}

// Ends the job while another thread hangs in MPI_Finalize, where MPI_Abort fails.  Hydra would lose the code of a rank
// that just leaves; by PMI-1, MPICH's protocol with it, a rank may ask it to end all ranks with a code.
[[noreturn]] void leave(int exit_code) {
    std::fflush(nullptr);
    const char* fd = std::getenv("PMI_FD");
    const std::string request = fmt::format("cmd=abort exitcode={}\n", exit_code);
    if (fd && write(std::atoi(fd), request.data(), request.size()) == ssize_t(request.size()))
        std::this_thread::sleep_for(std::chrono::seconds(2));  // Hydra ends this process
    std::_Exit(exit_code);
}
}  // namespace

MpiSession::MpiSession(int* argc, char*** argv) {
    int provided = 0;
    MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &provided);
    if (provided < MPI_THREAD_MULTIPLE)
        fail(Exit::usage,
             "this MPI library offers thread level {}, not MPI_THREAD_MULTIPLE ({}), by which threads of a rank send "
             "and receive at the same time; use one that was built with it, such as Debian's MPICH",
             provided, int(MPI_THREAD_MULTIPLE));
    world_ = std::make_unique<MpiComm>(MPI_COMM_WORLD, false, std::make_shared<TrafficCounter>());
    refuse_singletons(world_->size());
}

MpiSession::~MpiSession() {
    if (!world_) return;
    world_.reset();
    MPI_Finalize();
}

int MpiSession::end(int exit_code) {
    world_.reset();
    std::thread([exit_code] {
        std::this_thread::sleep_for(kFinalizeLimit);
        leave(exit_code);
    }).detach();
    MPI_Finalize();
    return exit_code;
}
