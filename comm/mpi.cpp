// Comm over MPI.  The only file that sees mpi.h.
#include <mpi.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <string>
#include <utility>

#include "comm/comm.h"

namespace {
// MPI's own text of an error, as Error(Exit::peer_lost): after a failed collective the job cannot go on.
void check(int rc, const char* call) {
    if (rc == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    MPI_Error_string(rc, text, &length);
    fail(Exit::peer_lost, "MPI: {} in {}", std::string(text, size_t(length)), call);
}
#define MPI_CHECK(call) check((call), #call)

// MPI's counts are int: longer messages go in pieces of at most this many units.
constexpr size_t kPiece = size_t(1) << 30;

struct MpiSending final : Comm::Sending {
    explicit MpiSending(std::vector<std::byte> m) : message(std::move(m)) {}
    ~MpiSending() override {
        if (request == MPI_REQUEST_NULL) return;
        MPI_Request_free(&request);
        new std::vector<std::byte>(std::move(message));  // MPI may still read the bytes: they stay
    }
    bool done() override {
        int flag = 0;
        MPI_CHECK(MPI_Test(&request, &flag, MPI_STATUS_IGNORE));
        return flag;
    }
    std::vector<std::byte> message;
    MPI_Request request = MPI_REQUEST_NULL;
};

class MpiComm final : public Comm {
  public:
    MpiComm(MPI_Comm comm, bool owned) : comm_(comm), owned_(owned) {
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
        for (size_t i = 0; i < data.size(); i += kPiece) {
            const int n = int(std::min(kPiece, data.size() - i));
            MPI_CHECK(MPI_Allreduce(MPI_IN_PLACE, data.data() + i, n, MPI_FLOAT, MPI_SUM, comm_));
        }
    }
    void reduce_scatter_sum(float* send, float* recv, size_t n) override {
        as_count(size_t(size_) * n * sizeof(float));  // MPICH counts all blocks together
        if (recv != send + size_t(rank_) * n) {
            MPI_CHECK(MPI_Reduce_scatter_block(send, recv, int(n), MPI_FLOAT, MPI_SUM, comm_));
            return;
        }
        MPI_CHECK(MPI_Reduce_scatter_block(MPI_IN_PLACE, send, int(n), MPI_FLOAT, MPI_SUM, comm_));
        if (rank_ > 0) std::copy_n(send, n, recv);  // MPI's result is in block 0
    }
    void all_gather(const void* send, void* recv, size_t n_bytes) override {
        const int n = as_count(n_bytes);
        const bool in_place = send == static_cast<char*>(recv) + size_t(rank_) * n_bytes;
        MPI_CHECK(MPI_Allgather(in_place ? MPI_IN_PLACE : send, n, MPI_BYTE, recv, n, MPI_BYTE, comm_));
    }
    void all_to_all(const void* send, void* recv, size_t n_bytes) override {
        const int n = as_count(n_bytes);
        MPI_CHECK(MPI_Alltoall(send, n, MPI_BYTE, recv, n, MPI_BYTE, comm_));
    }
    void broadcast(void* data, size_t n_bytes, int root) override {
        for (size_t i = 0; i < n_bytes; i += kPiece)
            MPI_CHECK(
                MPI_Bcast(static_cast<char*>(data) + i, int(std::min(kPiece, n_bytes - i)), MPI_BYTE, root, comm_));
    }
    void send(const void* data, size_t n_bytes, int to, int tag) override {
        MPI_CHECK(MPI_Send(data, as_count(n_bytes), MPI_BYTE, to, checked(tag), comm_));
    }
    void recv(void* data, size_t n_bytes, int from, int tag) override {
        MPI_CHECK(MPI_Recv(data, as_count(n_bytes), MPI_BYTE, from, checked(tag), comm_, MPI_STATUS_IGNORE));
    }
    std::optional<Message> probe(int tag) override {
        int there = 0, n_bytes = 0;
        MPI_Status status;
        MPI_CHECK(MPI_Iprobe(MPI_ANY_SOURCE, checked(tag), comm_, &there, &status));
        if (!there) return std::nullopt;
        MPI_CHECK(MPI_Get_count(&status, MPI_BYTE, &n_bytes));
        return Message{status.MPI_SOURCE, size_t(n_bytes)};
    }
    std::unique_ptr<Sending> isend(std::vector<std::byte> message, int to, int tag) override {
        const int n = as_count(message.size());
        auto sending = std::make_unique<MpiSending>(std::move(message));
        MPI_CHECK(MPI_Isend(sending->message.data(), n, MPI_BYTE, to, checked(tag), comm_, &sending->request));
        return sending;
    }
    void send_recv(const void* send, size_t n_send, int to, void* recv, size_t n_recv, int from) override {
        MPI_CHECK(MPI_Sendrecv(send, as_count(n_send), MPI_BYTE, to, 0, recv, as_count(n_recv), MPI_BYTE, from, 0,
                               comm_, MPI_STATUS_IGNORE));
    }
    void barrier() override { MPI_CHECK(MPI_Barrier(comm_)); }
    std::unique_ptr<Comm> split(int color, int key) override {
        MPI_Comm part;
        MPI_CHECK(MPI_Comm_split(comm_, color, key, &part));
        return std::make_unique<MpiComm>(part, true);
    }
    [[noreturn]] void abort(Exit code) override {
        MPI_Abort(MPI_COMM_WORLD, int(code));
        std::_Exit(int(code));
    }

  private:
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
}  // namespace

MpiSession::MpiSession(int* argc, char*** argv) {
    int provided = 0;
    MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &provided);
    if (provided < MPI_THREAD_MULTIPLE)
        fail(Exit::usage,
             "this MPI library offers thread level {}, not MPI_THREAD_MULTIPLE ({}), by which threads of a rank send "
             "and receive at the same time; use one that was built with it, such as Debian's MPICH",
             provided, int(MPI_THREAD_MULTIPLE));
    world_ = std::make_unique<MpiComm>(MPI_COMM_WORLD, false);
    refuse_singletons(world_->size());
}

MpiSession::~MpiSession() {
    world_.reset();
    MPI_Finalize();
}
