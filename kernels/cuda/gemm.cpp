// Calls cuBLASLt, with descriptors made once per kind of product.  gemm_tuning.cpp chooses the algorithm.
//
// cuBLASLt is column-major: it sees a row-major matrix as its transpose.  So we ask for d^T = b^T a^T: the library's A
// is our b, its B our a, its m our N, and the rows of its D, which carry the bias, are our columns.
#include "kernels/cuda/gemm.h"

#include <algorithm>
#include <vector>

#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/gemm_tuning.h"

namespace {
using cuda::Gemm;
using cuda::lt;
using Key = cuda::GemmKey;
using Plan = cuda::GemmPlan;

constexpr size_t kAlign = 16;  // bytes; more gains no algorithm, less loses the vectorised ones

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

// The alignment of a buffer's address: 2, 4, 8 or 16 bytes.  0 for an absent buffer.
uint32_t alignment(const Buf& b) {
    const uintptr_t p = reinterpret_cast<uintptr_t>(b.data);
    return p ? uint32_t(std::min(p & -p, uintptr_t(kAlign))) : 0;
}

cublasLtEpilogue_t epilogue_of(const Gemm& g) {
    if (g.through_gelu) return CUBLASLT_EPILOGUE_DGELU;
    if (g.sums_b) return CUBLASLT_EPILOGUE_BGRADA;  // the library's A is b
    if (g.sums_a) return CUBLASLT_EPILOGUE_BGRADB;
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
        case CUBLASLT_EPILOGUE_BGRADA:
            return "BGRADA";
        case CUBLASLT_EPILOGUE_BGRADB:
            return "BGRADB";
        default:
            return "DEFAULT";
    }
}

void check(cublasStatus_t status, const char* call) {
    if (status != CUBLAS_STATUS_SUCCESS) fail(Exit::internal, "cuBLASLt: {} in {}", lt().GetStatusName(status), call);
}
#define LT_CHECK(call) check((call), #call)

[[noreturn]] void refused(const Gemm& g, cublasStatus_t status) {
    fail(Exit::internal, "cuBLASLt: {} for M x N x K = {} x {} x {}{}{}, {} x {} -> {}, epilogue {}",
         lt().GetStatusName(status), g.M, g.N, g.K, g.a_transposed ? ", a transposed" : "",
         g.b_transposed ? ", b transposed" : "", dtype_name(g.a.dtype), dtype_name(g.b.dtype), dtype_name(g.d.dtype),
         name_of(epilogue_of(g)));
}

// The library wants C to be D where nothing is added.
const Buf& added_to(const Gemm& g) { return g.c ? g.c : g.d; }
const Buf& aux_of(const Gemm& g) { return g.through_gelu ? g.through_gelu : g.pre_gelu; }
const Buf& bias_of(const Gemm& g) { return g.sums_b ? g.sums_b : g.sums_a ? g.sums_a : g.bias; }
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
            .align_bias = alignment(bias_of(g)),
            .align_aux = alignment(aux_of(g))};
}

template <class T>
void set(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t attribute, const T& value) {
    LT_CHECK(lt().MatmulDescSetAttribute(d, attribute, &value, sizeof value));
}
template <class T>
void set(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
    LT_CHECK(lt().MatmulPreferenceSetAttribute(p, attribute, &value, sizeof value));
}

// Sets the addresses that a product's descriptor carries.  The search infers alignments from them.
void set_pointers(cublasLtMatmulDesc_t product, const Gemm& g) {
    if (const Buf& bias = bias_of(g)) set(product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.data);
    if (const Buf& aux = aux_of(g)) set(product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux.data);
}

// The layout of a matrix that is (rows, columns) in row-major memory.
cublasLtMatrixLayout_t layout(cudaDataType_t type, int rows, int columns) {
    cublasLtMatrixLayout_t l = nullptr;
    LT_CHECK(lt().MatrixLayoutCreate(&l, type, uint64_t(columns), uint64_t(rows), columns));
    return l;
}

