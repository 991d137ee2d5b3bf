// The meaning of every operation, once, for every backend.  Read this first.
//
//   B batch (sequences)   T time (tokens)   C width   NH heads   HS head size   BT = B*T rows
//   V vocabulary   Vp vocabulary padded to a multiple of 128   L layers   F = 4C feed-forward width
//
// One struct per op, outputs first, named fields; each op is a free function of the struct and a stream.  `=`
// overwrites, `+=` adds.  Buffers are in the backend's memory; `real` is the computing type: f32 or bf16 (f64 in the
// double instance of the CPU backend, which is the tests' reference).  `stat` is f32 (f64 in the double instance);
// gradients of parameters are stat.  A null Buf is an absent optional argument.  Every size is checked before an op
// touches memory, for all backends by kernels/check.cpp: Error(Exit::internal).  The CPU backend also checks tokens and
// targets, Error(Exit::data).
//
// Values that change from step to step reach an op as a Buf in backend memory, never by value, so that a step can be
// captured as a graph.  No op allocates backend memory (the CPU's ops keep a little host scratch per thread).  No
// result depends on the number of threads: every op partitions its work by shape alone.
#pragma once
#include "common/arena.h"
#include "common/buf.h"
#include "common/config_words.h"

#include <string>

struct CUstream_st;
using Stream = CUstream_st*;  // a cudaStream_t; null on the CPU

// The source of a dropout mask.  An element's mask is a pure function of (seed, step, place, site, element).
// Philox key = stream_key(seed, RngStream::dropout); counter = (step, place + b, site, element / 4), word element % 4;
// the element is kept when its word is below keep_below(p), and then scaled by 1/(1-p).  b is the row of the batch.
struct DropoutMask {
    Buf where;  // (2) u32: optimizer step, place of the batch's first sequence in the global batch
    uint64_t seed = 0;
    uint32_t site = 0;  // which dropout of the model: see dropout_site()
    float p = 0;        // probability of zero; 0 switches the op's dropout off and `where` may be absent
};
enum class DropoutKind : uint32_t { embedding = 0, attention = 1, attention_residual = 2, mlp_residual = 3 };
constexpr uint32_t dropout_site(int layer, DropoutKind kind) { return uint32_t(layer) * 4 + uint32_t(kind); }

struct Embedding {  // y = wte[token] + wpe[t]
    Buf y;          // (B, T, C)  out  =
    Buf tokens;     // (B, T)     i32 in [0, V)
    Buf wte;        // (Vp, C)
    Buf wpe;        // (>= T, C)
    int B = 0, T = 0, C = 0, V = 0;
};
// dwte[v] += the sum of dy where the token is v; dwpe[t] = the sum of dy over the batch
struct EmbeddingGrad {
    Buf dwte;    // (Vp, C)    out  +=  always: the tied classifier has written dwte before
    Buf dwpe;    // (>= T, C)  out  =, or += when accumulate; with =, rows from T on become zero
    Buf dy;      // (B, T, C)
    Buf tokens;  // (B, T) i32
    Buf order;   // (B*T)  i32: rows sorted by token, equal ones in row order (common/token_order.h); CPU: may be absent
    int B = 0, T = 0, C = 0, V = 0;
    bool accumulate = false;
};

struct LayerNorm {   // y = (x - mean) * rstd * w + b, over the last axis
    Buf y;           // (BT, C)  out  =
    Buf mean, rstd;  // (BT)     out  =   stat, kept for backward
    Buf x;           // (BT, C)
    Buf w;           // (C)
    Buf b;           // (C) or absent
    int BT = 0, C = 0;
    float eps = 1e-5f;
};
struct LayerNormGrad {
    Buf dx;      // (BT, C)  out  +=, or = when overwrite_dx: the gradient of the residual stream that x belongs to
    Buf dw;      // (C)      out  =, or += when accumulate
    Buf db;      // (C)      likewise, or absent
    Buf dx_sum;  // (C)      likewise, or absent: column sums of dx as stored, the gradient of the bias of the Linear
                 //          whose output was the last one added to x
    Buf dy;      // (BT, C)
    Buf x;       // (BT, C)
    Buf w;       // (C)
    Buf mean, rstd;  // (BT) stat
    int BT = 0, C = 0;
    bool overwrite_dx = false;
    bool accumulate = false;
};

