// Attention by cuDNN 9, through the headers of cudnn-frontend: a yardstick for our own kernels in the same binary.
//
//   takes      bf16 without dropout, heads of 64 and 128, T > 1; everything else goes to the portable kernels
//   shapes     as in attention.cu: cuDNN is told the strides of packed qkv and dqkv, nothing is copied
//   lse        cuDNN's "stats" (B, NH, T, 1) f32 are the log-sum-exp of the scaled scores that ops.h wants: its softmax
//              node is max + LOG(sum of EXP(score - max)), both natural, and its backward takes them back by EXP
//   memory     a workspace per shape, direction and stream, kept from the first call until the process ends.  A
//              deterministic backward may want B*NH*T*T*2 bytes (cuDNN then writes all of ds): 1.6 GB
//              for 64 sequences of GPT-2 124M.  AttentionGrad.scratch is not used.
//   order      cuDNN's own.  One version on one kind of GPU repeats its bits from run to run, except with `fastest`.
//   streams    the first call of a shape compiles, and the first one on each stream allocates
//
// libcudnn.so.9 is loaded at the first use of cuDNN: a binary that was built with cuDNN starts without the library.
//
// cuda.mk defines KILN_CUDNN where it found the headers, else KILN_CUDNN_MISSING as a text that says what is missing.
// A build over the emulator has neither.
#include "kernels/cuda/attention.h"

#ifdef KILN_CUDNN
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cmath>
#include <map>
#include <memory>
#include <string_view>
#include <tuple>
#include <unordered_map>

// The frontend finds cuDNN's functions by dlsym() in cudnn_dlhandle.  It would seek CUDA's functions in a libcudart.so
// of CUDA 12 or 13 that it loads itself, and it gives up where both exist.  Our runtime is linked statically: the two
// functions below are found before libc's and hand out our runtime.
namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;

namespace detail {
constexpr std::string_view kRuntime = "libcudart.so.13";
char runtime_is_linked;
void* const linked_runtime = &runtime_is_linked;  // stands for the handle of a loaded library

void* dlopen(const char* library, int flags) {
    if (library == kRuntime) return linked_runtime;
    if (std::string_view(library).starts_with("libcudart.so")) return nullptr;
    return ::dlopen(library, flags);
}
void* dlsym(void* library, const char* name) {
    if (library != linked_runtime) return ::dlsym(library, name);
    const std::string_view wanted = name;
    if (wanted == "cudaGetDevice") return reinterpret_cast<void*>(&cudaGetDevice);
    if (wanted == "cudaGetErrorString") return reinterpret_cast<void*>(&cudaGetErrorString);
    if (wanted == "cudaMemcpyAsync") return reinterpret_cast<void*>(&cudaMemcpyAsync);
    if (wanted == "cudaMemsetAsync") return reinterpret_cast<void*>(&cudaMemsetAsync);
    if (wanted == "cudaPointerGetAttributes") return reinterpret_cast<void*>(&cudaPointerGetAttributes);
    if (wanted == "cudaStreamSynchronize") return reinterpret_cast<void*>(&cudaStreamSynchronize);
    if (wanted == "cudaGetDeviceProperties")
        return reinterpret_cast<void*>(static_cast<cudaError_t (*)(cudaDeviceProp*, int)>(&cudaGetDeviceProperties));
    return nullptr;  // the frontend then says which name it missed
}
}  // namespace detail
}  // namespace cudnn_frontend

#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING 1
#define CUDNN_FRONTEND_SKIP_JSON_LIB 1  // its copy of nlohmann::json, for saving graphs: not needed
#include <cudnn_frontend.h>

