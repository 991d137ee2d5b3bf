// The calls of the emulated NCCL that move data.
#include <cuda_emulator_host.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string_view>
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

enum class Kind : uint64_t { all_reduce, reduce_scatter, all_gather, broadcast, group };
struct Part {  // of a group
    bool is_send;
    int peer;
    void* data;
    size_t count;
};
struct Call {
    Kind kind;
    int type;
    const char* send = nullptr;
    char* recv = nullptr;
    size_t count = 0;         // as the call's argument: of a block where one of the buffers holds a block per rank
    int root = 0;             // of a broadcast
    std::vector<Part> parts;  // of a group
    bool by_switch = false;   // of a sum: the switch may add
};

// One call's work on the stream.  Runs anew each time that the stream reaches it: a replayed graph does so repeatedly.
struct Op : Call {
    std::shared_ptr<ncclComm> c;
    int number = 0;  // of a collective: making the communicator was the first

    enum { start, comparing, moving } phase = start;
    Messages messages;
    std::vector<uint64_t> mine, all;        // (words), (size, words): each rank's call
    std::vector<std::vector<char>> copies;  // (size) of what is summed

    Op(Call call, std::shared_ptr<ncclComm> comm) : Call(std::move(call)), c(std::move(comm)) {}
    static constexpr size_t kHead = 5;  // number, kind, type, count, root: equal on all ranks that take part
    size_t words() const { return kHead + 2 * size_t(c->size) + 1; }
    const uint64_t* of(int r) const { return &all[size_t(r) * words()]; }
    uint64_t sent(int from, int to) const { return of(from)[kHead + 2 * size_t(to)]; }
    uint64_t expected(int from, int to) const { return of(to)[kHead + 2 * size_t(from) + 1]; }

