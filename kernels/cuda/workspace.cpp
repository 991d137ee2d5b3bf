// The scratch memory of the streams that compute: allocated at a stream's first use, freed when the stream is closed.
#include <map>

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/gemm.h"
#include "kernels/owners.h"

namespace {
struct Workspace {
    DeviceBuffer ops;   // (kWorkspaceBytes) u8
    DeviceBuffer gemm;  // (gemm_workspace_bytes()) u8
    explicit Workspace(const Backend& k) : ops(k, cuda::kWorkspaceBytes), gemm(k, cuda::gemm_workspace_bytes()) {}
};
// Never destroyed: at exit the driver may be gone before static objects are.
std::map<Stream, Workspace>& workspaces() {
    static auto& all = *new std::map<Stream, Workspace>;
    return all;
}
const Workspace& workspace_of(Stream s) { return workspaces().try_emplace(s, cuda_backend()).first->second; }
}  // namespace

namespace cuda {
void take_workspace(Stream s) { workspace_of(s); }
void give_back_workspace(Stream s) {
    if (!workspaces().contains(s)) return;
    cudaStreamSynchronize(s);  // its work may still use the memory
    workspaces().erase(s);
}

Buf workspace_bytes(Stream s, size_t n_bytes, const char* op) {
    CHECK_THAT(n_bytes <= kWorkspaceBytes, "{} needs {} bytes of scratch, the workspace has {}", op, n_bytes,
               kWorkspaceBytes);
    return Buf(workspace_of(s).ops.get(), n_bytes, DType::u8);
}

size_t gemm_workspace_bytes() {
    static const size_t n_bytes = [] {
        int ordinal = 0;
        cudaDeviceProp properties{};
        CUDA_CHECK(cudaGetDevice(&ordinal));
        CUDA_CHECK(cudaGetDeviceProperties(&properties, ordinal));
        return gemm_workspace_size(properties.totalGlobalMem);
    }();
    return n_bytes;
}
Buf gemm_workspace(Stream s) { return Buf(workspace_of(s).gemm.get(), gemm_workspace_bytes(), DType::u8); }
}  // namespace cuda
