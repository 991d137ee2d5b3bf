// The table of the CUDA backend, its memory, streams and marks.  The device itself: device.cpp.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/gemm_tuning.h"

namespace {
// Throws for a failed allocation.  CUDA may refuse a size that no device has as invalid rather than as too large.
void check_alloc(cudaError_t error, size_t n_bytes, bool pinned) {
    if (error != cudaErrorMemoryAllocation && error != cudaErrorInvalidValue)
        return cuda::check_cuda(error, pinned ? "cudaMallocHost" : "cudaMalloc");
    cudaGetLastError();  // not sticky: the next launch must not report it again
    size_t n_free = 0, n_total = 0;
    cudaMemGetInfo(&n_free, &n_total);
    fail(Exit::memory,
         "out of memory: the device has {} of {} free, {} bytes ({}) asked{}; use a smaller train.micro_batch_size or "
         "model",
         human_bytes(n_free), human_bytes(n_total), n_bytes, human_bytes(n_bytes),
         pinned ? " of pinned host memory" : "");
}
void* alloc(size_t n_bytes) {
    void* p = nullptr;
    check_alloc(cudaMalloc(&p, n_bytes ? n_bytes : 1), n_bytes, false);
    return p;
}
void* alloc_host(size_t n_bytes) {
    void* p = nullptr;
    check_alloc(cudaMallocHost(&p, n_bytes ? n_bytes : 1), n_bytes, true);
    return p;
}
// Destructors call the freeing functions, which report nothing: after a sticky error or at exit no work is left.
void release(void* p) { cudaFree(p); }
void release_host(void* p) { cudaFreeHost(p); }
Stream open_stream() {
    cudaStream_t s = nullptr;
    CUDA_CHECK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    return s;
}
void close_stream(Stream s) {
    cuda::give_back_workspace(s);
    cudaStreamDestroy(s);
}
void zero(void* to, size_t n_bytes, Stream s) {
    if (n_bytes) CUDA_CHECK(cudaMemsetAsync(to, 0, n_bytes, s));
}
void upload(void* to, const void* from, size_t n_bytes, Stream s) {
    if (n_bytes) CUDA_CHECK(cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyHostToDevice, s));
}
void download(void* to, const void* from, size_t n_bytes, Stream s) {
    if (n_bytes) CUDA_CHECK(cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyDeviceToHost, s));
}
void copy(void* to, const void* from, size_t n_bytes, Stream s) {
    if (n_bytes) CUDA_CHECK(cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyDeviceToDevice, s));
}
void synchronize(Stream s) { CUDA_CHECK(cudaStreamSynchronize(s)); }

cudaEvent_t event_of(const Mark* m) { return reinterpret_cast<cudaEvent_t>(const_cast<Mark*>(m)); }
Mark* new_mark() {
    cudaEvent_t e = nullptr;
    CUDA_CHECK(cudaEventCreateWithFlags(&e, cudaEventDefault));
    return reinterpret_cast<Mark*>(e);
}
void free_mark(Mark* m) { cudaEventDestroy(event_of(m)); }
// In a recording only an external record becomes a node of the graph; a plain one would only order other nodes.
void set_mark(Mark* m, Stream s) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    CUDA_CHECK(cudaStreamIsCapturing(s, &status));
    const bool recording = status != cudaStreamCaptureStatusNone;
    CUDA_CHECK(cudaEventRecordWithFlags(event_of(m), s, recording ? cudaEventRecordExternal : cudaEventRecordDefault));
}
void wait_mark(const Mark* m) { CUDA_CHECK(cudaEventSynchronize(event_of(m))); }
void wait_for(Stream s, const Mark* m) { CUDA_CHECK(cudaStreamWaitEvent(s, event_of(m), 0)); }
void wait_for_stream(Stream s, Stream other) {
    cudaEvent_t done = nullptr;
    CUDA_CHECK(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
    cudaError_t error = cudaEventRecord(done, other);  // in a recording it only orders nodes
    if (error == cudaSuccess) error = cudaStreamWaitEvent(s, done, 0);
    cudaEventDestroy(done);  // CUDA keeps what the wait needs
    cuda::check_cuda(error, "cudaStreamWaitEvent");
}
double ms_between(const Mark* from, const Mark* to) {
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, event_of(from), event_of(to)));
    return double(ms);
}

