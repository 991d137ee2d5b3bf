// The attention ops of the CUDA backend, one pair per kind of kernel (AttentionKernel in kernels/ops.h), and the checks
// that all of them begin with.
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

inline void expect_aligned(const char* what, const Buf& b) {
    CHECK_THAT(reinterpret_cast<uintptr_t>(b.data) % 16 == 0, "{} does not start on a 16-byte boundary", what);
}
// Error(Exit::internal) for a tensor of a wrong size or, where `aligned`, off the 16-byte boundary.
inline void expect_attention(const Attention& a, bool aligned) {
    const size_t BT = size_t(a.B) * a.T, C = size_t(a.NH) * a.HS;
    expect_size("attention.y", a.y, BT * C, "B*T*NH*HS");
    expect_size("attention.lse", a.lse, BT * a.NH, "B*NH*T");
    expect_size("attention.qkv", a.qkv, BT * 3 * C, "B*T*3*NH*HS");
    if (aligned) expect_aligned("attention.y", a.y), expect_aligned("attention.qkv", a.qkv);
}
inline void expect_attention(const AttentionGrad& a, bool aligned) {
    const size_t BT = size_t(a.B) * a.T, C = size_t(a.NH) * a.HS;
    expect_size("attention.dqkv", a.dqkv, BT * 3 * C, "B*T*3*NH*HS");
    expect_size("attention.dy", a.dy, BT * C, "B*T*NH*HS");
    expect_size("attention.qkv", a.qkv, BT * 3 * C, "B*T*3*NH*HS");
    expect_size("attention.y", a.y, BT * C, "B*T*NH*HS");
    expect_size("attention.lse", a.lse, BT * a.NH, "B*NH*T");
    expect_size("attention.scratch", a.scratch, BT * a.NH, "B*NH*T");
    if (!aligned) return;
    expect_aligned("attention.dqkv", a.dqkv), expect_aligned("attention.dy", a.dy);
    expect_aligned("attention.qkv", a.qkv), expect_aligned("attention.y", a.y);
}
}  // namespace cuda
