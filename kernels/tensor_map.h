// Tensor maps for TMA, made by the host.  A map travels to a kernel as a SIMT_PARAM argument.
#pragma once
#include "common/error.h"
#include "kernels/simt.h"

namespace simt {
constexpr int kMaxRank = 5;

#if !SIMT_EMULATED
// Found by name at run time: a program linked against libcuda would not start where there is no driver.
inline decltype(&cuTensorMapEncodeTiled) find_encode_tiled() {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t e =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (e != cudaSuccess || !entry)
        fail(Exit::internal, "the driver has no cuTensorMapEncodeTiled: {}", cudaGetErrorString(e));
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
}
#endif

// dim[0] is the contiguous dimension; stride[d] in bytes, for d >= 1; one load or store moves one box.  Elements of
// two bytes are bf16, of four fp32.  The 128-byte swizzle needs an inner box of at most 128 bytes.
inline TensorMap make_tmap(const void* base, int element_bytes, int rank, const uint64_t* dim, const uint64_t* stride,
                           const uint32_t* box, bool swizzle128) {
    CHECK_THAT(rank >= 1 && rank <= kMaxRank, "tensor map of rank {}, allowed are 1 to {}", rank, kMaxRank);
    CHECK_THAT(element_bytes == 2 || element_bytes == 4, "tensor map of elements of {} bytes", element_bytes);
    CHECK_THAT(reinterpret_cast<uintptr_t>(base) % 16 == 0, "tensor map: the base is not aligned to 16 bytes");
    CHECK_THAT(box[0] * uint32_t(element_bytes) % 16 == 0,
               "tensor map: inner box of {} elements of {} bytes is not a multiple of 16 bytes", box[0], element_bytes);
    CHECK_THAT(!swizzle128 || box[0] * uint32_t(element_bytes) <= 128,
               "tensor map: inner box of {} elements exceeds 128 bytes", box[0]);
    for (int d = 0; d < rank; d++) {
        CHECK_THAT(box[d] >= 1 && box[d] <= 256, "tensor map: box[{}] = {}, allowed are 1 to 256", d, box[d]);
        CHECK_THAT(d == 0 || stride[d] % 16 == 0, "tensor map: stride[{}] = {} is not a multiple of 16 bytes", d,
                   stride[d]);
    }
    TensorMap m{};
#if SIMT_EMULATED
    m.base = static_cast<uint8_t*>(const_cast<void*>(base));
    m.rank = rank;
    m.element_bytes = element_bytes;
    m.swizzle = swizzle128 ? 3 : 0;
    for (int d = 0; d < rank; d++) {
        m.dim[d] = dim[d];
        m.stride[d] = d ? stride[d] : uint64_t(element_bytes);
        m.box[d] = box[d];
    }
#else
    cuuint64_t dims[kMaxRank], strides[kMaxRank];
    cuuint32_t boxes[kMaxRank], steps[kMaxRank];
    for (int d = 0; d < rank; d++) {
        dims[d] = dim[d];
        boxes[d] = box[d];
        steps[d] = 1;
        if (d) strides[d - 1] = stride[d];
    }
    static const auto encode = find_encode_tiled();
    const CUresult r =
        encode(&m, element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
               cuuint32_t(rank), const_cast<void*>(base), dims, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               swizzle128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS) fail(Exit::internal, "cuTensorMapEncodeTiled returned {}", int(r));
#endif
    return m;
}

// An (outer, inner) matrix, dense.
inline TensorMap make_tmap_2d(const void* base, int element_bytes, uint64_t inner, uint64_t outer, uint32_t box_inner,
                              uint32_t box_outer, bool swizzle128) {
    const uint64_t dim[2] = {inner, outer}, stride[2] = {0, inner * uint64_t(element_bytes)};
    const uint32_t box[2] = {box_inner, box_outer};
    return make_tmap(base, element_bytes, 2, dim, stride, box, swizzle128);
}
}  // namespace simt
