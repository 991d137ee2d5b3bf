// The calls of the emulated NCCL that move data.
#include <cuda_emulator_host.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "nccl_state.h"

using namespace emulator::nccl;

namespace {
constexpr size_t kBufferBytes = size_t(1) << 20;  // of device memory, allocated by a communicator's first call

const char* type_name(int t) {
    static const char* const names[] = {"int8",   "uint8",   "int32",   "uint32",  "int64",
                                        "uint64", "float16", "float32", "float64", "bfloat16"};
    return t >= ncclInt8 && t <= ncclBfloat16 ? names[t] : "an unknown type";
}
size_t type_bytes(int t) {
    static const size_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
    return t >= ncclInt8 && t <= ncclBfloat16 ? bytes[t] : 0;
}

enum class Kind : uint64_t { all_reduce, all_gather, group };
struct Part {  // of a group
    bool is_send;
    int peer;
    void* data;
    size_t count;
};

// One call's work on the stream.  Runs anew each time that the stream reaches it: a replayed graph does so repeatedly.
struct Op {
    std::shared_ptr<ncclComm> c;
    Kind kind;
    int number, type;
    const char* send = nullptr;
    char* recv = nullptr;
    size_t count = 0;
    std::vector<Part> parts;

    enum { start, comparing, moving } phase = start;
    Messages messages;
    std::vector<uint64_t> mine, all;        // (4 + 2 size), (size, 4 + 2 size): each rank's call
    std::vector<std::vector<char>> copies;  // (size) of all_reduce

    size_t words() const { return 4 + 2 * size_t(c->size); }
    const uint64_t* of(int r) const { return &all[size_t(r) * words()]; }

    bool advance() {
        if (c->destroyed)
            throw std::runtime_error("NCCL: the communicator was destroyed before the stream got to a call");
        if (c->aborted) {  // its kernels leave at once, whatever their memory holds
            messages.drop();
            phase = start;
            return true;
        }
        if (c->state != ncclSuccess && c->state != ncclInProgress) return false;
        if (phase == start && number_in("KILN_EMULATOR_NCCL_FAIL_RUN") == ++c->n_runs) {
            c->fail(ncclRemoteError, "fault injected at run " + std::to_string(c->n_runs));
            return false;
        }
        if (phase == start) send_descriptions();
        if (!messages.done()) return false;
        if (phase == comparing) {
            if (!compare()) return false;
            send_data();
            if (!messages.done()) return false;
        }
        if (kind == Kind::all_reduce) add();
        phase = start;
        return true;
    }

    void send_descriptions() {
        phase = comparing;
        mine.assign(words(), 0);
        mine[0] = uint64_t(number), mine[1] = uint64_t(kind), mine[2] = uint64_t(type), mine[3] = count;
        for (const Part& p : parts) mine[4 + 2 * size_t(p.peer) + !p.is_send] += p.count + 1;  // + 1: empty ones count
        all.assign(size_t(c->size) * words(), 0);
        for (int r = 0; r < c->size; r++) {
            messages.recv(&all[size_t(r) * words()], words() * 8, c->world(r), c->tag);
            messages.send(mine.data(), words() * 8, c->world(r), c->tag);
        }
    }

    std::string describe(int r) const {
        static const char* const names[] = {"ncclAllReduce", "ncclAllGather", "a group of sends and receives"};
        const uint64_t* d = of(r);
        std::string text = "rank " + std::to_string(r) + " calls " + names[d[1]] + " as call " + std::to_string(d[0]);
        if (Kind(d[1]) != Kind::group) text += " with count " + std::to_string(d[3]);
        return text + " of " + type_name(int(d[2]));
    }
    bool compare() {
        for (int r = 1; r < c->size; r++)
            if (!std::equal(of(0), of(0) + 4, of(r))) {
                c->fail(ncclInvalidUsage, describe(0) + ", " + describe(r));
                return false;
            }
        for (int from = 0; from < c->size; from++)
            for (int to = 0; to < c->size; to++) {
                const uint64_t sent = of(from)[4 + 2 * to], expected = of(to)[4 + 2 * from + 1];
                if (sent == expected) continue;
                const auto text = [](uint64_t n) { return n ? std::to_string(n - 1) + " elements" : "nothing"; };
                c->fail(ncclInvalidUsage, "rank " + std::to_string(from) + " sends " + text(sent) + " to rank " +
                                              std::to_string(to) + ", which expects " + text(expected));
                return false;
            }
        return true;
    }

    void send_data() {
        phase = moving;
        const size_t n_bytes = count * type_bytes(type);
        if (kind == Kind::all_reduce) copies.assign(size_t(c->size), std::vector<char>(n_bytes));
        for (int r = 0; kind != Kind::group && r < c->size; r++) {
            char* to = kind == Kind::all_reduce ? copies[size_t(r)].data() : recv + size_t(r) * n_bytes;
            if (to != send) messages.recv(to, n_bytes, c->world(r), c->tag);
            if (r != c->rank || !in_place()) messages.send(send, n_bytes, c->world(r), c->tag);
        }
        for (const Part& p : parts) {
            const size_t part_bytes = p.count * type_bytes(type);
            if (p.is_send) messages.send(p.data, part_bytes, c->world(p.peer), c->tag);
            if (!p.is_send) messages.recv(p.data, part_bytes, c->world(p.peer), c->tag);
        }
    }
    // True for an all-gather whose own block is in its place already.
    bool in_place() const {
        return kind == Kind::all_gather && send == recv + size_t(c->rank) * count * type_bytes(type);
    }