    // A collective is called by all ranks, a group by those between which it moves data.
    bool takes_part(int r) const {
        return kind != Kind::group || std::ranges::any_of(parts, [r](const Part& p) { return p.peer == r; });
    }
    bool sums() const { return kind == Kind::all_reduce || kind == Kind::reduce_scatter; }
    size_t n_bytes() const { return count * type_bytes(type); }

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
        if (sums()) add();
        phase = start;
        return true;
    }

    void send_descriptions() {
        phase = comparing;
        mine.assign(words(), 0);
        mine[0] = uint64_t(number), mine[1] = uint64_t(kind), mine[2] = uint64_t(type), mine[3] = count;
        mine[4] = uint64_t(root);
        if (by_switch) mine.back() = std::random_device{}();  // rank 0's turns the order of the sum
        for (const Part& p : parts) mine[kHead + 2 * size_t(p.peer) + !p.is_send] += p.count + 1;  // empty ones count
        all.assign(size_t(c->size) * words(), 0);
        for (int r = 0; r < c->size; r++) {
            if (!takes_part(r)) continue;
            messages.recv(&all[size_t(r) * words()], words() * 8, c->world(r), c->tag);
            messages.send(mine.data(), words() * 8, c->world(r), c->tag);
        }
        if (!takes_part(c->rank)) std::ranges::copy(mine, all.begin() + ptrdiff_t(size_t(c->rank) * words()));
    }

    std::string describe(int r) const {
        static const char* const names[] = {"ncclAllReduce", "ncclReduceScatter", "ncclAllGather", "ncclBroadcast",
                                            "a group of sends and receives"};
        const uint64_t* d = of(r);
        std::string text = "rank " + std::to_string(r) + " calls " + names[d[1]];
        if (Kind(d[1]) != Kind::group)
            text += " as call " + std::to_string(d[0]) + " with count " + std::to_string(d[3]);
        if (Kind(d[1]) == Kind::broadcast) text += " from root " + std::to_string(d[4]);
        return text + " of " + type_name(int(d[2]));
    }
    // A collective: all ranks against rank 0.  A group: this rank against the others that take part.
    bool compare() {
        const int me = kind == Kind::group ? c->rank : 0;
        std::string unequal;
        for (int r = 0; r < c->size; r++) {
            if (!takes_part(r)) continue;
            if (!std::equal(of(me), of(me) + kHead, of(r))) {
                c->fail(ncclInvalidUsage, describe(std::min(me, r)) + ", " + describe(std::max(me, r)));
                return false;
            }
            for (const auto& [from, to] : {std::pair(me, r), std::pair(r, me)})
                if (sent(from, to) != expected(from, to))
                    unequal += (unequal.empty() ? "" : ", ") + describe_message(from, to);
        }
        if (!unequal.empty()) c->fail(ncclInvalidUsage, unequal);
        return unequal.empty();
    }
    std::string describe_message(int from, int to) const {
        const auto text = [](uint64_t n) { return n ? std::to_string(n - 1) + " elements" : "nothing"; };
        return "rank " + std::to_string(from) + " sends " + text(sent(from, to)) + " to rank " + std::to_string(to) +
               ", which expects " + text(expected(from, to));
    }

    void send_data() {
        phase = moving;
        const size_t n = n_bytes();
        if (sums()) copies.assign(size_t(c->size), std::vector<char>(n));
        const auto give = [&](int r, const void* p, size_t bytes) { messages.send(p, bytes, c->world(r), c->tag); };
        const auto take = [&](int r, void* p, size_t bytes) { messages.recv(p, bytes, c->world(r), c->tag); };
        for (const Part& p : parts) {
            if (p.is_send) give(p.peer, p.data, p.count * type_bytes(type));
            if (!p.is_send) take(p.peer, p.data, p.count * type_bytes(type));
        }
        for (int r = 0; r < c->size && kind != Kind::group; r++) {
            if (sums()) take(r, copies[size_t(r)].data(), n);
            if (sums()) give(r, kind == Kind::reduce_scatter ? send + size_t(r) * n : send, n);
            if (r == c->rank && in_place()) continue;
            if (kind == Kind::all_gather) take(r, recv + size_t(r) * n, n);
            if (kind == Kind::all_gather || (kind == Kind::broadcast && c->rank == root)) give(r, send, n);
            if (kind == Kind::broadcast && r == root) take(r, recv, n);
        }
    }
    // The places that NCCL's documentation calls in place; other buffers may not overlap.
    bool in_place() const {
        const size_t mine = size_t(c->rank) * n_bytes();
        if (kind == Kind::all_gather) return send == recv + mine;
        if (kind == Kind::reduce_scatter) return recv == send + mine;
        return send == recv;
    }

    void add() {
        float* out = reinterpret_cast<float*>(recv);
        const size_t turn = by_switch ? size_t(of(0)[words() - 1]) % size_t(c->size) : 0;
        for (size_t i = 0; i < count; i++) {
            const size_t shard = kind == Kind::reduce_scatter ? size_t(c->rank) : i * size_t(c->size) / count;
            float sum = 0;
            for (size_t r = 1; r <= size_t(c->size); r++) {
                const char* from = copies[(shard + turn + r) % size_t(c->size)].data();
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
    if (op->kind != Kind::group) op->number = op->c->n_collectives + 1;
    return op->c->begin(name, [op, stream] {
        op->c->n_collectives += op->kind != Kind::group;
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

ncclResult_t collective(const char* name, const Call& call, ncclComm_t handle, cudaStream_t stream) {
    record(name, call.count, type_name(call.type));
    const auto c = find(handle);
    if (!c) return ncclInvalidArgument;
    if (group().depth) return c->fail(ncclInvalidUsage, "the emulated NCCL has sends and receives alone in groups");
    const auto op = std::make_shared<Op>(call, c);
    if (call.root < 0 || call.root >= c->size) return c->fail(ncclInvalidArgument, "root " + std::to_string(call.root));
    const bool sends = call.kind != Kind::broadcast || c->rank == call.root;
    const size_t blocks = size_t(c->size), bytes = type_bytes(call.type);
    const size_t n_send = call.kind == Kind::reduce_scatter ? blocks * call.count : call.count;
    const size_t n_recv = call.kind == Kind::all_gather ? blocks * call.count : call.count;
    ncclResult_t result = check_buffer(*c, call.recv, n_recv, call.type);
    if (result == ncclSuccess && sends) result = check_buffer(*c, call.send, n_send, call.type);
    if (result != ncclSuccess) return result;
    if (sends && !op->in_place() && overlap(call.send, n_send * bytes, call.recv, n_recv * bytes))
        return c->fail(ncclInvalidUsage, "buffers overlap");
    return give_to_stream(op, name, stream);
}

// `algorithms`: those that the call names; null: any that NCCL_ALGO allows.
ncclResult_t sum(const char* name, Call call, ncclRedOp_t op, ncclComm_t handle, cudaStream_t stream,
                 const char* algorithms = nullptr) {
    const auto c = find(handle);
    if (c && (op != ncclSum || call.type != ncclFloat32))
        return c->fail(ncclInvalidArgument, "the emulated NCCL sums float32 only");
    // As NCCL does, NCCL_ALGO counts for more than what a call names.
    call.by_switch = c && c->by_switch &&
                     (!algorithms || std::getenv("NCCL_ALGO") || std::string_view(algorithms).find("NVLS") == 0);
    return collective(name, call, handle, stream);
}
Call call_of(Kind kind, const void* send, void* recv, size_t count, ncclDataType_t type) {
    return {.kind = kind,
            .type = type,
            .send = static_cast<const char*>(send),
            .recv = static_cast<char*>(recv),
            .count = count};
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
    return sum("ncclAllReduce", call_of(Kind::all_reduce, send, recv, count, type), op, comm, stream);
}
ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t n_recv, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
    return sum("ncclReduceScatter", call_of(Kind::reduce_scatter, send, recv, n_recv, type), op, comm, stream);
}
#if NCCL_STAND_IN_VERSION >= 23100
namespace {
// Empty: no fault.  The names are the beginnings of NCCL's, such as RING for RING_LL, RING_LL128 and RING_SIMPLE.
std::string fault_of(const ncclCollConfig_t* config, std::initializer_list<std::string_view> known) {
    if (!config || !config->algSelection) return "";
    if (config->size != sizeof *config || config->magic != 0xcafebeef)
        return "a configuration that was not initialised";
    std::istringstream names(config->algSelection);
    for (std::string name; std::getline(names, name, ',');)
        if (config->forceAlgSelection && std::ranges::find(known, std::string_view(name)) == known.end())
            return "algorithm " + name + " is not one of this sum's";
    return "";
}
ncclResult_t configured(const char* name, const Call& call, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream,
                        const ncclCollConfig_t* config, std::initializer_list<std::string_view> known) {
    const std::string fault = fault_of(config, known);
    if (const auto c = find(comm); c && !fault.empty()) return c->fail(ncclInvalidArgument, fault);
    return sum(name, call, op, comm, stream, config ? config->algSelection : nullptr);
}
}  // namespace
ncclResult_t ncclAllReduceConfig(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                                 ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t* config) {
    return configured("ncclAllReduce", call_of(Kind::all_reduce, send, recv, count, type), op, comm, stream, config,
                      {"RING", "TREE", "NVLS"});
}
ncclResult_t ncclReduceScatterConfig(const void* send, void* recv, size_t n_recv, ncclDataType_t type, ncclRedOp_t op,
                                     ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t* config) {
    return configured("ncclReduceScatter", call_of(Kind::reduce_scatter, send, recv, n_recv, type), op, comm, stream,
                      config, {"RING", "PAT", "NVLS"});
}
#endif
ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
    Call call = call_of(Kind::broadcast, send, recv, count, type);
    call.root = root;
    return collective("ncclBroadcast", call, comm, stream);
}
ncclResult_t ncclAllGather(const void* send, void* recv, size_t n_send, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
    return collective("ncclAllGather", call_of(Kind::all_gather, send, recv, n_send, type), comm, stream);
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
    const Call call{.kind = Kind::group, .type = whole.type, .parts = whole.parts};
    return give_to_stream(std::make_shared<Op>(call, whole.c), "ncclGroupEnd", whole.stream);
}
