// The emulated runtime's graphs: operations given to a captured stream become nodes, which a launch runs in any order
// that their dependencies allow.
#include "cuda_state.h"

namespace emulator::runtime {
namespace {
// A launch in progress.
struct Run {
    std::shared_ptr<const Nodes> nodes;
    std::vector<bool> done;
    size_t n_done = 0;
};

bool ready(const Run& run, size_t i) {
    if (run.done[i]) return false;
    for (size_t before : (*run.nodes)[i].after)
        if (!run.done[before]) return false;
    return true;
}
// Runs all nodes; of several that are ready, late mode takes the last captured, eager mode the first, random mode any.
// False: a node has to wait for something outside the graph.
bool advance(Run& run) {
    const size_t n = run.nodes->size();
    while (run.n_done < n) {
        const size_t n_before = run.n_done;
        const size_t start = machine().mode == StreamMode::random ? state().draw() % n : 0;
        for (size_t i = 0; i < n && run.n_done == n_before; i++) {
            const size_t at = machine().mode == StreamMode::eager ? i : (n - 1 - i + start) % n;
            if (!ready(run, at) || !(*run.nodes)[at].work()) continue;
            run.done[at] = true;
            run.n_done++;
        }
        if (run.n_done == n_before) return false;
    }
    return true;
}

// True when the origin's next operation would come after every node of the capture.
bool all_joined(const Capture& c) {
    std::vector<bool> reached(c.nodes.size());
    const auto origin = c.ends.find(c.origin);
    if (origin != c.ends.end())
        for (size_t i : origin->second) reached[i] = true;
    bool all = true;
    for (size_t i = c.nodes.size(); i-- > 0;) {
        if (!reached[i]) all = false;
        for (size_t before : c.nodes[i].after) reached[before] = reached[before] || reached[i];
    }
    return all;
}
}  // namespace

cudaError_t spoil(Capture& c, cudaError_t error, const char* why) {
    c.invalid = true;
    return explain(error, why);
}
cudaError_t refuse_in_capture(State& s, const char* what) {
    for (const CapturePtr& c : s.captures)
        if (c->mode == cudaStreamCaptureModeGlobal ||
            (c->mode == cudaStreamCaptureModeThreadLocal && c->thread == std::this_thread::get_id()))
            return spoil(*c, cudaErrorStreamCaptureUnsupported, what);
    return cudaSuccess;
}
}  // namespace emulator::runtime

using namespace emulator::runtime;

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    return call([&](State& s) -> cudaError_t {
        CUstream_st* const stream = find_stream(s, handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (stream->is_null) return explain(cudaErrorStreamCaptureUnsupported, "the default stream");
        if (stream->capture) return spoil(*stream->capture, cudaErrorInvalidValue, "the stream is being captured");
        stream->capture = std::make_shared<Capture>();
        stream->capture->origin = stream;
        stream->capture->mode = mode;
        stream->capture->thread = std::this_thread::get_id();
        stream->capture->ends[stream];
        s.captures.push_back(stream->capture);
        return cudaSuccess;
    });
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
    return call([&](State& s) -> cudaError_t {
        if (!graph) return explain(cudaErrorInvalidValue, "no place for the graph");
        *graph = nullptr;
        CUstream_st* const stream = find_stream(s, handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (!stream->capture) return explain(cudaErrorInvalidValue, "the stream is not being captured");
        const CapturePtr c = stream->capture;
        if (c->origin != stream)
            return spoil(*c, cudaErrorStreamCaptureUnmatched, "the capture was begun on another stream");
        if (c->mode != cudaStreamCaptureModeRelaxed && c->thread != std::this_thread::get_id())
            return spoil(*c, cudaErrorStreamCaptureWrongThread, "the capture was begun by another thread");
        for (const auto& each : s.streams)
            if (each->capture == c) each->capture = nullptr;
        std::erase(s.captures, c);
        if (c->invalid) return cudaErrorStreamCaptureInvalidated;
        if (!all_joined(*c))
            return explain(cudaErrorStreamCaptureUnjoined,
                           "the origin does not wait for all work of the other streams");
        *graph = new CUgraph_st{std::move(c->nodes)};
        return cudaSuccess;
    });
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
    return call([&](State& s) -> cudaError_t {
        CUstream_st* const stream = find_stream(s, handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        *status = !stream->capture           ? cudaStreamCaptureStatusNone
                  : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                             : cudaStreamCaptureStatusActive;
        return cudaSuccess;
    });
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    return call([&](State&) -> cudaError_t {
        if (!executable || !graph) return explain(cudaErrorInvalidValue, "no graph");
        *executable = new CUgraphExec_st{std::make_shared<const Nodes>(graph->nodes)};
        return cudaSuccess;
    });
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
    return call([&](State& s) -> cudaError_t {
        CUstream_st* const stream = find_stream(s, handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (!executable) return explain(cudaErrorInvalidValue, "no graph");
        if (stream->capture) return spoil(*stream->capture, cudaErrorStreamCaptureUnsupported, "a graph in a graph");
        const auto run = std::make_shared<Run>();
        run->nodes = executable->nodes;
        run->done.resize(run->nodes->size());
        return enqueue(s, *stream, [run] { return advance(*run); });
    });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {  // earlier launches still run
    delete executable;
    return cudaSuccess;
}