    void add() {
        float* out = reinterpret_cast<float*>(recv);
        for (size_t i = 0; i < count; i++) {
            const size_t shard = i * size_t(c->size) / count;
            float sum = 0;
            for (size_t r = 1; r <= size_t(c->size); r++) {
                const char* from = copies[(shard + r) % size_t(c->size)].data();
                const float x = reinterpret_cast<const float*>(from)[i];
                sum = r == 1 ? x : sum + x;
            }
            out[i] = sum;
        }
        copies.clear();
    }
};

struct Group {
    int depth = 0;
    std::shared_ptr<ncclComm> c;
    cudaStream_t stream = nullptr;
    int type = -1;
    std::vector<Part> parts;
};
Group& group() {
    static Group g;
    return g;
}

ncclResult_t give_to_stream(const std::shared_ptr<Op>& op, const char* name, cudaStream_t stream) {
    op->number = op->c->n_calls + 1;
    return op->c->begin(name, [op, stream] {
        cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
        cudaStreamIsCapturing(stream, &status);
        std::shared_ptr<void> held;
        if (status == cudaStreamCaptureStatusActive) held = op->c->in_graphs;
        if (!op->c->buffer && status == cudaStreamCaptureStatusNone) cudaMalloc(&op->c->buffer, kBufferBytes);
        if (emulator::enqueue_polled(stream, [op, held] { return op->advance(); }) != cudaSuccess)
            op->c->fail(ncclUnhandledCudaError, "the stream takes no work");
    });
}

ncclResult_t check_buffer(ncclComm& c, const void* p, size_t count, int type) {
    if (type_bytes(type) == 0) return c.fail(ncclInvalidArgument, "an unknown data type");
    if (count * type_bytes(type) > size_t(INT_MAX))
        return c.fail(ncclInvalidArgument, "the emulated NCCL moves at most 2 GiB");
    if (emulator::check_device_range(p, count * type_bytes(type)) != cudaSuccess)
        return c.fail(ncclInvalidArgument, "a buffer that is not in device memory, or longer than it");
    return ncclSuccess;
}
bool overlap(const char* a, size_t n_a, const char* b, size_t n_b) { return a < b + n_b && b < a + n_a; }

ncclResult_t collective(const char* name, Kind kind, const void* send, void* recv, size_t count, ncclDataType_t type,
                        ncclComm_t handle, cudaStream_t stream) {
    record(name, count, type_name(type));
    const auto c = find(handle);
    if (!c) return ncclInvalidArgument;
    if (group().depth) return c->fail(ncclInvalidUsage, "the emulated NCCL has sends and receives alone in groups");
    const size_t n_recv = kind == Kind::all_gather ? count * size_t(c->size) : count;
    for (const auto& [p, n] : {std::pair<const void*, size_t>(send, count), {recv, n_recv}})
        if (const ncclResult_t r = check_buffer(*c, p, n, type); r != ncclSuccess) return r;
    const auto op = std::make_shared<Op>();
    op->c = c, op->kind = kind, op->type = type, op->count = count;
    op->send = static_cast<const char*>(send), op->recv = static_cast<char*>(recv);
    const size_t bytes = type_bytes(type);
    const bool may_be_one = kind == Kind::all_reduce ? send == recv : op->in_place();
    if (!may_be_one && overlap(op->send, count * bytes, op->recv, n_recv * bytes))
        return c->fail(ncclInvalidUsage, "buffers overlap");
    return give_to_stream(op, name, stream);
}

ncclResult_t add_to_group(bool is_send, void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t handle,
                          cudaStream_t stream) {
    record(is_send ? "ncclSend" : "ncclRecv", count, type_name(type));
    const auto c = find(handle);
    if (!c) return ncclInvalidArgument;
    Group& g = group();
    if (g.depth == 0) return c->fail(ncclInvalidUsage, "the emulated NCCL has sends and receives in groups only");
    if (peer < 0 || peer >= c->size) return c->fail(ncclInvalidArgument, "peer " + std::to_string(peer));
    if (const ncclResult_t r = check_buffer(*c, data, count, type); r != ncclSuccess) return r;
    if (g.parts.empty()) g.c = c, g.stream = stream, g.type = type;
    if (g.c != c || g.stream != stream || g.type != type)
        return c->fail(ncclInvalidUsage, "a group over several communicators, streams or types");
    for (const Part& p : g.parts)
        if (p.is_send == is_send && p.peer == peer)
            return c->fail(ncclInvalidUsage, "a group with two messages between the same ranks");
    g.parts.push_back({is_send, peer, data, count});
    return ncclSuccess;
}
}  // namespace

ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
    if (const auto c = find(comm); c && (op != ncclSum || type != ncclFloat32))
        return c->fail(ncclInvalidArgument, "the emulated NCCL sums float32 only");
    return collective("ncclAllReduce", Kind::all_reduce, send, recv, count, type, comm, stream);
}
ncclResult_t ncclAllGather(const void* send, void* recv, size_t n_send, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
    return collective("ncclAllGather", Kind::all_gather, send, recv, n_send, type, comm, stream);
}
ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return add_to_group(true, const_cast<void*>(send), count, type, peer, comm, stream);
}
ncclResult_t ncclRecv(void* recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
    return add_to_group(false, recv, count, type, peer, comm, stream);
}

ncclResult_t ncclGroupStart() {
    group().depth++;
    return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
    Group& g = group();
    if (g.depth == 0) return ncclInvalidUsage;
    if (--g.depth > 0 || !g.c) return ncclSuccess;
    const Group whole = std::exchange(g, Group());
    const auto op = std::make_shared<Op>();
    op->c = whole.c, op->kind = Kind::group, op->type = whole.type, op->parts = whole.parts;
    return give_to_stream(op, "ncclGroupEnd", whole.stream);
}