struct Linear {    // y = gelu(x w + b) + residual;  gelu and residual only where given
    Buf y;         // (BT, OC)  out  =
    Buf pre_gelu;  // (BT, OC)  out  =  x w + b, kept for backward; absent: no GELU
    Buf x;         // (BT, C)
    Buf w;         // (C, OC), or (OC, C) when w_transposed
    Buf b;         // (OC) or absent
    Buf residual;  // (BT, OC) or absent; may not be given together with pre_gelu; may be y itself
    int BT = 0, C = 0, OC = 0;
    bool w_transposed = false;
    bool fuse_gelu = true;  // false: y is, to the last bit, gelu_forward of pre_gelu as stored (on the CPU always)
};
struct LinearGrad {
    Buf dx;        // (BT, C)   out  =  dy w^T, times gelu'(pre_gelu) if pre_gelu is given; may be absent
    Buf dw;        // as w      out  =, or += when accumulate:  x^T dy
    Buf db;        // (OC)      out  =, or += when accumulate:  column sums of dy; may be absent
    Buf dy;        // (BT, OC)
    Buf x;         // (BT, C)
    Buf w;         // (C, OC), or (OC, C) when w_transposed
    Buf pre_gelu;  // (BT, C) or absent; given: x = gelu(pre_gelu), and dx is the gradient of pre_gelu
    int BT = 0, C = 0, OC = 0;
    bool w_transposed = false;
    bool accumulate = false;
};

struct Gelu {  // y = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    Buf y;     // (n)  out  =   may be x itself
    Buf x;     // (n)
};
struct GeluGrad {
    Buf dx;  // (n)  out  =  dy * gelu'(x)   may be dy itself
    Buf dy;  // (n)
    Buf x;   // (n)
};

struct Attention {        // causal: y[b,i,h] = sum_{j<=i} drop(softmax_j(q_i . k_j / sqrt(HS))) v_j
    Buf y;                // (B, T, NH, HS)     out  =
    Buf lse;              // (B, NH, T)         out  =  stat: log-sum-exp of the scaled scores, kept for backward
    Buf qkv;              // (B, T, 3, NH, HS)
    DropoutMask dropout;  // on the probabilities; element = (h*T + i)*T + j modulo 2^34 (counter word = element / 4)
    int B = 0, T = 0, NH = 0, HS = 0;
};
struct AttentionGrad {
    Buf dqkv;     // (B, T, 3, NH, HS)  out  =
    Buf dy;       // (B, T, NH, HS)
    Buf qkv;      // (B, T, 3, NH, HS)
    Buf y;        // (B, T, NH, HS)
    Buf lse;      // (B, NH, T) stat
    Buf scratch;  // (B, NH, T) stat    for sum_c dy y
    DropoutMask dropout;
    int B = 0, T = 0, NH = 0, HS = 0;
};

struct Dropout {       // y = drop(x) + residual
    Buf y;             // (B, T, C)  out  =   may be x or residual itself
    Buf x;             // (B, T, C)
    Buf residual;      // (B, T, C) or absent
    DropoutMask mask;  // element = t*C + c
    int B = 0, T = 0, C = 0;
};  // Dropout is its own backward: dx = drop(dy) with the same mask and no residual

struct CrossEntropy {  // loss = log-sum-exp(logits[0..V)) - logits[target], per row
    Buf loss;          // (BT)      out  =  stat
    Buf correct;       // (BT)      out  =  i32: 1 where the target is the (first) largest logit; may be absent
    Buf logits;   // (BT, Vp)  in: logits;  out: (softmax - onehot) * grad_scale with padded columns 0, when grad_scale
                  // != 0
    Buf targets;  // (BT)      i32 in [0, V)
    int BT = 0, V = 0, Vp = 0;
    float grad_scale = 0;  // 0: evaluation, logits stay as they are
};

