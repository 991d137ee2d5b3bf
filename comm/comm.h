// Comm: messages between the ranks of one run.  Implementations: self (one rank, no library) and mpi.
//
// Every rank calls the same operations in the same order; counts are equal on all ranks unless said.  Calls block until
// the caller's buffers may be reused.  Buffers are host memory.  A failure throws Error(Exit::peer_lost).
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "common/error.h"

class Comm {
  public:
    virtual ~Comm() = default;
    virtual const char* name() const = 0;
    virtual int rank() const = 0;
    virtual int size() const = 0;
    // Position among the ranks of this host, and how many share it.
    virtual int local_rank() const = 0;
    virtual int local_size() const = 0;

    virtual void all_reduce_sum(std::span<float> data) = 0;
    // send holds size() blocks of n_bytes, block r for rank r; recv gets size() blocks, block r from rank r.
    virtual void all_to_all(const void* send, void* recv, size_t n_bytes) = 0;
    virtual void all_gather(const void* send, void* recv, size_t n_bytes) = 0;  // recv: size() * n_bytes, rank order
    virtual void broadcast(void* data, size_t n_bytes, int root) = 0;
    virtual void send_recv(const void* send, size_t n_send, int to, void* recv, size_t n_recv, int from) = 0;
    virtual void barrier() = 0;
    virtual std::unique_ptr<Comm> split(int color, int key) = 0;

    // Ends every rank of the job at once with this exit code; does not return.
    [[noreturn]] virtual void abort(Exit code) = 0;
};

std::unique_ptr<Comm> make_self_comm();

// All ranks hold this value; else Error(code): "rank(s) 1, 3 have <what>".
void require_same(Comm& comm, uint64_t value, Exit code, const std::string& what);

// Owns MPI_Init_thread / MPI_Finalize and the world communicator; make one in main() before anything else.
// Throws Error(Exit::usage) when this process was started as one of several ranks but sees a world of one
// (another MPI's mpirun), naming the launcher's variable.
class MpiSession {
  public:
    MpiSession(int* argc, char*** argv);
    ~MpiSession();
    MpiSession(const MpiSession&) = delete;
    MpiSession& operator=(const MpiSession&) = delete;
    Comm& world() { return *world_; }

  private:
    std::unique_ptr<Comm> world_;
};
