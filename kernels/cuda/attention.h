// The attention ops of the CUDA backend by the kernels that compute them (AttentionKernel in kernels/ops.h), and the
// checks that all of them begin with.
#pragma once
#include "kernels/ops.h"

namespace cuda {
// attention_sm90.cu.  Calls that those kernels do not take go to the portable ones.
void attention_sm90_forward(const Attention&, Stream);
void attention_sm90_backward(const AttentionGrad&, Stream);
std::string attention_sm90_refusal();  // see cuda_attention_refusal

// attention_cudnn.cpp, likewise.
void attention_cudnn_forward(const Attention&, Stream);
void attention_cudnn_backward(const AttentionGrad&, Stream);
void attention_cudnn_backward_fastest(const AttentionGrad&, Stream);  // bits may differ from run to run
std::string attention_cudnn_refusal(bool deterministic);

inline void expect_aligned(const char* what, const Buf& b) {
    CHECK_THAT(reinterpret_cast<uintptr_t>(b.data) % 16 == 0, "{} does not start on a 16-byte boundary", what);
}
// Error(Exit::internal) for a tensor of a wrong size or, where the kernels move 16 bytes at a time, of a wrong place.
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