namespace {
namespace fe = cudnn_frontend;
using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

constexpr size_t kMinVersion = 90000;
constexpr size_t kMinVersionBlackwell = 91800;  // of a deterministic backward on compute capability 10

std::string version_text(size_t v) { return fe::detail::convert_version_to_str(v); }

// Loads the library once.  Returns why that failed, or an empty text when the library is loaded.
std::string load() {
    if (fe::cudnn_dlhandle) return "";
    void* const library = ::dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return fmt::format(
            "cuDNN cannot be loaded: {}; name the folder of libcudnn.so.9 in LD_LIBRARY_PATH (the Python package "
            "nvidia-cudnn-cu13 has one)",
            ::dlerror());
    void* const version_of = ::dlsym(library, "cudnnGetVersion");
    const size_t version = version_of ? reinterpret_cast<size_t (*)()>(version_of)() : 0;
    if (version < kMinVersion) {
        ::dlclose(library);
        return fmt::format("cuDNN {} is too old: this needs {} or newer", version_text(version),
                           version_text(kMinVersion));
    }
    fe::cudnn_dlhandle = library;
    return "";
}

void check(const fe::error_t& error, const char* call) {
    if (!error.is_bad()) return;
    cudaGetLastError();  // clears an error that is not sticky: the next launch must not report it again
    fail(Exit::internal, "cuDNN {}: {} in {}", version_text(fe::detail::get_backend_version()), error.err_msg, call);
}

cudnnHandle_t handle_for(Stream s) {
    static cudnnHandle_t handle = nullptr;  // never destroyed: at exit the driver may be gone before static objects are
    const auto check_status = [](cudnnStatus_t status, const char* call) {
        if (status == CUDNN_STATUS_SUCCESS) return;
        cudaGetLastError();
        const bool memory = status == CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED ||
                            status == CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED;
        fail(memory ? Exit::memory : Exit::internal, "cuDNN: {} in {}", fe::detail::get_error_string(status), call);
    };
    if (!handle) check_status(fe::detail::create_handle(&handle), "cudnnCreate");
    check_status(fe::detail::set_stream(handle, s), "cudnnSetStream");
    return handle;
}

enum class Pass : uint8_t { forward, backward, backward_fastest };
struct Shape {
    int B, T, NH, HS;
    auto operator<=>(const Shape&) const = default;
};

// The names of a graph's tensors when the graph is run.
enum Id : int64_t { kQ = 1, kK, kV, kY, kLse, kDy, kDq, kDk, kDv };
using Pointers = std::unordered_map<int64_t, void*>;

// cuDNN's dimensions are (batch, head, time, channel) in this order; strides say how they lie in memory.
struct Layout {
    const Shape& a;
    // One tensor of a row of `parts` tensors per token: 1 for y (B, T, NH, HS), 3 for qkv (B, T, 3, NH, HS).
    fe::graph::Tensor_attributes heads(Id id, const char* name, int64_t parts) const {
        const int64_t row = parts * a.NH * a.HS;
        return fe::graph::Tensor_attributes()
            .set_uid(id)
            .set_name(name)
            .set_dim({a.B, a.NH, a.T, a.HS})
            .set_stride({a.T * row, a.HS, row, 1});
    }
    fe::graph::Tensor_attributes lse() const {
        return fe::graph::Tensor_attributes()
            .set_uid(kLse)
            .set_name("lse")
            .set_dim({a.B, a.NH, a.T, 1})
            .set_stride({int64_t(a.NH) * a.T, a.T, 1, 1})
            .set_data_type(fe::DataType_t::FLOAT);
    }
    // Gives the layout of `at` to a tensor that the graph itself has made.
    void place(const Tensor& output, const fe::graph::Tensor_attributes& at) const {
        output->set_output(true).set_uid(at.get_uid()).set_dim(at.get_dim()).set_stride(at.get_stride());
    }
};

struct Plan {
    fe::graph::Graph graph;
    int64_t workspace_bytes = 0;
    std::map<Stream, void*> workspaces;  // (workspace_bytes) u8 each
};

void describe_forward(fe::graph::Graph& graph, const Shape& a) {
    const Layout at{a};
    const auto [y, lse] = graph.sdpa(graph.tensor(at.heads(kQ, "q", 3)), graph.tensor(at.heads(kK, "k", 3)),
                                     graph.tensor(at.heads(kV, "v", 3)),
                                     fe::graph::SDPA_attributes()
                                         .set_name("attention")
                                         .set_generate_stats(true)
                                         .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
                                         .set_diagonal_band_right_bound(0)
                                         .set_attn_scale(1 / std::sqrt(float(a.HS))));
    at.place(y, at.heads(kY, "y", 1));
    at.place(lse, at.lse());
    lse->set_data_type(fe::DataType_t::FLOAT);
}

void describe_backward(fe::graph::Graph& graph, const Shape& a, bool deterministic) {
    const Layout at{a};
    const auto [dq, dk, dv] = graph.sdpa_backward(
        graph.tensor(at.heads(kQ, "q", 3)), graph.tensor(at.heads(kK, "k", 3)), graph.tensor(at.heads(kV, "v", 3)),
        graph.tensor(at.heads(kY, "y", 1)), graph.tensor(at.heads(kDy, "dy", 1)), graph.tensor(at.lse()),
        fe::graph::SDPA_backward_attributes()
            .set_name("attention backward")
            .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
            .set_diagonal_band_right_bound(0)
            .set_attn_scale(1 / std::sqrt(float(a.HS)))
            .set_deterministic_algorithm(deterministic));
    at.place(dq, at.heads(kDq, "dq", 3));
    at.place(dk, at.heads(kDk, "dk", 3));
    at.place(dv, at.heads(kDv, "dv", 3));
}

// The graph of this shape, made at its first call.
Plan& plan_for(const Shape& a, Pass pass, cudnnHandle_t handle) {
    static auto& plans = *new std::map<std::tuple<Shape, Pass>, std::unique_ptr<Plan>>;  // never freed, as the handle
    std::unique_ptr<Plan>& kept = plans[{a, pass}];
    if (kept) return *kept;
    auto plan = std::make_unique<Plan>();
    plan->graph.set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    if (pass == Pass::forward)
        describe_forward(plan->graph, a);
    else
        describe_backward(plan->graph, a, pass == Pass::backward);
    check(plan->graph.build(handle, {fe::HeurMode_t::A}), "the making of a graph");
    check(plan->graph.get_workspace_size(plan->workspace_bytes), "get_workspace_size");
    kept = std::move(plan);
    return *kept;
}

// The library is loaded here: cuda_backend() hands out a table only where attention_cudnn_refusal() is empty.
void run(const Shape& a, Pass pass, Pointers pointers, Stream s) {
    try {
        const cudnnHandle_t handle = handle_for(s);
        Plan& plan = plan_for(a, pass, handle);
        void*& workspace = plan.workspaces[s];
        if (!workspace && plan.workspace_bytes > 0)
            workspace = cuda_backend().memory.alloc(size_t(plan.workspace_bytes));
        check(plan.graph.execute(handle, pointers, workspace), "the running of a graph");
    } catch (const Error&) {
        throw;
    } catch (const std::exception& e) {  // the frontend throws for a function that this cuDNN lacks
        fail(Exit::internal, "cuDNN: {}", e.what());
    }
}

// cuDNN has no backward for T = 1, and before 9.10 no forward for T = 1 under a mask.
bool takes(DType t, const DropoutMask& dropout, const Shape& a) {
    return t == DType::bf16 && dropout.p == 0 && is_fast_head(a.HS) && a.T > 1 && a.B > 0 && a.NH > 0;
}
// The i-th of q, k, v in packed rows.
void* part(void* packed, int i, const Shape& a) { return static_cast<bf16*>(packed) + size_t(i) * a.NH * a.HS; }

void backward(const AttentionGrad& a, Pass pass, Stream s) {
    const Shape shape = {a.B, a.T, a.NH, a.HS};
    if (!takes(a.qkv.dtype, a.dropout, shape)) return cuda_backend().attention_backward(a, s);
    cuda::expect_aligned(a);
    void* const qkv = a.qkv.as<bf16>();
    void* const dqkv = a.dqkv.as<bf16>();
    run(shape, pass,
        {{kQ, part(qkv, 0, shape)},
         {kK, part(qkv, 1, shape)},
         {kV, part(qkv, 2, shape)},
         {kY, a.y.as<bf16>()},
         {kLse, a.lse.as<float>()},
         {kDy, a.dy.as<bf16>()},
         {kDq, part(dqkv, 0, shape)},
         {kDk, part(dqkv, 1, shape)},
         {kDv, part(dqkv, 2, shape)}},
        s);
}
}  // namespace

