// cuBLASLt: one plan per kind of product, made once.
//
// cuBLASLt is column-major, where a row-major matrix is its own transpose.  So d^T = b^T a^T is asked for: the
// library's A is our b, its B our a, its m our N, and the rows of its D, which carry the bias, are our columns.
#include "kernels/cuda/gemm.h"

#include <cublasLt.h>

#include <algorithm>
#include <compare>
#include <map>
#include <memory>

#include "kernels/cuda/cuda.h"

namespace {
using cuda::Gemm;

constexpr size_t kAlign = 16;      // bytes; more gains no algorithm, less loses the vectorised ones
constexpr int kMaxAlgorithms = 8;  // asked for; the first that works is the library's best guess

cudaDataType_t type_of(const char* what, const Buf& b) {
    switch (b.dtype) {
        case DType::f32:
            return CUDA_R_32F;
        case DType::bf16:
            return CUDA_R_16BF;
        default:
            fail(Exit::internal, "gemm.{} is {}; products are of f32 and bf16", what, dtype_name(b.dtype));
    }
}

// Of an address: 2, 4, 8 or 16 bytes.  0 for an absent buffer.
uint32_t alignment(const Buf& b) {
    const uintptr_t p = reinterpret_cast<uintptr_t>(b.data);
    return p ? uint32_t(std::min(p & -p, uintptr_t(kAlign))) : 0;
}

cublasLtEpilogue_t epilogue_of(const Gemm& g) {
    if (g.through_gelu) return CUBLASLT_EPILOGUE_DGELU;
    if (g.pre_gelu) return g.bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    return g.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
}
const char* name_of(cublasLtEpilogue_t e) {
    switch (e) {
        case CUBLASLT_EPILOGUE_BIAS:
            return "BIAS";
        case CUBLASLT_EPILOGUE_GELU_AUX:
            return "GELU_AUX";
        case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
            return "GELU_AUX_BIAS";
        case CUBLASLT_EPILOGUE_DGELU:
            return "DGELU";
        default:
            return "DEFAULT";
    }
}

void check(cublasStatus_t status, const char* call) {
    if (status != CUBLAS_STATUS_SUCCESS)
        fail(Exit::internal, "cuBLASLt: {} in {}", cublasLtGetStatusName(status), call);
}
#define LT_CHECK(call) check((call), #call)

[[noreturn]] void refused(const Gemm& g, cublasStatus_t status) {
    fail(Exit::internal, "cuBLASLt: {} for M x N x K = {} x {} x {}{}{}, {} x {} -> {}, epilogue {}",
         cublasLtGetStatusName(status), g.M, g.N, g.K, g.a_transposed ? ", a transposed" : "",
         g.b_transposed ? ", b transposed" : "", dtype_name(g.a.dtype), dtype_name(g.b.dtype), dtype_name(g.d.dtype),
         name_of(epilogue_of(g)));
}

// All that the choice of an algorithm depends on.  The leading dimensions follow from the shape.
struct Key {
    int M, N, K;
    bool a_transposed, b_transposed, adds;
    DType a_type, b_type, d_type;
    cublasLtEpilogue_t epilogue;
    uint32_t align_a, align_b, align_c, align_d, align_bias, align_aux;
    auto operator<=>(const Key&) const = default;
};
// As the library wants it, C is D where nothing is added.
const Buf& added_to(const Gemm& g) { return g.c ? g.c : g.d; }
const Buf& aux_of(const Gemm& g) { return g.through_gelu ? g.through_gelu : g.pre_gelu; }
Key key_of(const Gemm& g) {
    return {.M = g.M,
            .N = g.N,
            .K = g.K,
            .a_transposed = g.a_transposed,
            .b_transposed = g.b_transposed,
            .adds = bool(g.c),
            .a_type = g.a.dtype,
            .b_type = g.b.dtype,
            .d_type = g.d.dtype,
            .epilogue = epilogue_of(g),
            .align_a = alignment(g.a),
            .align_b = alignment(g.b),
            .align_c = alignment(added_to(g)),
            .align_d = alignment(g.d),
            .align_bias = alignment(g.bias),
            .align_aux = alignment(aux_of(g))};
}

struct Plan {
    cublasStatus_t status = CUBLAS_STATUS_NOT_SUPPORTED;  // of the search; the rest is valid after a success only
    cublasLtMatmulDesc_t product = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;  // of the library's A, B and D; C is laid out as D
    cublasLtMatmulAlgo_t algorithm = {};
};

template <class T>
void set(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t attribute, const T& value) {
    LT_CHECK(cublasLtMatmulDescSetAttribute(d, attribute, &value, sizeof value));
}
template <class T>
void set(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
    LT_CHECK(cublasLtMatmulPreferenceSetAttribute(p, attribute, &value, sizeof value));
}

// The addresses that a product carries in its descriptor.  The search infers alignments from them.
void set_pointers(cublasLtMatmulDesc_t product, const Gemm& g) {
    if (g.bias) set(product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(g.bias.data));
    if (const Buf& aux = aux_of(g)) set(product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux.data);
}

// Of a matrix that is (rows, columns) in row-major memory.
cublasLtMatrixLayout_t layout(cudaDataType_t type, int rows, int columns) {
    cublasLtMatrixLayout_t l = nullptr;
    LT_CHECK(cublasLtMatrixLayoutCreate(&l, type, uint64_t(columns), uint64_t(rows), columns));
    return l;
}

cublasLtMatmulPreference_t preference(const Key& k) {
    cublasLtMatmulPreference_t p = nullptr;
    LT_CHECK(cublasLtMatmulPreferenceCreate(&p));
    set(p, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(cuda::kGemmWorkspaceBytes));
    // Parts of a split sum may meet in fp32 only.  In place they meet in d's dtype.
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    if (k.d_type == DType::f32) reductions |= CUBLASLT_REDUCTION_SCHEME_INPLACE;
    set(p, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions);
    set(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, k.align_b);
    set(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, k.align_a);
    set(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, k.align_c);
    set(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, k.align_d);
    return p;
}

Plan make_plan(cublasLtHandle_t handle, const Gemm& g, const Key& k) {
    const cudaDataType_t type_a = type_of("a", g.a), type_b = type_of("b", g.b), type_d = type_of("d", g.d);
    Plan p;
    LT_CHECK(cublasLtMatmulDescCreate(&p.product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t of_a = g.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t of_b = g.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    set(p.product, CUBLASLT_MATMUL_DESC_TRANSA, int32_t(of_a));
    set(p.product, CUBLASLT_MATMUL_DESC_TRANSB, int32_t(of_b));
    set(p.product, CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(k.epilogue));
    if (aux_of(g)) set(p.product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(g.N));
    set_pointers(p.product, g);
    p.a = layout(type_b, g.b_transposed ? g.N : g.K, g.b_transposed ? g.K : g.N);
    p.b = layout(type_a, g.a_transposed ? g.K : g.M, g.a_transposed ? g.M : g.K);
    p.d = layout(type_d, g.M, g.N);

    const cublasLtMatmulPreference_t wanted = preference(k);
    cublasLtMatmulHeuristicResult_t found[kMaxAlgorithms] = {};
    int n_found = 0;
    p.status =
        cublasLtMatmulAlgoGetHeuristic(handle, p.product, p.a, p.b, p.d, p.d, wanted, kMaxAlgorithms, found, &n_found);
    LT_CHECK(cublasLtMatmulPreferenceDestroy(wanted));
    if (p.status != CUBLAS_STATUS_SUCCESS) return p;
    p.status = CUBLAS_STATUS_NOT_SUPPORTED;
    for (int i = 0; i < n_found && p.status != CUBLAS_STATUS_SUCCESS; i++)
        if (found[i].state == CUBLAS_STATUS_SUCCESS && found[i].workspaceSize <= cuda::kGemmWorkspaceBytes) {
            p.status = CUBLAS_STATUS_SUCCESS;
            p.algorithm = found[i].algo;
        }
    return p;
}

// Of the open device.  Never destroyed: at the end of the process the driver may be gone before static objects are.
struct Library {
    cublasLtHandle_t handle = nullptr;
    std::map<Key, Plan> plans;
};
Library& library() {
    static Library& l = *[] {
        auto made = std::make_unique<Library>();
        LT_CHECK(cublasLtCreate(&made->handle));
        return made.release();
    }();
    return l;
}

// The library's own condition for the auxiliary matrix is a leading dimension that is a multiple of 8, at 16 bytes;
// whole vectors in every operand are asked for, because it is for them that its kernels with epilogues are made.
bool whole_vectors(const Gemm& g, const Key& k) {
    const size_t in = dtype_bytes(g.a.dtype), out = dtype_bytes(g.d.dtype);
    const int row_a = g.a_transposed ? g.M : g.K, row_b = g.b_transposed ? g.K : g.N;
    bool whole = row_a * in % kAlign == 0 && row_b * in % kAlign == 0 && g.N * out % kAlign == 0;
    for (uint32_t a : {k.align_a, k.align_b, k.align_c, k.align_d}) whole = whole && a == kAlign;
    for (uint32_t a : {k.align_bias, k.align_aux}) whole = whole && (a == 0 || a == kAlign);
    return whole;
}

cublasStatus_t run(const Gemm& g, Stream s) {
    CHECK_THAT(g.M > 0 && g.N > 0 && g.K > 0, "gemm: M = {}, N = {}, K = {}", g.M, g.N, g.K);
    const size_t out = size_t(g.M) * g.N;
    expect_size("gemm.d", g.d, out, "M*N");
    expect_size("gemm.a", g.a, size_t(g.M) * g.K, "M*K");
    expect_size("gemm.b", g.b, size_t(g.K) * g.N, "K*N");
    for (const Buf& same : {g.c, g.pre_gelu, g.through_gelu})
        if (same) {
            expect_size("gemm.c, .pre_gelu or .through_gelu", same, out, "M*N");
            CHECK_THAT(same.dtype == g.d.dtype, "gemm: a {} beside a {} d", dtype_name(same.dtype),
                       dtype_name(g.d.dtype));
        }
    if (g.bias) {
        expect_size("gemm.bias", g.bias, size_t(g.N), "N");
        CHECK_THAT(g.bias.dtype == g.d.dtype, "gemm: a {} bias beside a {} d", dtype_name(g.bias.dtype),
                   dtype_name(g.d.dtype));
    }
    CHECK_THAT(!g.through_gelu || (!g.pre_gelu && !g.bias), "gemm.through_gelu is given with pre_gelu or bias");

    const Key key = key_of(g);
    if (key.epilogue != CUBLASLT_EPILOGUE_DEFAULT) {
        if (!whole_vectors(g, key)) return CUBLAS_STATUS_NOT_SUPPORTED;
        if (aux_of(g) && g.d.dtype != DType::bf16) return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    Library& lib = library();
    auto at = lib.plans.find(key);
    if (at == lib.plans.end()) at = lib.plans.emplace(key, make_plan(lib.handle, g, key)).first;
    const Plan& plan = at->second;
    if (plan.status != CUBLAS_STATUS_SUCCESS) return plan.status;

    set_pointers(plan.product, g);
    void* workspace = cuda::workspace<uint8_t>(cuda::kGemmWorkspaceBytes, "gemm");
    const float one = 1, beta = g.c ? 1 : 0;
    const cublasStatus_t status =
        cublasLtMatmul(lib.handle, plan.product, &one, g.b.data, plan.a, g.a.data, plan.b, &beta, added_to(g).data,
                       plan.d, g.d.data, plan.d, &plan.algorithm, workspace, cuda::kGemmWorkspaceBytes, s);
    if (status != CUBLAS_STATUS_SUCCESS) refused(g, status);  // not a fall-back: work may have been given to the stream
    cuda::check_cuda(cudaSuccess,
                     "simt::launch(cublasLtMatmul, ...)");  // among the kernels that a later fault may name
    return status;
}
}  // namespace

namespace cuda {
bool try_gemm(const Gemm& g, Stream s) {
    const cublasStatus_t status = run(g, s);
    if (status != CUBLAS_STATUS_SUCCESS && status != CUBLAS_STATUS_NOT_SUPPORTED) refused(g, status);
    return status == CUBLAS_STATUS_SUCCESS;
}

void gemm(const Gemm& g, Stream s) {
    if (const cublasStatus_t status = run(g, s); status != CUBLAS_STATUS_SUCCESS) refused(g, status);
}
}  // namespace cuda
