// The part that workers and servers of a parameter server share: their numbers, their shards, and their messages.
#pragma once
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "comm/comm.h"
#include "trainer/flat_params.h"
#include "trainer/share_source.h"

// Of `size` ranks the last n_servers serve; the others work.  Error(Exit::usage) where no worker remains.
int count_workers(int size, int n_servers);

// The elements of a flat buffer of n that one server owns: whole chunks of kGradNormChunk elements (the last may be
// shorter), so that the chunks' sums of squares are those of one rank.  Two servers differ by one chunk at most; where
// chunks are fewer than servers, some own nothing.
Range server_shard(size_t n, int server, int n_servers);

// A message: this header, then numbers.
//
//   at the start   rank 0 sends `load` for each part of parameters and moments, then `loaded`; the server says `done`
//   each step      every worker pushes its gradient to every server
//     synchronous    when all have pushed, the server sends `parameters` to all
//     asynchronous   the server applies the push and says `done`.  Before its next step the worker asks the first
//                    server for a share (`ask`: `share`, `none` for now, `drained` to rank 0, or `over`), and pulls the
//                    parameters from all servers
//   rank 0         `open` and `shorten` say how many shares may be dealt, `collect` fetches the moments, `report` the
//                  counts, and `close` ends the servers
struct alignas(64) ServerMessage {
    enum class Kind : uint32_t {
        load,
        loaded,
        push,
        pull,
        ask,
        open,
        shorten,
        collect,
        report,
        close,  // to a server
        done,
        parameters,
        moments,
        share,
        none,
        drained,
        over  // to a worker
    };
    Kind kind = Kind::done;
    uint32_t tensor = 0;    // load, moments: 0 for the parameters or the first moment, ...
    uint64_t sequence = 0;  // of a worker's pushes to a server
    int64_t share = -1;     // of a push, a pull, or the one that is done; open: the first
    int64_t end = 0;        // open, shorten, report: of the shares that may be dealt.  close, over: the exit code
    uint64_t first = 0;     // place of the numbers in the server's shard
    uint64_t updates = 0;   // of the optimizer, skipped ones left out
    double learning_rate = 0;
    float norm = 0, clip = 0;
};

// The numbers of a report.
std::vector<uint64_t> pack(const ServerReport& r);
ServerReport unpack(std::span<const uint64_t> numbers);

// Sends and receives these messages.  A server takes them from whichever worker sends first and waits for none.
class ServerLink {
  public:
    static constexpr size_t kPiece = size_t(1) << 20;  // numbers of one message

    // `comm`: workers, then servers; outlives the link.
    ServerLink(const Backend& k, Comm& comm, int n_servers, double timeout_s);

    int rank() const { return comm_.rank(); }
    int n_workers() const { return n_workers_; }
    int n_servers() const { return n_servers_; }
    int server(int i) const { return n_workers_ + i; }

    // Sends part (<= kPiece) f32 in the backend's memory, after the work of `s`, to each of these ranks.  Waits until
    // they receive it; longer than timeout_s is Error(Exit::peer_lost).
    void send(std::span<const int> to, const ServerMessage& m, Buf part, Stream s);
    // The same to one rank, of any length in pieces, without waiting: the link keeps a copy until it is sent.
    void post(int to, ServerMessage m, Buf numbers, Stream s);
    void post(int to, const ServerMessage& m, std::span<const std::byte> bytes = {});
    // Messages on their way to a lost rank: forgotten.
    void forget(int to);
    // Waits until all that was posted is sent; not longer than timeout_s.
    void flush();

    struct Incoming {
        int from = -1;
        ServerMessage m;
        std::unique_ptr<Comm::Transfer> message;
        std::span<const std::byte> bytes() const { return std::span(message->bytes).subspan(sizeof m); }
        size_t count() const { return bytes().size() / sizeof(float); }
        template <class T>
        std::span<const T> as() const {
            return {reinterpret_cast<const T*>(bytes().data()), bytes().size() / sizeof(T)};
        }
    };
    // A message that has arrived, if there is one.  Messages of one rank come in their order.
    std::optional<Incoming> receive();
    // The next message; Error(Exit::peer_lost) when none comes for twice timeout_s, naming the ranks that `owing` has
    // and what was to come.  Twice: a server first says which worker it waits for.
    Incoming wait(const char* what, std::span<const int> owing);
    // The incoming numbers go to their place in `shard` (n) f32, in the backend's memory.
    void store(const Incoming& in, Buf shard, Stream s);

  private:
    struct Transfer {
        int peer;
        std::unique_ptr<Comm::Transfer> bytes;
    };

    const Backend& k_;
    Comm& comm_;
    const int n_servers_, n_workers_;
    const double timeout_s_;
    std::vector<Transfer> posted_, arriving_;
};