cublasLtMatmulPreference_t preference(const Key& k) {
    cublasLtMatmulPreference_t p = nullptr;
    LT_CHECK(lt().MatmulPreferenceCreate(&p));
    set(p, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(cuda::gemm_workspace_bytes()));
    // Parts of a split sum may be added in fp32 only.  The in-place scheme adds them in d's dtype.
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    if (k.d_type == DType::f32) reductions |= CUBLASLT_REDUCTION_SCHEME_INPLACE;
    set(p, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions);
    set(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, k.align_b);
    set(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, k.align_a);
    set(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, k.align_c);
    set(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, k.align_d);
    return p;
}

// The open device's handle.  Never destroyed: when the process ends the driver may be gone before static objects are.
cublasLtHandle_t handle() {
    static const cublasLtHandle_t h = [] {
        cublasLtHandle_t made = nullptr;
        LT_CHECK(lt().Create(&made));
        return made;
    }();
    return h;
}

// Makes this algorithm add up k in `parts` parts, in fp32.  False: it does so already, or cannot.
bool split(cuda::GemmAlgorithm& a, int32_t parts) {
    int32_t can = 0, now = 0;
    uint32_t known = 0;
    const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    size_t n = 0;
    cublasLtMatmulAlgo_t* o = &a;
    const auto done = [](cublasStatus_t status) { return status == CUBLAS_STATUS_SUCCESS; };
    return done(lt().MatmulAlgoCapGetAttribute(o, CUBLASLT_ALGO_CAP_SPLITK_SUPPORT, &can, sizeof can, &n)) && can &&
           done(lt().MatmulAlgoCapGetAttribute(o, CUBLASLT_ALGO_CAP_REDUCTION_SCHEME_MASK, &known, sizeof known, &n)) &&
           known & reduction &&
           done(lt().MatmulAlgoConfigGetAttribute(o, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &now, sizeof now, &n)) &&
           now >= 1 && now != parts &&  // stream-K has a negative number
           done(lt().MatmulAlgoConfigSetAttribute(o, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &parts, sizeof parts)) &&
           done(lt().MatmulAlgoConfigSetAttribute(o, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &reduction,
                                                  sizeof reduction));
}

// The library itself asks only that the auxiliary matrix has a leading dimension that is a multiple of 8, at 16 bytes.
// We ask for whole vectors in every operand: the library's kernels with epilogues are made for them.
bool whole_vectors(const Gemm& g, const Key& k) {
    const size_t in = dtype_bytes(g.a.dtype), out = dtype_bytes(g.d.dtype);
    const int row_a = g.a_transposed ? g.M : g.K, row_b = g.b_transposed ? g.K : g.N;
    bool whole = row_a * in % kAlign == 0 && row_b * in % kAlign == 0 && g.N * out % kAlign == 0;
    for (uint32_t a : {k.align_a, k.align_b, k.align_c, k.align_d}) whole = whole && a == kAlign;
    for (uint32_t a : {k.align_bias, k.align_aux}) whole = whole && (a == 0 || a == kAlign);
    return whole;
}

