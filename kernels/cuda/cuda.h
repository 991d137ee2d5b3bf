// Shared by the CUDA backend's files: its ops, the device, error checks, the one dtype switch.  Only kernels/cuda and
// comm/nccl* see CUDA's headers.
#pragma once
#include <cuda_runtime.h>

#include "kernels/ops.h"

namespace cuda {
#define OP_FUNCTION(function, Op) void function(const Op&, Stream);
KILN_OPS(OP_FUNCTION)
#undef OP_FUNCTION

// Throws Error(Exit::internal) with the error, the call's text, and the kernels launched last (a kernel's own fault
// shows at a later call; KILN_CUDA_SYNC=1 waits after each launch and names the guilty one).  Exit::memory when memory
// ran out.
void check_cuda(cudaError_t error, const char* call);
#define CUDA_CHECK(call) ::cuda::check_cuda((call), #call)

// Notes a launch as the last one, and checks its error: of a kernel, or of a library's call that launches kernels.
void check_launch(cudaError_t error, const void* kernel);
void check_launch(cudaError_t error, const char* call);
bool waits_for_each_launch();  // KILN_CUDA_SYNC=1

// The error that a launch would end with because this binary holds no code for the open device.
cudaError_t find_code();

// Scratch memory of a stream, shared by all of its ops: the next op overwrites it.  A stream that computes has
// two pieces, allocated at its first use of either: one for kernels, one for the matrix products alone (gemm.h).
// `count` elements of T; Error(Exit::internal) when the memory is too small.
constexpr size_t kWorkspaceBytes = size_t(64) << 20;
Buf workspace_bytes(Stream s, size_t n_bytes, const char* op);
template <class T>
T* workspace(Stream s, size_t count, const char* op) {
    return static_cast<T*>(workspace_bytes(s, count * sizeof(T), op).data);
}
size_t gemm_workspace_bytes();  // the same for every stream
Buf gemm_workspace(Stream s);
void take_workspace(Stream s);  // allocates both now
void give_back_workspace(Stream s);

// Streaming multiprocessors of the open device, to size a persistent grid.  An op whose sums depend on the number of
// blocks must not use this number: bits would differ from GPU to GPU.
int n_multiprocessors();
int open_capability();  // of the open device: 90 for 9.0

// The multiprocessors' clock, in Hz, right behind the stream's work before this call; the timers are good to 0.2 %.  A
// clock that the work had lowered may have begun to rise.  Waits for the stream, and half a millisecond.
double clock_hz(Stream s);

// Calls f.operator()<float>() or <bf16>() by the dtype of an op's `real` tensors: the only dtype switch of an op.
template <class F>
void with_real(DType t, F&& f) {
    switch (t) {
        case DType::f32:
            return f.template operator()<float>();
        case DType::bf16:
            return f.template operator()<bf16>();
        default:
            fail(Exit::internal, "the CUDA backend computes in fp32 and bf16, not {}", dtype_name(t));
    }
}

// Blocks of `size` that cover n elements.
constexpr unsigned blocks_for(size_t n, size_t size) { return unsigned((n + size - 1) / size); }
}  // namespace cuda
