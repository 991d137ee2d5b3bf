// Stand-in for NCCL in the emulated build: moves the ranks' emulated device memory by MPI.
//
//   A call is work on the emulated stream, done when the streams of all ranks have reached it; a stream advances only
//   while its host looks at it.  Before any data moves, the ranks exchange name, counts and types of the call; a
//   difference is an error of the communicator on every rank, with a text that quotes both sides.
//   Only non-blocking communicators: a call takes up to three looks at ncclCommGetAsyncError to end.  Until then the
//   call is not on the stream, and the next call is refused.
//   Buffers must be device memory.  Two ranks with one device are refused.
//   ncclAllReduce and ncclReduceScatter add every shard in a ring's order, which differs from shard to shard and from
//   kiln's own sums.  Where NCCL_ALGO allows NVLS, the order also differs from call to call, as in a switch that adds.
//   Groups hold sends and receives only, of one type on one stream.  Only the ranks of its messages call a group.
//   ncclCommAbort ends the communicator's work on the stream at once, and returns when no graph holds calls of the
//   communicator.  Any thread may call ncclCommAbort.  The next communicator drains the MPI messages left under way.
//
// Faults for tests: KILN_EMULATOR_NCCL_FAIL=<n> ends a communicator's n-th call (making the communicator is the first)
// with ncclRemoteError; KILN_EMULATOR_NCCL_HANG=<n> never ends it.  In both cases the rank takes no part in the call,
// so that the other ranks wait.  KILN_EMULATOR_NCCL_FAIL_RUN=<n> fails the n-th time that the stream reaches a call,
// replays of a graph included.
//
// Messages are point-to-point in MPI_COMM_WORLD with tags that nothing else uses: a rank can drop whatever it leaves
// undone, and no MPI call waits for others.
#include <cuda_runtime.h>
#include <nccl_emulator.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "common/hash.h"
#include "nccl_state.h"

