// Shared by the files of the emulated NCCL: messages and the communicator.  emulator/nccl.cpp says how the
// emulated NCCL behaves.
#pragma once
#include <mpi.h>
#include <nccl.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace emulator::nccl {
// Messages under way.
class Messages {
  public:
    Messages() = default;
    Messages(const Messages&) = delete;
    Messages& operator=(const Messages&) = delete;
    ~Messages() { drop(); }
    void send(const void* p, size_t n_bytes, int to, int tag) {
        PMPI_Isend(p, int(n_bytes), MPI_BYTE, to, tag, MPI_COMM_WORLD, &requests_.emplace_back());
    }
    void recv(void* p, size_t n_bytes, int from, int tag) {
        PMPI_Irecv(p, int(n_bytes), MPI_BYTE, from, tag, MPI_COMM_WORLD, &requests_.emplace_back());
    }
    bool done() {
        int all = 1;
        PMPI_Testall(int(requests_.size()), requests_.data(), &all, MPI_STATUSES_IGNORE);
        if (all) requests_.clear();
        return all;
    }
    void drop() {
        int over = 0;
        PMPI_Finalized(&over);
        if (over) return;
        for (MPI_Request& r : requests_) {
            if (r == MPI_REQUEST_NULL) continue;
            PMPI_Cancel(&r);
            PMPI_Request_free(&r);
        }
        requests_.clear();
    }

  private:
    std::vector<MPI_Request> requests_;
};

struct Member {
    int rank, n_ranks, world_rank;
    char device[128];  // host and bus id
};
}  // namespace emulator::nccl

struct ncclComm : std::enable_shared_from_this<ncclComm> {
    int rank = 0, size = 0, tag = 0, root = 0;
    std::vector<emulator::nccl::Member> members;  // (size)
    emulator::nccl::Messages setup;               // under way while the communicator is made
    bool made = false, collecting = false;        // collecting: the root, until all members have reported
    ncclResult_t state = ncclInProgress;
    std::string error;
    bool by_switch = false;  // sums may be made by NVLink SHARP
    bool hung = false, destroyed = false;
    std::atomic<bool> aborted = false;                           // perhaps by another thread
    std::shared_ptr<void> in_graphs = std::make_shared<char>();  // each captured call holds a copy
    int n_calls = 1;                                             // making the communicator is the first
    int n_collectives = 1;                                       // likewise
    int n_runs = 0;                                              // how often the stream has reached a call
    int looks = 0;                                               // left until the current call ends
    void* buffer = nullptr;  // device memory, from the first call that moves data; an aborted communicator keeps it
    std::function<void()> at_end;

    ncclResult_t fail(ncclResult_t r, const std::string& text) {
        error = text;
        return state = r;
    }
    int world(int r) const { return members[size_t(r)].world_rank; }
    void advance();  // one look (ncclCommGetAsyncError) at the communicator
    // Begins a call, whose `work` is done when the call ends; refused while the previous call has not ended.
    ncclResult_t begin(const char* name, std::function<void()> work);
    bool faulty();  // the environment asks for a fault at this call

  private:
    void advance_setup();
    void check_members();
};

namespace emulator::nccl {
std::shared_ptr<ncclComm> find(ncclComm_t c);  // null: not a communicator, or not any more
int number_in(const char* variable);           // of the environment; 0 where unset
void record(const char* name, size_t count = 0, const char* type = "");
}  // namespace emulator::nccl