struct RowSum {  // y[b] = sum_t x[b,t], in a fixed order
    Buf y;       // (B)     out  =  stat
    Buf x;       // (B, T)  stat
    int B = 0, T = 0;
};

struct Add {  // y += x: adds up gradient buffers
    Buf y;    // (n)  out  +=  stat
    Buf x;    // (n)  stat
};

struct TreeSum {  // y = the parts' sum as a balanced tree in their order, ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))
    Buf y;        // (n)         out  =   f32; may be the first part
    Buf x;        // (parts, n)  f32, destroyed; parts is a power of two
    int parts = 0;
};

struct Cast {  // y = x, rounded to nearest even
    Buf y;     // (n)  out  =   bf16 or f32
    Buf x;     // (n)  f32
};

struct Hash {  // y = sum of hash_word(i, x's word i) (common/hash.h), modulo 2^64
    Buf y;     // (2)  out  =   u32: low, high
    Buf x;     // (n)  of any dtype, a multiple of 4 bytes
};

constexpr size_t kDecayBlock = 64;  // elements of a flat buffer that share one flag of weight decay

// The moments that an optimizer keeps for every parameter: the first so many of these, which checkpoints put before the
// parameter's name.
constexpr const char* kMoments[] = {"m", "v"};
HOST_DEVICE constexpr size_t n_moments(OptimizerKind kind) {
    switch (kind) {
        case OptimizerKind::adamw:
        case OptimizerKind::adam:
            return 2;
        case OptimizerKind::sgd:
        case OptimizerKind::lion:
            return 1;
    }
    return 0;
}

// The optimizers share one struct; common/config_words.h lists them.  All moments and master parameters are f32 (f64 in
// the double instance).
//   g = grad * clip[0];   adamw: decoupled decay, p -= lr * weight_decay * p where decay[] says so
//   adam:  g += weight_decay * p where decay[] says so, then as adamw without its decay
//   sgd:   g likewise; m = momentum * m + g; p -= lr * m
//   lion:  decay as adamw; p -= lr * sign(beta1 * m + (1 - beta1) * g), with sign(0) = 0;
//          then m = beta2 * m + (1 - beta2) * g   (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms")
struct OptimizerUpdate {
    Buf param;  // (n)     out  +=  master
    Buf copy;   // (n)     out  =   bf16: param rounded, for the next forward pass; absent where param itself is used
    Buf m, v;   // (n)     out  =   first and second moment; v is absent where n_moments is 1
    Buf grad;   // (n)     of the whole global batch, before clipping
    Buf decay;  // (ceil(n/kDecayBlock))  u8: 1 where weight decay applies to this block of elements
    Buf rate;   // (3)     stat: learning rate, 1 - beta1^t, 1 - beta2^t
    Buf clip;   // (1)     stat: factor on the gradient; not finite: nothing is updated
    OptimizerKind kind = OptimizerKind::adamw;
    float beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0, momentum = 0;
};

struct GradNorm {        // norm = sqrt(sum grad^2), clip = max_norm > 0 and norm > max_norm ? max_norm / norm : 1;
                         // clip = NaN where norm is not finite: the update that reads it is skipped
    Buf norm;            // (1)  out  =  stat
    Buf clip;            // (1)  out  =  stat
    Buf grad;            // (n)  stat
    Buf scratch;         // (grad_norm_scratch(n))  out  =  stat: the sum of squares of each chunk of kGradNormChunk
    float max_norm = 0;  // 0: never clip
    // A gradient in parts, whose chunks are those of the whole, takes several calls with the whole's bits: for each part
    // one without norm and clip, which only writes scratch; then one without grad, which reads the whole's scratch.
};
constexpr size_t kGradNormChunk = size_t(1) << 16;  // elements summed by one partial
constexpr size_t grad_norm_scratch(size_t n) { return (n + kGradNormChunk - 1) / kGradNormChunk; }