void check_operands(const Gemm& g) {
    CHECK_THAT(g.M > 0 && g.N > 0 && g.K > 0, "gemm: M = {}, N = {}, K = {}", g.M, g.N, g.K);
    const size_t out = size_t(g.M) * g.N;
    expect_size("gemm.d", g.d, out, "M*N");
    expect_size("gemm.a", g.a, size_t(g.M) * g.K, "M*K");
    expect_size("gemm.b", g.b, size_t(g.K) * g.N, "K*N");
    type_of("a", g.a), type_of("b", g.b), type_of("d", g.d);
    if (g.bias) expect_size("gemm.bias", g.bias, size_t(g.N), "N");
    if (g.sums_a) expect_size("gemm.sums_a", g.sums_a, size_t(g.M), "M");
    if (g.sums_b) expect_size("gemm.sums_b", g.sums_b, size_t(g.N), "N");
    for (const Buf& same : {g.c, g.pre_gelu, g.through_gelu})
        if (same) expect_size("gemm.c, .pre_gelu or .through_gelu", same, out, "M*N");
    for (const Buf& same : {g.c, g.pre_gelu, g.through_gelu, g.bias, g.sums_a, g.sums_b})
        CHECK_THAT(!same || same.dtype == g.d.dtype, "gemm: a {} beside a {} d", dtype_name(same.dtype),
                   dtype_name(g.d.dtype));
    const int fused = bool(g.bias || g.pre_gelu) + bool(g.through_gelu) + bool(g.sums_a) + bool(g.sums_b);
    CHECK_THAT(fused <= 1, "gemm: of bias and pre_gelu, through_gelu, sums_a, sums_b {} are given together", fused);
}

bool may_fuse(const Gemm& g, const Key& k) {
    return k.epilogue == CUBLASLT_EPILOGUE_DEFAULT || (whole_vectors(g, k) && (!aux_of(g) || g.d.dtype == DType::bf16));
}

void run(const Gemm& g, const Plan& plan, Stream s) {
    if (const cublasStatus_t status = cuda::multiply(g, plan, plan.algorithm, true, s); status != CUBLAS_STATUS_SUCCESS)
        refused(g, status);  // no second try: the stream may have been given work
}
}  // namespace

