#include "trainer/server_link.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "common/clock.h"

namespace {
constexpr int kTag = 1;
constexpr size_t kHeader = sizeof(ServerMessage), kMostBytes = kHeader + ServerLink::kPiece * sizeof(float);
constexpr auto kPause = std::chrono::microseconds(50);  // between two looks for a message
}  // namespace

int count_workers(int size, int n_servers) {
    if (n_servers >= size)
        fail(Exit::usage,
             "parallel.servers = {} of {} rank(s) leaves {} - {} = {} workers, and at least 1 must train; start {} "
             "ranks "
             "or more (mpirun -np {})",
             n_servers, size, size, n_servers, size - n_servers, n_servers + 1, n_servers + 1);
    return size - n_servers;
}

Range server_shard(size_t n, int server, int n_servers) {
    const size_t chunks = (n + kGradNormChunk - 1) / kGradNormChunk;
    const auto begin = [&](int s) { return std::min(n, chunks * size_t(s) / size_t(n_servers) * kGradNormChunk); };
    return {begin(server), begin(server + 1) - begin(server)};
}

std::vector<uint64_t> pack(const ServerReport& r) {
    std::vector<uint64_t> out = {uint64_t(r.rank), r.first, r.count, r.n_repeated, r.n_skipped, r.largest_staleness};
    out.insert(out.end(), r.applied.begin(), r.applied.end());
    return out;
}

ServerReport unpack(std::span<const uint64_t> n) {
    return {.rank = int(n[0]),
            .first = n[1],
            .count = n[2],
            .n_repeated = n[3],
            .n_skipped = n[4],
            .largest_staleness = n[5],
            .applied = {n.begin() + 6, n.end()}};
}

ServerLink::ServerLink(const Backend& k, Comm& comm, int n_servers, double timeout_s)
    : k_(k),
      comm_(comm),
      n_servers_(n_servers),
      n_workers_(count_workers(comm.size(), n_servers)),
      timeout_s_(timeout_s) {}

void ServerLink::send(std::span<const int> to, const ServerMessage& m, Buf part, Stream s) {
    CHECK_THAT(part.count <= kPiece, "a message of {} numbers, at most {}", part.count, kPiece);
    std::vector<std::byte> numbers(part.n_bytes());
    if (part.count) k_.download(numbers.data(), part.data, part.n_bytes(), s);
    k_.synchronize(s);
    for (const int rank : to) post(rank, m, numbers);
    flush();
    if (posted_.empty()) return;
    fail(Exit::peer_lost,
         "rank {} is lost: it did not receive a message for {:.4g} s (run.timeout_seconds); use --resume",
         posted_[0].peer, timeout_s_);
}

void ServerLink::post(int to, ServerMessage m, Buf numbers, Stream s) {
    size_t at = 0;
    do {
        const size_t n = std::min(kPiece, numbers.count - at);
        std::vector<std::byte> piece(n * sizeof(float));
        if (n) k_.download(piece.data(), numbers.slice(at, n).data, piece.size(), s);
        k_.synchronize(s);
        m.first = at;
        post(to, m, piece);
        at += n;
    } while (at < numbers.count);
}

void ServerLink::post(int to, const ServerMessage& m, std::span<const std::byte> bytes) {
    std::vector<std::byte> message(kHeader + bytes.size());
    std::memcpy(message.data(), &m, kHeader);
    std::ranges::copy(bytes, message.begin() + kHeader);
    posted_.push_back({to, comm_.isend(std::move(message), to, kTag)});
}

void ServerLink::forget(int to) {
    std::erase_if(posted_, [to](const Transfer& t) { return t.peer == to; });
}

void ServerLink::flush() {
    const Stopwatch clock;
    while (true) {
        std::erase_if(posted_, [](const Transfer& t) { return t.bytes->done(); });
        if (posted_.empty() || clock.ms() > 1e3 * timeout_s_) return;
        std::this_thread::sleep_for(kPause);
    }
}

std::optional<ServerLink::Incoming> ServerLink::receive() {
    std::erase_if(posted_, [](const Transfer& t) { return t.bytes->done(); });
    if (const std::optional<Comm::Message> there = comm_.probe(kTag)) {
        CHECK_THAT(there->n_bytes >= kHeader && there->n_bytes <= kMostBytes, "a message of {} bytes from rank {}",
                   there->n_bytes, there->from);
        arriving_.push_back({there->from, comm_.irecv(there->n_bytes, there->from, kTag)});
    }
    for (auto t = arriving_.begin(); t != arriving_.end(); ++t) {
        const bool is_next = std::none_of(arriving_.begin(), t, [&](const Transfer& o) { return o.peer == t->peer; });
        if (!is_next || !t->bytes->done()) continue;
        Incoming in{t->peer, {}, std::move(t->bytes)};
        std::memcpy(&in.m, in.message->bytes.data(), kHeader);
        arriving_.erase(t);
        return in;
    }
    return std::nullopt;
}

ServerLink::Incoming ServerLink::wait(const char* what, std::span<const int> owing) {
    const Stopwatch clock;
    while (clock.ms() < 2e3 * timeout_s_) {
        if (std::optional<Incoming> in = receive()) return std::move(*in);
        std::this_thread::sleep_for(kPause);
    }
    fail(Exit::peer_lost, "rank(s) {}, which serve parameters, did not send {} for {:.4g} s, twice run.timeout_seconds",
         fmt::join(owing, ", "), what, 2 * timeout_s_);
}

void ServerLink::store(const Incoming& in, Buf shard, Stream s) {
    CHECK_THAT(in.m.first + in.count() <= shard.count, "numbers {} + {} from rank {} for a shard of {}", in.m.first,
               in.count(), in.from, shard.count);
    if (in.count() == 0) return;
    k_.upload(shard.slice(in.m.first, in.count()).data, in.bytes().data(), in.bytes().size(), s);
    k_.synchronize(s);
}
