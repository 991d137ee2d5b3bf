// kiln's make_tmap as nvcc compiles it, with a recorder in the place of the driver's function.  Host code only.
#include <cuda.h>
#include <cuda_runtime.h>

#include "emulator/test/oracle/cute.h"

namespace {
oracle::MapArguments recorded;
CUresult record(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void*, const cuuint64_t* dim,
                const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* step,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2,
                CUtensorMapFloatOOBfill fill) {
    recorded = {int(type), int(rank), int(interleave), int(swizzle), int(l2), int(fill), {}, {}, {}, {}};
    for (unsigned d = 0; d < rank; d++) {
        recorded.dim[d] = dim[d], recorded.box[d] = box[d], recorded.step[d] = step[d];
        if (d + 1 < rank) recorded.stride[d] = stride[d];
    }
    return CUDA_SUCCESS;
}
cudaError_t entry_point(const char*, void** f, unsigned, unsigned long long, cudaDriverEntryPointQueryResult*) {
    *f = reinterpret_cast<void*>(record);
    return cudaSuccess;
}
const char* error_text(cudaError_t) { return "?"; }
}  // namespace
#define cudaGetDriverEntryPointByVersion entry_point
#define cudaGetErrorString error_text
#define simt simt_native  // the program has emulated functions of the same names
#include "kernels/tensor_map.h"

namespace oracle {
MapArguments native_map(int rank, const uint64_t* dim, const uint64_t* stride, const uint32_t* box, bool swizzle,
                        int element_bytes) {
    alignas(16) static char base[16];
    simt::make_tmap(base, element_bytes, rank, dim, stride, box, swizzle);
    return recorded;
}
}  // namespace oracle

// nvcc's object registers its kernels, of which there are none, and this program has no runtime to register with.
extern "C" {
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
}
