// The emulated runtime's streams and events, and when their operations run.
//
//   late    an operation runs when the host waits for it or for one that comes after it; of independent streams the
//           newest runs first.  A query runs one operation, so a host that polls makes progress.
//   eager   at the call             random   some operations at every call, by the emulator's seed
#include "cuda_state.h"

#include <algorithm>
#include <stdexcept>

namespace emulator::runtime {
thread_local bool t_inside_op = false;

namespace {
constexpr size_t kQueueLimit = 1024;  // as on hardware, the host waits when a stream holds more

// The first operation that has to run before `goal` can.
OpPtr first_before(OpPtr goal) {
    for (;;) {
        const OpPtr front = goal->stream->queue.front();
        goal = nullptr;
        for (const OpPtr& before : front->after)
            if (!before->done) goal = before;
        if (!goal) return front;
    }
}

// Runs an operation whose predecessors are all done; false: the operation is not ready yet.
bool execute(State& s, const OpPtr& op) {
    if (!s.memory_is_open) open_memory(s);
    bool done = true;
    t_inside_op = true;
    std::string failure;
    try {
        done = op->work();
    } catch (const std::exception& e) {
        failure = e.what();
        if (failure.empty()) failure = "unknown";
    }
    t_inside_op = false;
    if (!failure.empty()) fault(s, cudaErrorLaunchFailure, failure);
    if (!done || op->done) return done;
    op->done = true;
    op->work = nullptr;
    op->after.clear();
    op->stream->queue.pop_front();
    return true;
}

// Runs one operation of any stream of `device` (of any device where `device` is negative); false: none is ready.
bool step_any(State& s, int device) {
    const size_t n = s.streams.size(), start = machine().mode == StreamMode::random && n ? s.draw() % n : 0;
    for (size_t i = 0; i < n; i++) {
        CUstream_st& stream = *s.streams[(n - 1 - i + start) % n];
        if (stream.queue.empty() || (device >= 0 && stream.device != device)) continue;
        if (execute(s, first_before(stream.queue.front()))) return true;
    }
    return false;
}
bool idle(const State& s, int device) {
    for (const auto& stream : s.streams)
        if (stream->device == device && !stream->queue.empty()) return false;
    return true;
}
void let_others_run(State& s) {
    s.mutex.unlock();
    std::this_thread::yield();
    s.mutex.lock();
}
// A query takes one step towards `goal`: a device would have made progress meanwhile.
cudaError_t query(State& s, const OpPtr& goal) {
    if (goal && !goal->done) execute(s, first_before(goal));
    if (s.sticky != cudaSuccess) return s.sticky;
    return !goal || goal->done ? cudaSuccess : cudaErrorNotReady;
}
}  // namespace

CUstream_st* find_stream(State& s, cudaStream_t handle) {
    if (!handle) {
        CUstream_st*& null_stream = s.null_streams[current_device()];
        if (!null_stream) {
            s.streams.push_back(std::make_unique<CUstream_st>());
            null_stream = s.streams.back().get();
            null_stream->device = current_device();
            null_stream->is_null = true;
        }
        return null_stream;
    }
    for (const auto& stream : s.streams)
        if (stream.get() == handle && !stream->destroyed && !stream->is_null) return handle;
    explain(cudaErrorInvalidResourceHandle, "not a stream, or one that has been destroyed");
    return nullptr;
}
CUevent_st* find_event(State& s, cudaEvent_t handle) {
    for (const auto& event : s.events)
        if (event.get() == handle) return handle;
    explain(cudaErrorInvalidResourceHandle, "not an event, or one that has been destroyed");
    return nullptr;
}

cudaError_t enqueue(State& s, CUstream_st& stream, Work work, OpPtr after) {
    if (stream.capture) {
        Capture& c = *stream.capture;
        if (c.invalid) return cudaErrorStreamCaptureInvalidated;
        std::vector<size_t>& ends = c.ends[&stream];
        c.nodes.push_back({std::move(work), std::exchange(ends, {c.nodes.size()})});
        return cudaSuccess;
    }
    const auto op = std::make_shared<Op>();
    op->work = std::move(work);
    op->stream = &stream;
    if (after && !after->done) op->after.push_back(std::move(after));
    for (const auto& other : s.streams) {  // the default stream and the streams that join it wait for each other
        const bool joined = stream.is_null ? other->joins_null : stream.joins_null && other->is_null;
        if (!joined || other.get() == &stream || other->device != stream.device) continue;
        if (other->capture)
            return spoil(*other->capture, cudaErrorStreamCaptureImplicit,
                         "the default stream would wait for a stream that is being captured");
        if (other->last && !other->last->done) op->after.push_back(other->last);
    }
    stream.queue.push_back(op);
    stream.last = op;
    if (machine().mode == StreamMode::eager) run_until(s, op);
    if (stream.queue.size() > kQueueLimit) run_until(s, OpPtr(stream.queue.front()));
    return s.sticky;
}

void run_until(State& s, const OpPtr& goal) {
    while (!goal->done)
        if (!execute(s, first_before(goal)) && !step_any(s, -1)) let_others_run(s);
}
void run_all(State& s, int device) {
    while (!idle(s, device))
        if (!step_any(s, device)) let_others_run(s);
}
void run_some(State& s) {
    if (machine().mode != StreamMode::random) return;
    while (s.draw() % 2 && step_any(s, -1)) {}
}

}  // namespace emulator::runtime

