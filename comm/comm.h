// Comm: messages between ranks, from and to host memory.  Implementations: self (one rank, no library) and mpi.
//
// Every rank calls the same operations in the same order; counts are equal on all ranks unless said.  Calls block until
// the caller's buffers may be reused.  A failure throws Error(Exit::peer_lost), also one of the caller's deadline; then
// messages that still go on own their buffers, and the only call that is left is abort().
//
// One thread at a time uses a Comm.  Two threads of a rank may use two Comms at the same time: those that split() made
// share no messages.
#pragma once
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "common/error.h"

// Bytes of messages to and from other ranks, without headers.
struct Traffic {
    uint64_t sent = 0, received = 0;
    // All-to-all, all-gather and reduce-scatter: a block of n_bytes to each other rank and one from it, at once or in as
    // many steps around a ring.
    static Traffic blocks(uint64_t n_bytes, int size) {
        const uint64_t n = n_bytes * uint64_t(size - 1);
        return {n, n};
    }
    // A reduce-scatter and an all-gather around a ring.  MPI and NCCL may take other ways that divide the bytes among
    // ranks otherwise.  (nccl-tests has both formulas: doc/PERFORMANCE.md, "bus bandwidth".)
    static Traffic all_reduce(uint64_t n_bytes, int size) {
        const uint64_t n = 2 * n_bytes * uint64_t(size - 1) / uint64_t(size);
        return {n, n};
    }
    // Every other rank receives the bytes once.  The library chooses who passes them on: they count as the root's.
    static Traffic broadcast(uint64_t n_bytes, int size, bool is_root) {
        return is_root ? Traffic{n_bytes * uint64_t(size - 1), 0} : Traffic{0, n_bytes};
    }
};

// Adds up a rank's traffic; several threads may count.
class TrafficCounter {
  public:
    void add(Traffic t) { sent_ += t.sent, received_ += t.received; }
    Traffic total() const { return {sent_, received_}; }

  private:
    std::atomic<uint64_t> sent_ = 0, received_ = 0;
};

class Comm {
  public:
    Comm() : Comm(std::make_shared<TrafficCounter>()) {}
    explicit Comm(std::shared_ptr<TrafficCounter> counter) : counter_(std::move(counter)) {}
    virtual ~Comm() = default;
    virtual const char* name() const = 0;
    virtual int rank() const = 0;
    virtual int size() const = 0;
    // Position among the ranks of this host, and how many share it.
    virtual int local_rank() const = 0;
    virtual int local_size() const = 0;

    virtual void all_reduce_sum(std::span<float> data) = 0;
    // send holds size() blocks of n; recv (n) gets the sum over ranks of their block rank().  On all ranks or on none
    // recv may be block rank() of send; then the other blocks of send are undefined afterwards.
    virtual void reduce_scatter_sum(float* send, float* recv, size_t n) = 0;
    // recv gets size() blocks of n_bytes in rank order.  On all ranks or on none send may be block rank() of recv.
    virtual void all_gather(const void* send, void* recv, size_t n_bytes) = 0;
    // send holds size() blocks of n_bytes, block r for rank r; recv gets size() blocks, block r from rank r.
    virtual void all_to_all(const void* send, void* recv, size_t n_bytes) = 0;
    virtual void broadcast(void* data, size_t n_bytes, int root) = 0;
    // Only the two ranks call these, with equal n_bytes and tags.  send() may wait until the other rank receives.
    // Messages of one tag from one rank to another arrive in the order in which they were sent.
    virtual void send(const void* data, size_t n_bytes, int to, int tag = 0) = 0;  // 0 <= tag < kTags
    virtual void recv(void* data, size_t n_bytes, int from, int tag = 0) = 0;
    static constexpr int kTags = (1 << 14) - 1;
    // Both at once: rings of ranks that send and receive do not wait for each other.
    virtual void send_recv(const void* send, size_t n_send, int to, void* recv, size_t n_recv, int from) = 0;
    virtual void barrier() = 0;
    // The ranks of each color, ordered by key and then by rank.
    virtual std::unique_ptr<Comm> split(int color, int key) = 0;

