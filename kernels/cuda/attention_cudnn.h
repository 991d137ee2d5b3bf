// Attention by cuDNN 9, through the headers of cudnn-frontend: a yardstick for our own kernels in the same binary.
//
//   takes      bf16 without dropout, heads of 64 and 128, T > 1; everything else goes to the portable kernels
//   shapes     as in attention.cu: cuDNN is told the strides of packed qkv and dqkv, nothing is copied
//   lse        cuDNN's "stats" (B, NH, T, 1) f32 are the log-sum-exp of the scaled scores that ops.h wants: its softmax
//              node is max + LOG(sum of EXP(score - max)), both natural, and its backward takes them back by EXP
//   memory     a workspace per shape and direction, from the first call on and until the process ends.  A deterministic
//              backward may want B*NH*T*T*2 bytes (cuDNN then writes all of ds): 3.2 GB for 16 sequences of GPT-2 124M.
//              AttentionGrad.scratch is not used.
//   order      cuDNN's own.  Bits are those of one version of it on one kind of GPU, run to run; not with `fastest`.
//   streams    the workspaces belong to the one compute stream.  The first call of a shape allocates and compiles.
//
// libcudnn.so.9 is loaded when it is first asked for: a binary that was built with it starts without.
#pragma once
#include "kernels/ops.h"

namespace cuda {
void attention_cudnn_forward(const Attention&, Stream);
void attention_cudnn_backward(const AttentionGrad&, Stream);
void attention_cudnn_backward_fastest(const AttentionGrad&, Stream);  // bits may differ from run to run
// Why not, and what to do about it; empty: they can run.
std::string attention_cudnn_refusal(bool deterministic);
}  // namespace cuda
