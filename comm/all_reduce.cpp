#include "comm/all_reduce.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "comm/quantized.h"
#include "kernels/ops.h"

namespace {
// Elements per rank and message, which bounds the scratch memory at 3 * size * 4 * kShard bytes.  It changes no bit of
// `ordered`.  It changes those of `ring`, where the shard of an element decides at which rank the sum begins.
constexpr size_t kShard = size_t(1) << 18;

void round_to(std::span<const float> x, std::vector<bf16>& y) {
    pack(OuterDtype::bf16, x, reinterpret_cast<std::byte*>(y.data()));
}
void widen(const std::vector<bf16>& x, std::span<float> y) {
    unpack(OuterDtype::bf16, reinterpret_cast<const std::byte*>(x.data()), y);
}

void ordered(Comm& comm, std::span<float> data, Payload payload) {
    const int size = comm.size();
    CHECK_THAT((size & (size - 1)) == 0, "ordered reduction over {} ranks; needs a power of two", size);
    const size_t longest = std::min(kShard, (data.size() + size - 1) / size);
    std::vector<float> send(longest * size), recv(longest * size);                         // (size, longest)
    std::vector<bf16> out(payload == Payload::bf16 ? longest * size : 0), in(out.size());  // (size, longest)
    for (size_t start = 0; start < data.size(); start += longest * size) {
        const size_t count = std::min(longest * size, data.size() - start);
        const size_t n = (count + size - 1) / size;  // a shard; the last ones may be padded with zeros
        const std::span all(send.data(), n * size), sum(recv.data(), n);
        std::memcpy(send.data(), data.data() + start, count * sizeof(float));
        std::fill(send.begin() + ptrdiff_t(count), send.begin() + ptrdiff_t(n * size), 0.0f);
        if (payload == Payload::bf16) {
            round_to(all, out);
            comm.all_to_all(out.data(), in.data(), n * sizeof(bf16));
            widen(in, {recv.data(), n * size});
        } else {
            comm.all_to_all(send.data(), recv.data(), n * sizeof(float));
        }
        const Buf parts(recv.data(), n * size);  // (size, n)
        cpu_backend().tree_sum({.y = parts.slice(0, n), .x = parts, .parts = size}, nullptr);
        if (payload == Payload::bf16) {
            round_to(sum, out);
            comm.all_gather(out.data(), in.data(), n * sizeof(bf16));
            widen(in, all);
        } else {
            comm.all_gather(recv.data(), send.data(), n * sizeof(float));
        }
        std::memcpy(data.data() + start, send.data(), count * sizeof(float));
    }
}

// Shard s of the ring: a contiguous part of the buffer, one for each rank; some are empty where elements are fewer.
std::span<float> ring_shard(std::span<float> data, int size, int s) {
    const size_t begin = data.size() * size_t(s) / size_t(size), end = data.size() * (size_t(s) + 1) / size_t(size);
    return data.subspan(begin, end - begin);
}

void ring_piece(Comm& comm, std::span<float> data, std::vector<float>& incoming) {
    const int size = comm.size(), rank = comm.rank();
    const int next = (rank + 1) % size, previous = (rank + size - 1) % size;
    const auto shard = [&](int s) { return ring_shard(data, size, (s % size + size) % size); };
    for (int i = 0; i < size - 1; i++) {  // reduce-scatter: shard s starts at rank s and is complete at rank s - 1
        const auto out = shard(rank - i), in = shard(rank - i - 1);
        comm.send_recv(out.data(), out.size_bytes(), next, incoming.data(), in.size_bytes(), previous);
        for (size_t j = 0; j < in.size(); j++) in[j] += incoming[j];
    }
    for (int i = 0; i < size - 1; i++) {  // all-gather: the finished shards go round once more
        const auto out = shard(rank + 1 - i), in = shard(rank - i);
        comm.send_recv(out.data(), out.size_bytes(), next, in.data(), in.size_bytes(), previous);
    }
}

void ring_piece_bf16(Comm& comm, std::span<float> data, std::vector<bf16>& outgoing, std::vector<bf16>& incoming) {
    const int size = comm.size(), rank = comm.rank();
    const int next = (rank + 1) % size, previous = (rank + size - 1) % size;
    const auto shard = [&](int s) { return ring_shard(data, size, (s % size + size) % size); };
    const auto pass = [&](size_t n_out, size_t n_in) {
        comm.send_recv(outgoing.data(), n_out * sizeof(bf16), next, incoming.data(), n_in * sizeof(bf16), previous);
    };
    for (int i = 0; i < size - 1; i++) {
        const auto out = shard(rank - i), in = shard(rank - i - 1);
        round_to(out, outgoing);
        pass(out.size(), in.size());
        for (size_t j = 0; j < in.size(); j++) in[j] += float(incoming[j]);
    }
    round_to(shard(rank + 1), outgoing);  // finished; this rank, too, keeps what it sends
    widen(outgoing, shard(rank + 1));
    for (int i = 0; i < size - 1; i++) {
        pass(shard(rank + 1 - i).size(), shard(rank - i).size());
        std::swap(outgoing, incoming);
        widen(outgoing, shard(rank - i));
    }
}

void ring(Comm& comm, std::span<float> data, Payload payload) {
    const size_t piece = all_reduce_piece(comm.size());
    const size_t longest = std::min(kShard, data.size() / size_t(comm.size()) + 1);  // of the shards
    std::vector<float> incoming(payload == Payload::fp32 ? longest : 0);
    std::vector<bf16> out(payload == Payload::bf16 ? longest : 0), in(out.size());
    for (size_t start = 0; start < data.size(); start += piece) {
        const auto part = data.subspan(start, std::min(piece, data.size() - start));
        if (payload == Payload::bf16)
            ring_piece_bf16(comm, part, out, in);
        else
            ring_piece(comm, part, incoming);
    }
}
}  // namespace

size_t all_reduce_piece(int size) { return kShard * size_t(size); }

const char* all_reduce_name(AllReduce how) {
    switch (how) {
        case AllReduce::ordered:
            return "ordered";
        case AllReduce::nccl:
            return "nccl";
        case AllReduce::mpi:
            return "mpi";
        case AllReduce::ring:
            return "ring";
    }
    return "?";
}

void all_reduce(Comm& comm, std::span<float> data, AllReduce how, Payload payload) {
    if (comm.size() == 1) return;
    switch (how) {
        case AllReduce::ordered:
            return ordered(comm, data, payload);
        case AllReduce::nccl:
            fail(Exit::internal, "the nccl reduction needs gradients in device memory");
        case AllReduce::mpi:
            CHECK_THAT(payload == Payload::fp32, "MPI_Allreduce sums fp32; bf16 is for ordered and ring");
            return comm.all_reduce_sum(data);
        case AllReduce::ring:
            return ring(comm, data, payload);
    }
}
