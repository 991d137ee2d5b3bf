#include "comm/all_reduce.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/ops.h"

namespace {
// Elements per rank and message, which bounds the scratch memory at 2 * size * 4 * kShard bytes.  It changes no bit of
// `ordered`.  It changes those of `ring`, where the shard of an element decides at which rank the sum begins.
constexpr size_t kShard = size_t(1) << 18;

void ordered(Comm& comm, std::span<float> data) {
    const int size = comm.size();
    CHECK_THAT((size & (size - 1)) == 0, "ordered reduction over {} ranks; needs a power of two", size);
    const size_t longest = std::min(kShard, (data.size() + size - 1) / size);
    std::vector<float> send(longest * size), recv(longest * size);  // (size, longest)
    for (size_t start = 0; start < data.size(); start += longest * size) {
        const size_t count = std::min(longest * size, data.size() - start);
        const size_t n = (count + size - 1) / size;  // a shard; the last ones may be padded with zeros
        std::memcpy(send.data(), data.data() + start, count * sizeof(float));
        std::fill(send.begin() + ptrdiff_t(count), send.begin() + ptrdiff_t(n * size), 0.0f);
        comm.all_to_all(send.data(), recv.data(), n * sizeof(float));
        const Buf parts(recv.data(), n * size);  // (size, n)
        cpu_backend().tree_sum({.y = parts.slice(0, n), .x = parts, .parts = size}, nullptr);
        comm.all_gather(recv.data(), send.data(), n * sizeof(float));
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

void ring(Comm& comm, std::span<float> data) {
    const size_t piece = all_reduce_piece(comm.size());
    std::vector<float> incoming(std::min(kShard, data.size() / size_t(comm.size()) + 1));
    for (size_t start = 0; start < data.size(); start += piece)
        ring_piece(comm, data.subspan(start, std::min(piece, data.size() - start)), incoming);
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

void all_reduce(Comm& comm, std::span<float> data, AllReduce how) {
    if (comm.size() == 1) return;
    switch (how) {
        case AllReduce::ordered:
            return ordered(comm, data);
        case AllReduce::nccl:
            fail(Exit::internal, "the nccl reduction needs gradients in device memory");
        case AllReduce::mpi:
            return comm.all_reduce_sum(data);
        case AllReduce::ring:
            return ring(comm, data);
    }
}
