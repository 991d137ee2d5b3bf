// Shared by the files of the emulated CUDA runtime: the state behind the calls, and how every call starts and ends.
//
// A stream is a queue of operations.  An operation runs when the host waits for it, or earlier where the stream mode
// says so, and never before its predecessor in the stream and the operations in its `after`.  All of those were issued
// earlier, so there is no cycle.  One lock guards everything; operations run under the lock, on the thread that waits.
#pragma once
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda_emulator_host.h"
#include "emulator.h"

namespace emulator::runtime {
using Work = std::function<bool()>;  // true: done; false: not yet, call it again
struct Op {
    Work work;
    std::vector<std::shared_ptr<Op>> after;
    CUstream_st* stream = nullptr;
    bool done = false;
};
using OpPtr = std::shared_ptr<Op>;

struct Node {  // an operation of a graph
    Work work;
    std::vector<size_t> after;  // indices of its predecessors
};
using Nodes = std::vector<Node>;
struct Capture {
    CUstream_st* origin = nullptr;
    cudaStreamCaptureMode mode{};
    std::thread::id thread;
    bool invalid = false;
    Nodes nodes;
    std::map<CUstream_st*, std::vector<size_t>> ends;  // by stream: the nodes that its next operation comes after
};
using CapturePtr = std::shared_ptr<Capture>;

struct Allocation {
    size_t n_bytes = 0;
    bool pinned = false;  // host memory
    int device = 0;
};
struct State {
    std::mutex mutex;
    std::map<uintptr_t, Allocation> memory;  // by address
    std::map<int, size_t> used;              // bytes, by device
    std::vector<std::unique_ptr<CUstream_st>> streams;
    std::map<int, CUstream_st*> null_streams;  // by device
    std::vector<std::unique_ptr<CUevent_st>> events;
    std::vector<CapturePtr> captures;            // in progress
    std::map<const void*, size_t> shared_limit;  // bytes of dynamic shared memory asked for, by kernel
    cudaError_t sticky = cudaSuccess;
    std::string sticky_text;
    bool memory_is_open = false;  // an ASan build lets the host touch device memory only inside operations
    uint64_t random = 0;
    uint64_t draw();
    double passed_us = 0;                         // time of the nominal clock, see Machine::has_clock
    std::chrono::steady_clock::time_point now();  // the time that an event would record now
};
State& state();  // never destroyed: calls at exit are safe

// ---- errors
// Notes what cudaGetErrorString adds to this error's text on this thread; returns the error.
cudaError_t explain(cudaError_t error, std::string text);
void set_last_error(cudaError_t error);
// Makes `error` the answer to every later call and drops all pending work.
void fault(State& s, cudaError_t error, std::string text);

// ---- operations
extern thread_local bool t_inside_op;
// The stream of a handle, or null where there is none; a null handle is the current device's default stream.
CUstream_st* find_stream(State& s, cudaStream_t handle);
CUevent_st* find_event(State& s, cudaEvent_t handle);
cudaError_t enqueue(State& s, CUstream_st& stream, Work work, OpPtr after = nullptr);
void run_until(State& s, const OpPtr& goal);  // the host waits
void run_all(State& s, int device);
void run_some(State& s);  // random mode: perhaps a few
void open_memory(State& s);
void close_memory(State& s);
int current_device();

// ---- captures
// For calls that wait or touch other streams: spoils the capture in progress that forbids such calls, and returns its
// error; cudaSuccess where there is none.
cudaError_t refuse_in_capture(State& s, const char* what);
cudaError_t spoil(Capture& c, cudaError_t error, const char* why);

// How every call starts and ends.  An operation may not call the runtime.
template <class F>
cudaError_t call(F&& f) {
    if (t_inside_op) return explain(cudaErrorNotPermitted, "a function in a stream may not call the CUDA runtime");
    State& s = state();
    const std::lock_guard<std::mutex> lock(s.mutex);
    cudaError_t error = machine().n_devices > 0 ? s.sticky : cudaErrorNoDevice;
    if (error == cudaSuccess) {
        run_some(s);
        error = s.sticky;
    }
    if (error == cudaSuccess) error = f(s);
    if (s.memory_is_open) close_memory(s);
    if (error != cudaSuccess) set_last_error(error);
    return error;
}
}  // namespace emulator::runtime

struct CUstream_st {
    int device = 0;
    bool is_null = false;
    bool joins_null = true;  // this stream and the default stream wait for each other
    bool destroyed = false;  // true: erased after its last operation
    std::deque<emulator::runtime::OpPtr> queue;
    emulator::runtime::OpPtr last;
    emulator::runtime::CapturePtr capture;
};
struct CUevent_st {
    int device = 0;
    bool timed = true;
    emulator::runtime::OpPtr op;  // the last record; null: never recorded
    std::shared_ptr<std::chrono::steady_clock::time_point> at;
    emulator::runtime::CapturePtr capture;  // the capture that the event was last recorded in, or null
    std::vector<size_t> capture_ends;       // the nodes of that capture that the event stands for
};
struct CUgraph_st {
    emulator::runtime::Nodes nodes;
};
struct CUgraphExec_st {
    std::shared_ptr<const emulator::runtime::Nodes> nodes;
};