    // For a rank that serves others, whose messages come in no order that it knows.  One rank has no such messages:
    // Error(Exit::internal).
    struct Message {
        int from;
        size_t n_bytes;
    };
    // A message of this tag that has arrived, if there is one; recv(.., from, tag) then gets it without waiting.
    virtual std::optional<Message> probe(int tag);
    // A message that nobody waits for.  A handle that is destroyed before done() leaves bytes and message on their way.
    class Transfer {
      public:
        virtual ~Transfer() = default;
        virtual bool done() = 0;
        std::vector<std::byte> bytes;  // not to be touched before done()
    };
    virtual std::unique_ptr<Transfer> isend(std::vector<std::byte> message, int to, int tag);
    // The first message of this tag from this rank, such as one that probe() has found.
    virtual std::unique_ptr<Transfer> irecv(size_t n_bytes, int from, int tag);

    // Of this rank since the start: through all Comms that split() made of one, and the DeviceComms over them.  Exact for
    // messages, all_gather and all_to_all, and so for all-reduces by ring and ordered; else by Traffic's formulas.  A
    // call that a graph records counts when it is recorded; who replays the graph adds the same to counter().
    Traffic traffic() const { return counter_->total(); }
    const std::shared_ptr<TrafficCounter>& counter() const { return counter_; }

    // A call that waits longer for other ranks is an error; with 0 seconds every wait is one.  Each Comm has its own
    // deadline, at first none; split() hands it down.  Another thread may call these four, also during a wait.
    static constexpr double kNoDeadline = std::numeric_limits<double>::infinity();
    void set_timeout(double seconds) { timeout_s_ = seconds; }
    double timeout() const { return timeout_s_; }
    // A patient Comm waits without deadline: for a rank that reads or writes files, or for work to serve.
    void set_patient(bool on) { patient_ = on; }
    bool is_patient() const { return patient_; }

    // Ends every rank of the job at once with this exit code; does not return.
    [[noreturn]] virtual void abort(Exit code) = 0;

  private:
    std::atomic<double> timeout_s_ = kNoDeadline;
    std::atomic<bool> patient_ = false;
    const std::shared_ptr<TrafficCounter> counter_;
};

// While it lives, `comm` is patient.
class PatientScope {
  public:
    explicit PatientScope(Comm& comm) : comm_(comm), before_(comm.is_patient()) { comm.set_patient(true); }
    ~PatientScope() { comm_.set_patient(before_); }
    PatientScope(const PatientScope&) = delete;
    PatientScope& operator=(const PatientScope&) = delete;

  private:
    Comm& comm_;
    const bool before_;
};

// A barrier without deadline: rank 0 reads or writes files, or samples text, for as long as that takes.
inline void patient_barrier(Comm& comm) {
    const PatientScope scope(comm);
    comm.barrier();
}

std::unique_ptr<Comm> make_self_comm();

// All ranks hold this value; else Error(code): "rank(s) 1, 3 have <what>".
void require_same(Comm& comm, uint64_t value, Exit code, const std::string& what);

// Owns MPI_Init_thread / MPI_Finalize and the world communicator; make one in main() before anything else.
// Throws Error(Exit::usage) when this process was started as one of several ranks but sees a world of one
// (another MPI's mpirun), naming the launcher's variable.
class MpiSession {
  public:
    MpiSession(int* argc, char*** argv);
    ~MpiSession();  // end(), unless that was called, without its limit of time
    // Ends MPI after the last message and returns `exit_code`.  MPI's end can hang: after kFinalizeLimit the process ends
    // with this code all the same, and the job with it.
    int end(int exit_code);
    static constexpr std::chrono::seconds kFinalizeLimit{5};
    MpiSession(const MpiSession&) = delete;
    MpiSession& operator=(const MpiSession&) = delete;
    Comm& world() { return *world_; }

  private:
    std::unique_ptr<Comm> world_;
};