// ---- The list of ops: the function's name in every backend, and the struct of its arguments.
//
// A new op is its struct above, a line here, its check (check.cpp), its cost (cost.cpp) and its function in cpu/ and in
// cuda/.  The list declares these and fills the tables of all backends, so nothing else only registers the op.  A list
// by macro is the exception to the house's rule against macros: no template makes members and functions from a name.
#define KILN_OPS(OP)                      \
    OP(embedding_forward, Embedding)      \
    OP(embedding_backward, EmbeddingGrad) \
    OP(layernorm_forward, LayerNorm)      \
    OP(layernorm_backward, LayerNormGrad) \
    OP(linear_forward, Linear)            \
    OP(linear_backward, LinearGrad)       \
    OP(gelu_forward, Gelu)                \
    OP(gelu_backward, GeluGrad)           \
    OP(attention_forward, Attention)      \
    OP(attention_backward, AttentionGrad) \
    OP(dropout, Dropout)                  \
    OP(cross_entropy, CrossEntropy)       \
    OP(row_sum, RowSum)                   \
    OP(add, Add)                          \
    OP(tree_sum, TreeSum)                 \
    OP(cast, Cast)                        \
    OP(hash, Hash)                        \
    OP(optimizer_update, OptimizerUpdate) \
    OP(grad_norm, GradNorm)

// Throws Error(Exit::internal) where an op's arguments do not fit together:
// "layernorm.x holds 32 elements, expected BT*C = 36".
#define OP_CHECK(function, Op) void check(const Op&);
KILN_OPS(OP_CHECK)
#undef OP_CHECK

// An entry of a backend's table: what all backends check, then the backend's own function.
template <class Op, void (*function)(const Op&, Stream)>
void checked(const Op& op, Stream s) {
    check(op);
    function(op, s);
}

struct Mark;   // a point in the work given to a stream
struct Graph;  // recorded work, which can be launched any number of times

struct MemoryState {                 // of a device, in bytes; all zero where unknown
    size_t n_free = 0, n_total = 0;  // other processes' memory is not free
};

// A constant table of functions, chosen at run time.  test_backend.cpp checks that no field is null.  Work given to one
// stream runs in order; the host does not wait for the work unless told to.  A null stream is the device's default one.
struct Backend {
    const char* name;
    bool host_addressable;  // the host reads and writes `memory` itself, and work is done when a call returns
    Allocator memory;       // of the device
    Allocator host_memory;  // of the host, pinned: upload from it and download to it do not wait
    Stream (*open_stream)();
    void (*close_stream)(Stream);
    // Allocates the scratch memory that a stream's ops need, else done by the first op.  close_stream frees it.
    void (*take_workspace)(Stream);
    void (*zero)(void* to, size_t n_bytes, Stream);
    // From or to host memory.  Pinned host memory must stay as it is until the stream has passed the transfer.
    void (*upload)(void* to, const void* from_host, size_t n_bytes, Stream);
    void (*download)(void* to_host, const void* from, size_t n_bytes, Stream);
    void (*copy)(void* to, const void* from, size_t n_bytes, Stream);  // inside the backend's memory
    void (*synchronize)(Stream);  // the host waits for all work given to the stream
    Mark* (*new_mark)();
    void (*free_mark)(Mark*);
    void (*set_mark)(Mark*, Stream);  // moves the mark behind all work given to the stream so far
    void (*wait_mark)(const Mark*);   // the host waits until the stream has passed the mark; not for a mark never set
    void (*wait_for)(Stream,
                     const Mark*);  // work given to the stream from now on begins when the mark has been passed
    // Work given to `s` from now on begins when `other` has done all that it was given so far.  In a recording of one of
    // the two streams the other one is recorded, too; at the end of it the recorded stream must wait for the other.
    void (*wait_for_stream)(Stream s, Stream other);
    double (*ms_between)(const Mark* from, const Mark* to);  // after wait_mark(to)
    MemoryState (*memory_state)();