MemoryState memory_state() {
    MemoryState m;
    CUDA_CHECK(cudaMemGetInfo(&m.n_free, &m.n_total));
    return m;
}

bool can_record() { return !cuda::waits_for_each_launch(); }
// ThreadLocal: the calls of other threads, such as NCCL's, do not concern this recording.
void begin_graph(Stream s) { CUDA_CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal)); }
Graph* end_graph(Stream s) {
    cudaGraph_t recorded = nullptr;
    cudaGraphExec_t graph = nullptr;
    CUDA_CHECK(cudaStreamEndCapture(s, &recorded));
    const cudaError_t error = cudaGraphInstantiate(&graph, recorded, 0);
    cudaGraphDestroy(recorded);
    cuda::check_cuda(error, "cudaGraphInstantiate");
    return reinterpret_cast<Graph*>(graph);
}
void launch_graph(Graph* g, Stream s) {
    cuda::check_launch(cudaGraphLaunch(reinterpret_cast<cudaGraphExec_t>(g), s), "cudaGraphLaunch");
}
void free_graph(Graph* g) { cudaGraphExecDestroy(reinterpret_cast<cudaGraphExec_t>(g)); }

constexpr Backend make_table() {
    Backend table = {
        .name = "cuda",
        .host_addressable = false,
        .memory = {.alloc = alloc, .free = release},
        .host_memory = {.alloc = alloc_host, .free = release_host},
        .open_stream = open_stream,
        .close_stream = close_stream,
        .take_workspace = cuda::take_workspace,
        .zero = zero,
        .upload = upload,
        .download = download,
        .copy = copy,
        .synchronize = synchronize,
        .new_mark = new_mark,
        .free_mark = free_mark,
        .set_mark = set_mark,
        .wait_mark = wait_mark,
        .wait_for = wait_for,
        .wait_for_stream = wait_for_stream,
        .ms_between = ms_between,
        .memory_state = memory_state,
        .can_record = can_record,
        .begin_graph = begin_graph,
        .end_graph = end_graph,
        .launch_graph = launch_graph,
        .free_graph = free_graph,
        .tune = cuda::tune,
        .choices = cuda::choices,
        .set_choices = cuda::set_choices,
    };
#define OP_ENTRY(function, Op) table.function = checked<Op, cuda::function>;
    KILN_OPS(OP_ENTRY)
#undef OP_ENTRY
    return table;
}
// The same with other kernels for attention.
template <void (*forward)(const Attention&, Stream), void (*backward)(const AttentionGrad&, Stream)>
constexpr Backend with_attention() {
    Backend table = make_table();
    table.attention_forward = checked<Attention, forward>;
    table.attention_backward = checked<AttentionGrad, backward>;
    return table;
}
}  // namespace

const Backend& cuda_backend(AttentionKernel attention) {
    static constexpr Backend portable = make_table();
    static constexpr Backend sm90 = with_attention<cuda::attention_sm90_forward, cuda::attention_sm90_backward>();
    static constexpr Backend cudnn = with_attention<cuda::attention_cudnn_forward, cuda::attention_cudnn_backward>();
    static constexpr Backend cudnn_fastest =
        with_attention<cuda::attention_cudnn_forward, cuda::attention_cudnn_backward_fastest>();
    if (const std::string why = cuda_attention_refusal(attention); !why.empty()) fail(Exit::internal, "{}", why);
    switch (attention) {
        case AttentionKernel::portable:
            return portable;
        case AttentionKernel::sm90:
            return sm90;
        case AttentionKernel::cudnn:
            return cudnn;
        case AttentionKernel::cudnn_fastest:
            return cudnn_fastest;
    }
    fail(Exit::internal, "attention kernels {} have no table", int(attention));
}

std::string cuda_attention_refusal(AttentionKernel attention) {
    switch (attention) {
        case AttentionKernel::portable:
            return "";
        case AttentionKernel::sm90:
            return cuda::attention_sm90_refusal();
        case AttentionKernel::cudnn:
            return cuda::attention_cudnn_refusal(true);
        case AttentionKernel::cudnn_fastest:
            return cuda::attention_cudnn_refusal(false);
    }
    return "these attention kernels are not in this build";
}