namespace cuda {
std::string text_of(const GemmKey& k) {
    return fmt::format("{} x {} x {}, {}{} x {}{} -> {}{}, {}, aligned {} {} {} {} {} {}", k.M, k.N, k.K,
                       dtype_name(k.a_type), k.a_transposed ? "^T" : "", dtype_name(k.b_type),
                       k.b_transposed ? "^T" : "", k.adds ? "+" : "", dtype_name(k.d_type), name_of(k.epilogue),
                       k.align_a, k.align_b, k.align_c, k.align_d, k.align_bias, k.align_aux);
}

GemmPlan describe(const Gemm& g, const GemmKey& k) {
    GemmPlan p;
    LT_CHECK(lt().MatmulDescCreate(&p.product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t of_a = g.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t of_b = g.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    set(p.product, CUBLASLT_MATMUL_DESC_TRANSA, int32_t(of_a));
    set(p.product, CUBLASLT_MATMUL_DESC_TRANSB, int32_t(of_b));
    set(p.product, CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(k.epilogue));
    if (aux_of(g)) set(p.product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(g.N));
    set_pointers(p.product, g);
    p.a = layout(type_of("b", g.b), g.b_transposed ? g.N : g.K, g.b_transposed ? g.K : g.N);
    p.b = layout(type_of("a", g.a), g.a_transposed ? g.K : g.M, g.a_transposed ? g.M : g.K);
    p.d = layout(type_of("d", g.d), g.M, g.N);
    return p;
}
void destroy(const GemmPlan& p) {
    for (cublasLtMatrixLayout_t l : {p.a, p.b, p.d}) lt().MatrixLayoutDestroy(l);
    lt().MatmulDescDestroy(p.product);
}

bool is_split(const GemmAlgorithm& a) {
    int32_t parts = 0;
    size_t n = 0;
    return lt().MatmulAlgoConfigGetAttribute(&a, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &parts, sizeof parts, &n) ==
               CUBLAS_STATUS_SUCCESS &&
           parts != 0 && parts != 1;
}

// Adds the found algorithms with k split otherwise, if they are few: a weight gradient has few tiles and a long k.  A
// split is forced only where the kernels' tiles, of 8 to 256 of k, divide K: some drop the last terms of K where their
// tile does not divide it and the library did not propose the split (reported of CUDA 12.8 and 13.1 on an H100).
void add_splits(std::vector<GemmAlgorithm>& all, const GemmPlan& p, const GemmKey& k) {
    constexpr size_t kEnough = 16;
    constexpr int kLargestTile = 256;  // of cublasLtMatmulStages_t, but for one of 768
    if (k.K % kLargestTile != 0) return;
    const std::vector<GemmAlgorithm> found = all;
    for (const int32_t parts : {2, 3, 4, 6, 8, 12, 16})
        for (GemmAlgorithm a : found) {
            const auto is_a = [&](const GemmAlgorithm& b) { return std::ranges::equal(a.data, b.data); };
            if (all.size() < kEnough && split(a, parts) && std::ranges::none_of(all, is_a) &&
                check_algorithm(p, a) == CUBLAS_STATUS_SUCCESS)
                all.push_back(a);
        }
}

std::vector<GemmAlgorithm> guesses(const GemmPlan& p, const GemmKey& k, int n, cublasStatus_t* status) {
    const cublasLtMatmulPreference_t wanted = preference(k);
    cublasLtMatmulHeuristicResult_t found[kMaxCandidates] = {};
    int n_found = 0;
    *status = lt().MatmulAlgoGetHeuristic(handle(), p.product, p.a, p.b, p.d, p.d, wanted, n, found, &n_found);
    LT_CHECK(lt().MatmulPreferenceDestroy(wanted));
    std::vector<GemmAlgorithm> all;
    for (int i = 0; i < n_found && *status == CUBLAS_STATUS_SUCCESS; i++)
        if (found[i].state == CUBLAS_STATUS_SUCCESS && found[i].workspaceSize <= gemm_workspace_bytes())
            all.push_back({found[i].algo});
    if (*status == CUBLAS_STATUS_SUCCESS && all.empty()) *status = CUBLAS_STATUS_NOT_SUPPORTED;
    return all;
}

cublasStatus_t check_algorithm(const GemmPlan& p, const GemmAlgorithm& algorithm) {
    cublasLtMatmulHeuristicResult_t r = {};
    const cublasStatus_t status = lt().MatmulAlgoCheck(handle(), p.product, p.a, p.b, p.d, p.d, &algorithm, &r);
    if (status == CUBLAS_STATUS_SUCCESS && r.workspaceSize > gemm_workspace_bytes()) return CUBLAS_STATUS_NOT_SUPPORTED;
    return status;
}

cublasStatus_t multiply(const Gemm& g, const GemmPlan& p, const GemmAlgorithm& algorithm, bool adds, Stream s) {
    set_pointers(p.product, g);
    const Buf workspace = gemm_workspace(s);
    const float one = 1, beta = adds && g.c ? 1 : 0;
    const void* c = adds ? added_to(g).data : g.d.data;
    const cublasStatus_t status = lt().Matmul(handle(), p.product, &one, g.b.data, p.a, g.a.data, p.b, &beta, c, p.d,
                                              g.d.data, p.d, &algorithm, workspace.data, workspace.count, s);
    if (status == CUBLAS_STATUS_SUCCESS)
        check_launch(cudaSuccess, "cublasLtMatmul");  // a later fault may name this launch
    return status;
}

void gemm(const Gemm& g, Stream s) {
    check_operands(g);
    const GemmKey key = key_of(g);
    if (!may_fuse(g, key)) refused(g, CUBLAS_STATUS_NOT_SUPPORTED);
    const GemmPlan& plan = plan_of(g, key, s, nullptr);
    if (plan.status != CUBLAS_STATUS_SUCCESS) refused(g, plan.status);
    run(g, plan, s);
}

void gemm_or(const Gemm& g, Stream s, const std::function<void()>& apart) {
    check_operands(g);
    const GemmKey key = key_of(g);
    if (!may_fuse(g, key)) return apart();
    const GemmPlan& plan = plan_of(g, key, s, &apart);
    if (plan.apart) return apart();
    run(g, plan, s);
}
}  // namespace cuda