    // Between begin_graph and end_graph work given to the stream is recorded, not done; launch_graph does all of it.  A
    // recording keeps the arguments as they were.  Each launch anew reads and writes host memory and sets marks (such a
    // mark counts once the host has waited for the launch).  Nothing may wait during the recording, and every recorded
    // op should have run once before.  end_graph throws when something could not be recorded; the stream is good again.
    bool (*can_record)();  // false: this backend cannot do the four below
    void (*begin_graph)(Stream);
    Graph* (*end_graph)(Stream);
    void (*launch_graph)(Graph*, Stream);
    void (*free_graph)(Graph*);

    // One for each op of the list: void (*layernorm_forward)(const LayerNorm&, Stream), and so on.
#define OP_MEMBER(function, Op) void (*function)(const Op&, Stream);
    KILN_OPS(OP_MEMBER)
#undef OP_MEMBER

    // Choices made by timing: how a GPU computes each kind of matrix product (kernels/cuda/gemm_tuning.h).  While
    // tuning is on, the first call of a kind chooses, and the outputs of that call are meaningless.  Returns the notes
    // since the last call, a line each: algorithms that were rejected.
    std::string (*tune)(bool on);
    // The choices in use, as text (common/tuning_cache.h).  The CPU makes none: "".
    std::string (*choices)();
    // Replaces all choices by those of `text`, "" for none.  Returns why they cannot be used (made for another GPU or
    // library version; then nothing has changed), or "".  A damaged text is Error(Exit::data).
    std::string (*set_choices)(const std::string& text);
};
const Backend& cpu_backend();

// The kernels that can compute attention on a GPU (kernels/cuda/attention*.cu).
enum class AttentionKernel : uint8_t {
    portable,  // for every device; the only one with dropout, with fp32, and with heads of other sizes than 64 and 128
    sm90,      // Hopper: compute capability 9.0 exactly
    cudnn,     // cuDNN's kernels, deterministic, for comparison; only where kiln was built with cuDNN
    cudnn_fastest  // cuDNN's fastest kernels, whose bits may differ from run to run: for benchmarks only
};
// The kernels other than `portable` compute bf16 with heads of these sizes and without dropout.  They give all other
// calls to `portable`.
constexpr int kFastHeadSizes[] = {64, 128};
constexpr bool is_fast_head(int HS) { return HS == kFastHeadSizes[0] || HS == kFastHeadSizes[1]; }
// The CUDA backend drives one device per process, opened before its first use (kernels/cuda/device.cpp).  A binary
// without CUDA has none of the four functions below (macro KILN_CUDA).  The tables differ in attention only.
const Backend& cuda_backend(AttentionKernel attention = AttentionKernel::portable);
// The reason why these kernels cannot run on the open device, or are not in this binary; empty: they can.  Calls that
// only `portable` takes (dropout, fp32, another head size) are no reason: they go to the portable kernels.
std::string cuda_attention_refusal(AttentionKernel attention);
// The number of usable devices; 0 on a machine without a driver, with the reason in `why`.
int cuda_device_count(std::string* why);
// open_cuda_device() opens device `ordinal` for this process.  Error(Exit::usage): not usable.
struct CudaDevice {
    std::string name;
    int ordinal = 0, capability = 0;  // 90 for 9.0
    size_t memory_bytes = 0;
    size_t workspace_bytes = 0;  // of each stream that computes
    std::string bus_id;          // tells which ranks of a host share a device
    MemoryState memory;          // after the CUDA context was made, before kiln allocated anything
};
CudaDevice open_cuda_device(int ordinal);

// One check of a size: "layernorm.x holds 32 elements, expected BT*C = 36".
inline void expect_size(const char* what, const Buf& b, size_t expected, const char* formula) {
    CHECK_THAT(b.data && b.count == expected, "{} holds {} elements, expected {} = {}", what, b.data ? b.count : 0,
               formula, expected);
}