namespace emulator::nccl {
namespace {
constexpr int kFirstTag = 16384, kTags = 16384;  // MPI promises tags up to 32767

struct UniqueId {
    char magic[8];
    int root, number;  // rank in MPI_COMM_WORLD, how many ids that rank made before
};
constexpr char kMagic[8] = "kilnfnc";

// State that two threads may touch.
struct Shared {
    std::mutex mutex;
    std::vector<std::shared_ptr<ncclComm>> live, abandoned;
};
Shared& shared() {
    static Shared s;
    return s;
}

// Receives and drops messages to communicators that this rank has aborted: nobody else will ask for them.
void drain_abandoned() {
    std::vector<std::shared_ptr<ncclComm>> all;
    {
        const std::lock_guard lock(shared().mutex);
        all = shared().abandoned;
    }
    for (const auto& c : all) {
        c->setup.drop();
        for (;;) {
            int there = 0, n_bytes = 0;
            MPI_Status status;
            PMPI_Iprobe(MPI_ANY_SOURCE, c->tag, MPI_COMM_WORLD, &there, &status);
            if (!there) break;
            PMPI_Get_count(&status, MPI_BYTE, &n_bytes);
            std::vector<char> bin(static_cast<size_t>(n_bytes));
            PMPI_Recv(bin.data(), n_bytes, MPI_BYTE, status.MPI_SOURCE, c->tag, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        }
    }
}
// NCCL_ALGO is a list of algorithms, "Ring,Tree", or, behind "^", of those that may not be taken.
bool allows(const std::string& algorithm) {
    const char* set = std::getenv("NCCL_ALGO");
    if (!set) return true;
    std::string list = set;
    const bool excludes = list.starts_with('^');
    list = "," + list.substr(excludes) + ",";
    return (list.find("," + algorithm + ",") != std::string::npos) != excludes;
}
}  // namespace

int number_in(const char* variable) {
    const char* text = std::getenv(variable);
    return text ? std::atoi(text) : 0;
}

std::shared_ptr<ncclComm> find(ncclComm_t c) {
    const std::lock_guard lock(shared().mutex);
    for (const auto& l : shared().live)
        if (l.get() == c) return l;
    return nullptr;
}
void record(const char* name, size_t count, const char* type) {
    const std::lock_guard lock(shared().mutex);
    emulator::nccl_calls().push_back({name, count, type});
}
}  // namespace emulator::nccl
using namespace emulator::nccl;

bool ncclComm::faulty() {
    if (number_in("KILN_EMULATOR_NCCL_FAIL") == n_calls) {
        fail(ncclRemoteError, "fault injected at call " + std::to_string(n_calls));
        return true;
    }
    hung = number_in("KILN_EMULATOR_NCCL_HANG") == n_calls;
    if (hung) state = ncclInProgress;
    return hung;
}

void ncclComm::check_members() {
    for (int r = 0; r < size; r++) {
        const Member& m = members[size_t(r)];
        if (m.rank != r || m.n_ranks != size) {
            fail(ncclInvalidArgument, "ranks that disagree about their numbers, or how many they are");
            return;
        }
        for (int other = 0; other < r; other++)
            if (std::strcmp(m.device, members[size_t(other)].device) == 0) {
                fail(ncclInvalidUsage, "Duplicate GPU detected: rank " + std::to_string(r) + " and rank " +
                                           std::to_string(other) + " both on " + m.device);
                return;
            }
    }
    made = true;
    state = ncclSuccess;
}

// Members report to the root, which sends the list to all.
void ncclComm::advance_setup() {
    if (!setup.done()) return;
    if (!collecting) return check_members();
    collecting = false;
    std::ranges::sort(members, {}, &Member::rank);
    for (const Member& m : members)
        if (m.world_rank != root) setup.send(members.data(), sizeof(Member) * members.size(), m.world_rank, tag);
}

void ncclComm::advance() {
    if (state != ncclInProgress || hung) return;
    if (!made) return advance_setup();
    if (looks > 0 && --looks > 0) return;
    state = ncclSuccess;
    if (at_end) std::exchange(at_end, nullptr)();
}

ncclResult_t ncclComm::begin(const char* name, std::function<void()> work) {
    if (state == ncclInProgress)
        return fail(ncclInvalidArgument, std::string(name) + " before the call before it has ended");
    if (state != ncclSuccess) return state;
    n_calls++;
    if (faulty()) return ncclInProgress;
    at_end = std::move(work);
    looks = int(hash_word(uint64_t(n_calls), uint32_t(rank)) % 4);
    state = ncclInProgress;
    if (looks == 0) advance();
    return state;
}

std::vector<emulator::NcclCall>& emulator::nccl_calls() {
    static std::vector<NcclCall> calls;
    return calls;
}

ncclResult_t ncclGetVersion(int* version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    static int n_made = 0;
    UniqueId own{};
    std::memcpy(own.magic, kMagic, sizeof kMagic);
    PMPI_Comm_rank(MPI_COMM_WORLD, &own.root);
    own.number = n_made++;
    std::memset(id, 0, sizeof *id);
    std::memcpy(id->internal, &own, sizeof own);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int n_ranks, ncclUniqueId id, int rank, ncclConfig_t* config) {
    record("ncclCommInitRankConfig");
    drain_abandoned();
    *comm = nullptr;
    UniqueId own{};
    std::memcpy(&own, id.internal, sizeof own);
    const bool good_config = config && config->size == sizeof(ncclConfig_t) && config->magic == 0xcafebeef;
    if (std::memcmp(own.magic, kMagic, sizeof kMagic) != 0 || n_ranks < 1 || rank < 0 || rank >= n_ranks ||
        !good_config || config->blocking != 0)
        return ncclInvalidArgument;
    const auto c = std::make_shared<ncclComm>();
    {
        const std::lock_guard lock(shared().mutex);
        shared().live.push_back(c);
    }
    *comm = c.get();
    int world_rank = 0, world_size = 1, ordinal = 0;
    PMPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
    PMPI_Comm_size(MPI_COMM_WORLD, &world_size);
    c->rank = rank, c->size = n_ranks, c->root = own.root;
    c->by_switch = allows("NVLS") || allows("NVLSTree");
    c->tag = kFirstTag + int((int64_t(own.number) * world_size + own.root) % kTags);
    if (c->faulty()) return ncclInProgress;
    Member me{.rank = rank, .n_ranks = n_ranks, .world_rank = world_rank, .device = {}};
    gethostname(me.device, 64);
    std::strcat(me.device, " ");
    if (cudaGetDevice(&ordinal) != cudaSuccess ||
        cudaDeviceGetPCIBusId(me.device + std::strlen(me.device), 32, ordinal) != cudaSuccess)
        return c->fail(ncclUnhandledCudaError, "no device");
    c->members.resize(size_t(n_ranks));
    c->collecting = world_rank == own.root;
    if (c->collecting) {
        c->members[0] = me;
        for (int i = 1; i < n_ranks; i++) c->setup.recv(&c->members[size_t(i)], sizeof me, MPI_ANY_SOURCE, c->tag);
    } else {
        PMPI_Send(&me, sizeof me, MPI_BYTE, own.root, c->tag, MPI_COMM_WORLD);  // short: it does not wait
        c->setup.recv(c->members.data(), sizeof me * size_t(n_ranks), own.root, c->tag);
    }
    return ncclInProgress;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
    record("ncclCommFinalize");
    const auto c = find(comm);
    return c ? c->begin("ncclCommFinalize", nullptr) : ncclInvalidArgument;
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    record("ncclCommDestroy");
    const auto c = find(comm);
    if (!c) return ncclInvalidArgument;
    c->destroyed = true;
    cudaFree(c->buffer);
    const std::lock_guard lock(shared().mutex);
    std::erase(shared().live, c);
    return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
    const auto c = find(comm);
    if (!c) return ncclInvalidArgument;
    c->at_end = nullptr;
    c->aborted = true;
    {
        const std::lock_guard lock(shared().mutex);
        std::erase(shared().live, c);
        shared().abandoned.push_back(c);
    }
    while (c->in_graphs.use_count() > 1) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    record("ncclCommAbort");
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
    const auto c = find(comm);
    if (!c) return ncclInvalidArgument;
    c->advance();
    *error = c->state;
    return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t result) {
    switch (result) {
        case ncclSuccess:
            return "no error";
        case ncclUnhandledCudaError:
            return "unhandled cuda error";
        case ncclSystemError:
            return "unhandled system error";
        case ncclInternalError:
            return "internal error";
        case ncclInvalidArgument:
            return "invalid argument";
        case ncclInvalidUsage:
            return "invalid usage";
        case ncclRemoteError:
            return "remote process exited or there was a network error";
        case ncclInProgress:
            return "operation in progress";
    }
    return "unknown result code";
}
const char* ncclGetLastError(ncclComm_t comm) {
    const auto c = find(comm);
    return c ? c->error.c_str() : "";
}
