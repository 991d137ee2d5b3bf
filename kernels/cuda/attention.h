// The attention ops of the CUDA backend, one pair per kind of kernel (AttentionKernel in kernels/ops.h).
#pragma once
#include "kernels/ops.h"

namespace cuda {
// In attention_sm90.cu.  Calls that its kernels do not take go to the portable kernels.
void attention_sm90_forward(const Attention&, Stream);
void attention_sm90_backward(const AttentionGrad&, Stream);
std::string attention_sm90_refusal();  // see cuda_attention_refusal

// In attention_cudnn.cpp.  Calls that cuDNN does not take go to the portable kernels.
void attention_cudnn_forward(const Attention&, Stream);
void attention_cudnn_backward(const AttentionGrad&, Stream);
void attention_cudnn_backward_fastest(const AttentionGrad&, Stream);  // bits may differ from run to run
std::string attention_cudnn_refusal(bool deterministic);

// The kernels in bf16 move 16 bytes at a time: Error(Exit::internal) for a tensor that does not begin at such a place.
inline void expect_aligned(const char* what, const Buf& b) {
    CHECK_THAT(reinterpret_cast<uintptr_t>(b.data) % 16 == 0, "{} does not start on a 16-byte boundary", what);
}
inline void expect_aligned(const Attention& a) {
    expect_aligned("attention.y", a.y), expect_aligned("attention.qkv", a.qkv);
}
inline void expect_aligned(const AttentionGrad& a) {
    expect_aligned("attention.dqkv", a.dqkv), expect_aligned("attention.dy", a.dy);
    expect_aligned("attention.qkv", a.qkv), expect_aligned("attention.y", a.y);
}
}  // namespace cuda