using namespace emulator::runtime;
using emulator::machine;
using emulator::StreamMode;

namespace emulator {
cudaError_t enqueue_polled(cudaStream_t handle, std::function<bool()> work) {
    return call([&](State& s) {
        CUstream_st* const stream = find_stream(s, handle);
        return stream ? enqueue(s, *stream, std::move(work)) : cudaErrorInvalidResourceHandle;
    });
}
cudaError_t enqueue_host(cudaStream_t stream, std::function<void()> work) {
    return enqueue_polled(stream, [work = std::move(work)] { return work(), true; });
}
}  // namespace emulator

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
    return call([&](State& s) -> cudaError_t {
        if (!handle || flags > cudaStreamNonBlocking) return explain(cudaErrorInvalidValue, "stream flags");
        std::erase_if(s.streams, [](const auto& old) { return old->destroyed && old->queue.empty(); });
        s.streams.push_back(std::make_unique<CUstream_st>());
        CUstream_st& stream = *s.streams.back();
        stream.device = current_device();
        stream.joins_null = !(flags & cudaStreamNonBlocking);
        *handle = &stream;
        return cudaSuccess;
    });
}
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    return call([&](State& s) -> cudaError_t {
        CUstream_st* const stream = handle ? find_stream(s, handle) : nullptr;
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (stream->capture)
            return spoil(*stream->capture, cudaErrorStreamCaptureUnsupported, "cudaStreamDestroy of a captured stream");
        stream->destroyed = true;  // its operations still run
        return cudaSuccess;
    });
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    return call([&](State& s) -> cudaError_t {
        CUstream_st* const stream = find_stream(s, handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (stream->capture) return spoil(*stream->capture, cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize");
        std::vector<OpPtr> goals{stream->last};
        if (stream->is_null)  // a wait for the default stream is a wait for all streams that join it
            for (const auto& other : s.streams)
                if (other->joins_null && other->device == stream->device) goals.push_back(other->last);
        for (const OpPtr& goal : goals)
            if (goal) run_until(s, goal);
        return s.sticky;
    });
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
    return call([&](State& s) -> cudaError_t {
        CUstream_st* const stream = find_stream(s, handle);
        if (!stream) return cudaErrorInvalidResourceHandle;
        if (stream->capture) return spoil(*stream->capture, cudaErrorStreamCaptureUnsupported, "cudaStreamQuery");
        return query(s, OpPtr(stream->last));
    });
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned flags) {
    return call([&](State& s) -> cudaError_t {
        CUstream_st* const stream = find_stream(s, handle);
        CUevent_st* const event = find_event(s, event_handle);
        if (!stream || !event) return cudaErrorInvalidResourceHandle;
        if (flags) return explain(cudaErrorInvalidValue, "flags of cudaStreamWaitEvent");
        if (event->capture) {
            if (std::find(s.captures.begin(), s.captures.end(), event->capture) == s.captures.end())
                return explain(cudaErrorCapturedEvent, "the event was recorded in a capture that has ended");
            if (stream->is_null)
                return spoil(*event->capture, cudaErrorStreamCaptureImplicit, "the default stream cannot be captured");
            if (stream->capture && stream->capture != event->capture)
                return spoil(*event->capture, cudaErrorStreamCaptureMerge, "two captures would become one");
            stream->capture = event->capture;
            std::vector<size_t>& ends = stream->capture->ends[stream];
            ends.insert(ends.end(), event->capture_ends.begin(), event->capture_ends.end());
            return cudaSuccess;
        }
        if (stream->capture)
            return spoil(*stream->capture, cudaErrorStreamCaptureIsolation, "a wait for an event outside the capture");
        if (!event->op) return cudaSuccess;  // never recorded
        return enqueue(
            s, *stream, [] { return true; }, event->op);
    });
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
    return emulator::enqueue_host(stream, [=] { function(argument); });
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
    return call([&](State& s) -> cudaError_t {
        if (!handle || flags > (cudaEventBlockingSync | cudaEventDisableTiming))
            return explain(cudaErrorInvalidValue, "event flags");
        s.events.push_back(std::make_unique<CUevent_st>());
        *handle = s.events.back().get();
        (*handle)->device = current_device();
        (*handle)->timed = !(flags & cudaEventDisableTiming);
        return cudaSuccess;
    });
}
cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    return call([&](State& s) -> cudaError_t {
        if (!find_event(s, handle)) return cudaErrorInvalidResourceHandle;
        std::erase_if(s.events, [&](const auto& event) { return event.get() == handle; });
        return cudaSuccess;
    });
}
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
    return call([&](State& s) -> cudaError_t {
        CUevent_st* const event = find_event(s, handle);
        CUstream_st* const stream = find_stream(s, stream_handle);
        if (!event || !stream) return cudaErrorInvalidResourceHandle;
        if (event->device != stream->device)
            return explain(cudaErrorInvalidResourceHandle, "the event and the stream belong to different devices");
        if (stream->capture) {
            if (stream->capture->invalid) return cudaErrorStreamCaptureInvalidated;
            event->capture = stream->capture;
            event->capture_ends = stream->capture->ends[stream];
            return cudaSuccess;
        }
        const auto at = std::make_shared<std::chrono::steady_clock::time_point>();
        const cudaError_t error = enqueue(s, *stream, [at, &s] { return *at = s.now(), true; });
        if (error != cudaSuccess) return error;
        event->capture = nullptr;
        event->at = at;
        event->op = stream->last;
        return cudaSuccess;
    });
}
// An external record in a capture becomes a node of the graph, which records the event whenever the graph runs.  A wait
// for the event between the graph's launch and its run finds the record before.
cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned flags) {
    if (flags == cudaEventRecordDefault) return cudaEventRecord(handle, stream_handle);
    return call([&](State& s) -> cudaError_t {
        CUevent_st* const event = find_event(s, handle);
        CUstream_st* const stream = find_stream(s, stream_handle);
        if (!event || !stream) return cudaErrorInvalidResourceHandle;
        if (flags != cudaEventRecordExternal || !stream->capture)
            return explain(cudaErrorInvalidValue, "an external record is for a stream that is being captured");
        return enqueue(s, *stream, [&s, event] {
            const bool there = std::ranges::any_of(s.events, [&](const auto& e) { return e.get() == event; });
            if (!there) throw std::runtime_error("a graph records an event that has been destroyed");
            event->capture = nullptr;
            event->at = std::make_shared<std::chrono::steady_clock::time_point>(s.now());
            event->op = std::make_shared<Op>();
            event->op->done = true;
            return true;
        });
    });
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    return call([&](State& s) -> cudaError_t {
        CUevent_st* const event = find_event(s, handle);
        if (!event) return cudaErrorInvalidResourceHandle;
        if (event->capture) return spoil(*event->capture, cudaErrorCapturedEvent, "cudaEventSynchronize");
        if (event->op) run_until(s, OpPtr(event->op));
        return s.sticky;
    });
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
    return call([&](State& s) -> cudaError_t {
        CUevent_st* const event = find_event(s, handle);
        if (!event) return cudaErrorInvalidResourceHandle;
        if (event->capture) return spoil(*event->capture, cudaErrorCapturedEvent, "cudaEventQuery");
        if (const cudaError_t error = refuse_in_capture(s, "cudaEventQuery"); error != cudaSuccess) return error;
        return query(s, OpPtr(event->op));
    });
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from_handle, cudaEvent_t to_handle) {
    return call([&](State& s) -> cudaError_t {
        CUevent_st *const from = find_event(s, from_handle), *const to = find_event(s, to_handle);
        if (!from || !to) return cudaErrorInvalidResourceHandle;
        if (!ms) return explain(cudaErrorInvalidValue, "no place for the time");
        if (from->capture || to->capture) return explain(cudaErrorCapturedEvent, "its time was never taken");
        if (!from->timed || !to->timed || !from->op || !to->op)
            return explain(cudaErrorInvalidResourceHandle, "an event without timing, or never recorded");
        if (!from->op->done || !to->op->done) return cudaErrorNotReady;
        *ms = std::chrono::duration<float, std::milli>(*to->at - *from->at).count();
        return cudaSuccess;
    });
}
