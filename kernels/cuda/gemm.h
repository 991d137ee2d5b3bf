// Matrix products of the CUDA backend: cuBLASLt behind one call, and what it can fuse to a product.
//
// Everything is row-major without gaps.  a and b are of one dtype, f32 or bf16; c and d are of that dtype or, for bf16,
// f32.  Sums are taken in fp32 (never in TF32), parts of split sums too, and rounded once to d's dtype.
//
// What a kind of product needs (descriptors, layouts, the algorithm) is made at its first use and kept as long as the
// process; a training step has about twenty kinds, text generation a few for each length.  The choice depends on shape, dtypes and the alignment of the
// addresses up to 16 bytes, never on timing.  A stream that is being captured should meet no kind for the first time.
// One thread, one stream: products use the first kGemmWorkspaceBytes of the workspace.
#pragma once
#include "kernels/ops.h"

namespace cuda {
struct Gemm {      // d = a b + c + bias, and then at most one of the two GELUs
    Buf d;         // (M, N)  out  =
    Buf a;         // (M, K), or (K, M) when a_transposed
    Buf b;         // (K, N), or (N, K) when b_transposed
    Buf c;         // (M, N) or absent; may be d itself, but may not overlap it otherwise
    Buf bias;      // (N) or absent: added to each row
    Buf pre_gelu;  // (M, N) or absent  out  =  the sum;  d = gelu of the sum before it was rounded to pre_gelu's dtype
    Buf through_gelu;  // (M, N) or absent: d = the sum times gelu'(through_gelu)
    int M = 0, N = 0, K = 0;
    bool a_transposed = false, b_transposed = false;
};

constexpr size_t kGemmWorkspaceBytes = size_t(32) << 20;

// False, and nothing is done, where bias and GELUs cannot be fused: a row or an address off the 16-byte boundary, GELU
// in fp32, or no algorithm in the library.
bool try_gemm(const Gemm&, Stream);
// Error(Exit::internal) there, with cuBLASLt's status and the shape.  Without bias and GELUs it takes any size >= 1.
void gemm(const Gemm&, Stream);
}  // namespace cuda