namespace cuda {
void attention_cudnn_forward(const Attention& a, Stream s) {
    const Shape shape = {a.B, a.T, a.NH, a.HS};
    if (!takes(a.qkv.dtype, a.dropout, shape)) return cuda_backend().attention_forward(a, s);
    expect_aligned(a);
    void* const qkv = a.qkv.as<bf16>();
    run(shape, Pass::forward,
        {{kQ, part(qkv, 0, shape)},
         {kK, part(qkv, 1, shape)},
         {kV, part(qkv, 2, shape)},
         {kY, a.y.as<bf16>()},
         {kLse, a.lse.as<float>()}},
        s);
}
void attention_cudnn_backward(const AttentionGrad& a, Stream s) { backward(a, Pass::backward, s); }
void attention_cudnn_backward_fastest(const AttentionGrad& a, Stream s) { backward(a, Pass::backward_fastest, s); }

std::string attention_cudnn_refusal(bool deterministic) {
    if (std::string why = load(); !why.empty()) return why;
    int device = 0, major = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
        const std::string reason = cudaGetErrorString(cudaGetLastError());
        return fmt::format("cuDNN needs a GPU: {}", reason);
    }
    const size_t version = fe::detail::get_backend_version();
    if (deterministic && major == 10 && version < kMinVersionBlackwell)
        return fmt::format("cuDNN {} has no deterministic backward for compute capability 10: install {} or newer",
                           version_text(version), version_text(kMinVersionBlackwell));
    return "";
}
}  // namespace cuda

#else

namespace cuda {
void attention_cudnn_forward(const Attention&, Stream) { fail(Exit::internal, "{}", attention_cudnn_refusal(false)); }
void attention_cudnn_backward(const AttentionGrad&, Stream) {
    fail(Exit::internal, "{}", attention_cudnn_refusal(true));
}
void attention_cudnn_backward_fastest(const AttentionGrad&, Stream) {
    fail(Exit::internal, "{}", attention_cudnn_refusal(false));
}
std::string attention_cudnn_refusal(bool) {
#ifdef KILN_CUDNN_MISSING
    return "this binary was built without cuDNN: " KILN_CUDNN_MISSING "; scripts/install_deps.sh --cudnn, then make";
#else
    return "the emulator has no cuDNN: take the portable kernels, or a GPU";
#endif
}
}  // namespace cuda
#endif
