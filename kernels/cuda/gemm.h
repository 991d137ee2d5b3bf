// Matrix products of the CUDA backend: two calls to cuBLASLt, which can fuse bias, GELU and sums to a product.
//
// Everything is row-major without gaps.  a and b are of one dtype, f32 or bf16; c and d are of that dtype or, for bf16,
// f32.  Sums are taken in fp32 (never in TF32), parts of split sums too, and rounded once to d's dtype.
//
// The plan of a kind of product (descriptors, layouts, the algorithm) is made at its first use and kept as long as the
// process; a training step has about twenty kinds, text generation a few for each length.  A kind is the shape, the
// dtypes, the fused parts, and the alignment of the addresses up to 16 bytes.  The algorithm is the library's best
// guess, which depends on nothing but the kind, or was chosen by timing or given: gemm_tuning.h.
// One thread.  Each stream has a workspace of its own, so products of two streams may run at the same time.
#pragma once
#include <functional>

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
    Buf sums_a;        // (M) or absent  out  =  sums of a over K, of d's dtype; only c may be given too
    Buf sums_b;        // (N) or absent  out  =  likewise of b
    int M = 0, N = 0, K = 0;
    bool a_transposed = false, b_transposed = false;
};

// Computes the product.  Error(Exit::internal), with cuBLASLt's status and the shape, where bias, GELUs and sums cannot
// be fused: a row or an address off the 16-byte boundary, GELU in fp32, or no algorithm in the library.  A product
// without bias, GELUs and sums may have any size >= 1.
void gemm(const Gemm&, Stream);
// Like gemm(), but calls `apart` where fusing is impossible or was not chosen.  apart() gives the stream kernels that
// compute the same, up to rounding.  Sums are fused only where timing or a given choice says so.
void gemm_or(const Gemm& fused, Stream, const std::function<void()>& apart);

// The workspace holds an fp32 copy of d per part of a split sum.  Weight gradients of a narrow model need many parts.
constexpr size_t gemm_workspace_size(size_t device_bytes) {
    constexpr size_t kMiB = size_t(1) << 20;
    const size_t share = device_bytes / 256 / kMiB;
    return (share < 32 ? 32 : share > 256 ? 256 : share) * kMiB;
}
}  // namespace cuda
