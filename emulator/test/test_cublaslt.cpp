// The stand-in for cuBLASLt against a plain loop in double; the tests of the GEMM rely on it.  Made to fail by: a
// leading dimension taken for another, a transposition left out, beta ignored, the bias along columns, GELU of the
// rounded sum, each condition of the stand-in's check() functions left out, a part of a split sum left out, the sums of
// A taken along the wrong axis, every algorithm computed in one part.
#include <cublasLt.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/buf.h"
#include "cuda_emulator_host.h"
#include "test/cpu_check.h"

namespace {
constexpr size_t kWorkspace = 1 << 20;

// Numbers in device memory; the constructor and host() wait for their copies.
class Numbers {
  public:
    Numbers(cudaDataType_t type, const Doubles& values) : type_(type), n_(values.size()) {
        REQUIRE(cudaMalloc(&p_, n_ * size()) == cudaSuccess);
        REQUIRE(cudaMemcpy(p_, raw(values).data(), n_ * size(), cudaMemcpyHostToDevice) == cudaSuccess);
    }
    Numbers(const Numbers&) = delete;
    ~Numbers() { cudaFree(p_); }
    void* at(size_t i) const { return static_cast<char*>(p_) + i * size(); }
    operator void*() const { return p_; }
    Doubles host() const {
        std::vector<char> bytes(n_ * size());
        REQUIRE(cudaMemcpy(bytes.data(), p_, bytes.size(), cudaMemcpyDeviceToHost) == cudaSuccess);
        Doubles v(n_);
        for (size_t i = 0; i < n_; i++) {
            if (type_ == CUDA_R_16BF)
                v[i] = float(reinterpret_cast<const bf16*>(bytes.data())[i]);
            else
                v[i] = reinterpret_cast<const float*>(bytes.data())[i];
        }
        return v;
    }

  private:
    size_t size() const { return type_ == CUDA_R_16BF ? 2 : 4; }
    std::vector<char> raw(const Doubles& values) const {
        std::vector<char> bytes(values.size() * size());
        for (size_t i = 0; i < values.size(); i++) {
            if (type_ == CUDA_R_16BF)
                reinterpret_cast<bf16*>(bytes.data())[i] = bf16(float(values[i]));
            else
                reinterpret_cast<float*>(bytes.data())[i] = float(values[i]);
        }
        return bytes;
    }
    cudaDataType_t type_;
    size_t n_;
    void* p_ = nullptr;
};
DType dtype(cudaDataType_t t) { return t == CUDA_R_16BF ? DType::bf16 : DType::f32; }

// One product with all its parameters; each test changes those that it is about.
struct Case {
    int m = 8, n = 16, k = 24, gap = 0;  // gap: each leading dimension exceeds the rows by this
    bool a_transposed = false, b_transposed = false;
    cudaDataType_t in = CUDA_R_32F, out = CUDA_R_32F;
    float alpha = 1, beta = 0;
    bool in_place = false;  // C is D
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    int aux_ld = 0;

    int a_rows() const { return a_transposed ? k : m; }
    int a_cols() const { return a_transposed ? m : k; }
    int b_rows() const { return b_transposed ? n : k; }
    int ldc() const { return m + (in_place ? gap : 2 * gap); }
    int b_cols() const { return b_transposed ? k : n; }
};
Doubles numbers(size_t n, unsigned seed, cudaDataType_t t) { return rounded(normal(n, seed), dtype(t)); }

class Product {
  public:
    explicit Product(const Case& how)
        : h(how),
          va(numbers(size_t(h.a_rows() + h.gap) * h.a_cols(), 1, h.in)),
          vb(numbers(size_t(h.b_rows() + h.gap) * h.b_cols(), 2, h.in)),
          vc(numbers(size_t(h.ldc()) * h.n, 3, h.out)),
          vbias(numbers(size_t(std::max(h.m, h.n)), 4, h.out)),
          vaux(numbers(size_t(std::max(h.aux_ld, h.m)) * h.n, 5, h.out)),
          a(h.in, va),
          b(h.in, vb),
          c(h.out, vc),
          d(h.out, h.in_place ? vc : poison(size_t(h.m + h.gap) * h.n)),
          bias(h.out, vbias),
          aux(h.out, vaux),
          workspace(CUDA_R_32F, Doubles(kWorkspace / 4, 0.0)) {
        REQUIRE(cublasLtCreate(&handle) == CUBLAS_STATUS_SUCCESS);
        REQUIRE(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS);
        REQUIRE(cublasLtMatmulPreferenceCreate(&preference) == CUBLAS_STATUS_SUCCESS);
        set(CUBLASLT_MATMUL_DESC_TRANSA, int32_t(h.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N));
        set(CUBLASLT_MATMUL_DESC_TRANSB, int32_t(h.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N));
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(h.epilogue));
        set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(bias));
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, static_cast<void*>(aux));
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(h.aux_ld));
        const uint64_t n_bytes = kWorkspace;
        REQUIRE(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &n_bytes,
                                                     sizeof n_bytes) == CUBLAS_STATUS_SUCCESS);
        layout(&la, h.in, h.a_rows(), h.a_cols());
        layout(&lb, h.in, h.b_rows(), h.b_cols());
        layout(&lc, h.out, h.m, h.n);
        set(lc, CUBLASLT_MATRIX_LAYOUT_LD, int64_t(h.ldc()));
        layout(&ld, h.out, h.m, h.n);
    }
    ~Product() {
        for (cublasLtMatrixLayout_t l : {la, lb, lc, ld}) cublasLtMatrixLayoutDestroy(l);
        cublasLtMatmulPreferenceDestroy(preference);
        cublasLtMatmulDescDestroy(desc);
        cublasLtDestroy(handle);
    }
    template <class T>
    void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
        REQUIRE(cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value) == CUBLAS_STATUS_SUCCESS);
    }
    template <class T>
    void set(cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t attribute, const T& value) {
        REQUIRE(cublasLtMatrixLayoutSetAttribute(l, attribute, &value, sizeof value) == CUBLAS_STATUS_SUCCESS);
    }
    cublasStatus_t search() {
        int n = 0;
        return cublasLtMatmulAlgoGetHeuristic(handle, desc, la, lb, lc, ld, preference, 1, &found, &n);
    }
    std::vector<cublasLtMatmulHeuristicResult_t> search_all() {
        std::vector<cublasLtMatmulHeuristicResult_t> all(32);
        int n = 0;
        REQUIRE(cublasLtMatmulAlgoGetHeuristic(handle, desc, la, lb, lc, ld, preference, int(all.size()), all.data(),
                                               &n) == CUBLAS_STATUS_SUCCESS);
        all.resize(size_t(n));
        return all;
    }
    cublasStatus_t run(void* to, const void* a_at, size_t workspace_bytes = kWorkspace, void* scratch = nullptr) {
        return cublasLtMatmul(handle, desc, &h.alpha, a_at, la, b, lb, &h.beta, h.in_place ? to : c, lc, to, ld,
                              &found.algo, scratch ? scratch : workspace, workspace_bytes, nullptr);
    }
    cublasStatus_t run() { return run(d, a); }

    // sum (m, n) without gaps: alpha op(A) op(B) + beta C, and the bias where there is one.
    Doubles sum(bool of_absolutes) const {
        const auto take = [&](double v) { return of_absolutes ? std::abs(v) : v; };
        Doubles s(size_t(h.m) * h.n);
        for (int j = 0; j < h.n; j++)
            for (int i = 0; i < h.m; i++) {
                double v = take(h.beta * vc[size_t(j) * h.ldc() + i]);
                if (h.epilogue & CUBLASLT_EPILOGUE_BIAS) v += take(vbias[i]);
                for (int l = 0; l < h.k; l++)
                    v += take(h.alpha *
                              va[h.a_transposed ? size_t(i) * (h.k + h.gap) + l : size_t(l) * (h.m + h.gap) + i] *
                              vb[h.b_transposed ? size_t(l) * (h.n + h.gap) + j : size_t(j) * (h.k + h.gap) + l]);
                s[size_t(j) * h.m + i] = v;
            }
        return s;
    }

    // The sums of A (m) or B (n) over k.
    Doubles sums(bool of_a, bool of_absolutes) const {
        Doubles s(size_t(of_a ? h.m : h.n));
        for (int i = 0; i < int(s.size()); i++)
            for (int l = 0; l < h.k; l++) {
                const double v =
                    of_a ? va[h.a_transposed ? size_t(i) * (h.k + h.gap) + l : size_t(l) * (h.m + h.gap) + i]
                         : vb[h.b_transposed ? size_t(l) * (h.n + h.gap) + i : size_t(i) * (h.k + h.gap) + l];
                s[size_t(i)] += of_absolutes ? std::abs(v) : v;
            }
        return s;
    }

    Case h;
    Doubles va, vb, vc, vbias, vaux;
    Numbers a, b, c, d, bias, aux, workspace;
    cublasLtHandle_t handle = nullptr;
    cublasLtMatmulDesc_t desc = nullptr;
    cublasLtMatmulPreference_t preference = nullptr;
    cublasLtMatrixLayout_t la = nullptr, lb = nullptr, lc = nullptr, ld = nullptr;
    cublasLtMatmulHeuristicResult_t found = {};

  private:
    void layout(cublasLtMatrixLayout_t* l, cudaDataType_t type, int rows, int cols) const {
        REQUIRE(cublasLtMatrixLayoutCreate(l, type, uint64_t(rows), uint64_t(cols), rows + h.gap) ==
                CUBLAS_STATUS_SUCCESS);
    }
};

double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
double gelu_grad(double x) { return (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5; }

// |got - want| is within one rounding of `want` to `t`, plus an error of `slack` before that rounding.
bool near(double got, double want, double slack, cudaDataType_t t) {
    return std::abs(got - want) <= slack + (t == CUDA_R_16BF ? 0x1p-8 : kUnit) * (std::abs(want) + slack);
}

// Checks a product by the which-th algorithm that the search finds.
void check_product(const Case& how, size_t which = 0) {
    INFO("algorithm ", which, "m ", how.m, " n ", how.n, " k ", how.k, " gap ", how.gap, " a_transposed ",
         how.a_transposed, " b_transposed ", how.b_transposed, " in ", how.in, " out ", how.out, " beta ", how.beta,
         " epilogue ", how.epilogue);
    Product p(how);
    p.found = p.search_all().at(which);
    REQUIRE(p.run() == CUBLAS_STATUS_SUCCESS);
    const Doubles d = p.d.host(), aux = p.aux.host(), workspace = p.workspace.host(), sum = p.sum(false),
                  absolutes = p.sum(true);
    const bool is_gelu = how.epilogue & CUBLASLT_EPILOGUE_GELU, is_grad = how.epilogue == CUBLASLT_EPILOGUE_DGELU;
    int wrong = 0, outside = 0;
    for (int j = 0; j < how.n; j++) {
        for (int i = 0; i < how.m; i++) {
            const size_t at = size_t(j) * how.m + i, at_d = size_t(j) * (how.m + how.gap) + i;
            const size_t at_aux = size_t(j) * how.aux_ld + i;
            const double slack = (how.k + 3) * kUnit * absolutes[at];
            double want = sum[at], slope = 1;
            if (is_gelu) want = gelu(want), slope = 1.13;
            if (is_grad) slope = std::abs(gelu_grad(p.vaux[at_aux])), want *= gelu_grad(p.vaux[at_aux]);
            wrong += !near(d[at_d], want, 1.2 * slope * slack + 1e-5 * (std::abs(want) + 0.01), how.out);
            if (is_gelu) wrong += !near(aux[at_aux], sum[at], slack, how.out);
        }
        for (int i = how.m; i < how.m + how.gap && j + 1 < how.n; i++) {
            const size_t at = size_t(j) * (how.m + how.gap) + i;
            outside += how.in_place ? d[at] != p.vc[at] : !std::isnan(d[at]);
        }
        if (is_gelu)
            for (int i = how.m; i < how.aux_ld; i++)
                outside += aux[size_t(j) * how.aux_ld + i] != p.vaux[size_t(j) * how.aux_ld + i];
    }
    const size_t used = p.found.workspaceSize / 4;  // the product fills these floats, and no more
    for (size_t i = 0; i < used; i++) outside += !std::isnan(workspace[i]);
    outside += workspace[used] != 0;
    CHECK(wrong == 0);
    CHECK(outside == 0);
}
constexpr cublasStatus_t kGood = CUBLAS_STATUS_SUCCESS, kInvalid = CUBLAS_STATUS_INVALID_VALUE,
                         kUnsupported = CUBLAS_STATUS_NOT_SUPPORTED;
const Case kGelu = {.in = CUDA_R_16BF, .out = CUDA_R_16BF, .epilogue = CUBLASLT_EPILOGUE_GELU_AUX_BIAS, .aux_ld = 24};
}  // namespace

TEST_CASE("emulated cublasLt: alpha op(A) op(B) + beta C of every layout and type") {
    for (unsigned bits = 0; bits < 4; bits++)
        for (cudaDataType_t in : {CUDA_R_32F, CUDA_R_16BF})
            for (cudaDataType_t out : {CUDA_R_32F, CUDA_R_16BF})
                for (float beta : {0.0f, 0.5f})
                    for (int gap : {0, 3, 8}) {
                        if (in == CUDA_R_32F && out == CUDA_R_16BF) continue;
                        // k is long: where all is aligned, the first algorithm takes a workspace
                        Case c = {.m = 8,
                                  .n = 16,
                                  .k = 72,
                                  .gap = gap,
                                  .a_transposed = !!(bits & 1),
                                  .b_transposed = !!(bits & 2),
                                  .in = in,
                                  .out = out,
                                  .alpha = 1.5f,
                                  .beta = beta};
                        check_product(c);
                        c.in_place = beta != 0;
                        c.m = 5, c.n = 1, c.k = 7;
                        check_product(c);
                    }
}

TEST_CASE("emulated cublasLt: epilogues") {
    for (cudaDataType_t t : {CUDA_R_32F, CUDA_R_16BF})
        for (cublasLtEpilogue_t e : {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU_AUX,
                                     CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU})
            for (float beta : {0.0f, 1.0f})
                check_product(
                    {.m = 16, .n = 5, .k = 8, .gap = 8, .in = t, .out = t, .beta = beta, .epilogue = e, .aux_ld = 32});
}

TEST_CASE("emulated cublasLt: every algorithm computes the product") {
    for (cudaDataType_t out : {CUDA_R_32F, CUDA_R_16BF})
        for (bool a_transposed : {false, true})
            for (bool b_transposed : {false, true}) {
                const Case c = {.k = 72,
                                .a_transposed = a_transposed,
                                .b_transposed = b_transposed,
                                .in = CUDA_R_16BF,
                                .out = out,
                                .beta = 0.5f};
                const std::vector<cublasLtMatmulHeuristicResult_t> all = Product(c).search_all();
                CHECK(all.size() == 8);
                // Algorithms 4 and 5 add their parts in bf16, two roundings more than are allowed here.
                for (size_t i = 0; i < all.size(); i++)
                    if (out == CUDA_R_32F || (i != 4 && i != 5)) check_product(c, i);
            }
}

TEST_CASE("emulated cublasLt: algorithms differ in their bits, and one from run to run") {
    Product p({.k = 72});
    const auto bits = [&](const cublasLtMatmulHeuristicResult_t& by) {
        p.found = by;
        REQUIRE(p.run() == kGood);
        return p.d.host();
    };
    std::vector<cublasLtMatmulHeuristicResult_t> all = p.search_all();
    std::vector<Doubles> seen;
    emulator::products_run().clear();
    for (size_t i = 0; i < all.size(); i++) {
        const Doubles first = bits(all[i]);
        CHECK((bits(all[i]) == first) == (i != 6));
        if (i == 5 || i == 7) continue;  // 5: like 4, fp32 throughout; 7: one part, like 0
        CHECK(std::find(seen.begin(), seen.end(), first) == seen.end());
        seen.push_back(first);
    }
    CHECK(emulator::products_run() == std::vector<int>{0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7});
    // Algorithms add in place or in D's type only where the caller allows it.
    const uint32_t compute_type = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    REQUIRE(cublasLtMatmulPreferenceSetAttribute(p.preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                 &compute_type, sizeof compute_type) == kGood);
    CHECK(p.search_all().size() == 6);
    cublasLtMatmulHeuristicResult_t again = {};
    CHECK(cublasLtMatmulAlgoCheck(p.handle, p.desc, p.la, p.lb, p.lc, p.ld, &all[2].algo, &again) == kGood);
    CHECK(again.workspaceSize == all[2].workspaceSize);
    CHECK(std::memcmp(&again.algo, &all[2].algo, sizeof again.algo) == 0);
    const cublasLtMatmulAlgo_t zeros = {};
    CHECK(cublasLtMatmulAlgoCheck(p.handle, p.desc, p.la, p.lb, p.lc, p.ld, &zeros, &again) == kInvalid);
    const uint64_t small = 2 * 4 * 8 * 16;  // bytes: room for two parts
    REQUIRE(cublasLtMatmulPreferenceSetAttribute(p.preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &small,
                                                 sizeof small) == kGood);
    CHECK(p.search_all().size() == 3);
}

TEST_CASE("emulated cublasLt: the sums of A or B over k") {
    for (cudaDataType_t out : {CUDA_R_32F, CUDA_R_16BF})
        for (bool of_a : {true, false})
            for (unsigned bits = 0; bits < 4; bits++) {
                const Case c = {.k = 72,
                                .gap = 8,
                                .a_transposed = !!(bits & 1),
                                .b_transposed = !!(bits & 2),
                                .in = out,
                                .out = out,
                                .epilogue = of_a ? CUBLASLT_EPILOGUE_BGRADA : CUBLASLT_EPILOGUE_BGRADB};
                Product p(c);
                const Doubles want = p.sums(of_a, false), absolutes = p.sums(of_a, true);
                std::vector<Doubles> seen;
                for (const auto& by : p.search_all()) {
                    p.found = by;
                    REQUIRE(p.run() == kGood);
                    seen.push_back(p.bias.host());
                    for (size_t i = 0; i < want.size(); i++)
                        CHECK(near(seen.back()[i], want[i], c.k * kUnit * absolutes[i], out));
                    for (size_t i = want.size(); i < seen.back().size(); i++) CHECK(seen.back()[i] == p.vbias[i]);
                }
                CHECK(seen.size() == 7);
                if (out == CUDA_R_32F) CHECK(seen[0] != seen[2]);
            }
}

TEST_CASE("emulated cublasLt: a clock that tells what the algorithms are said to take") {
    const emulator::Machine before = emulator::machine();
    emulator::machine().has_clock = true;
    emulator::machine().fastest_algorithm = 2;
    emulator::machine().epilogue_us = 70;
    for (const auto& [epilogue, more] : {std::pair{CUBLASLT_EPILOGUE_DEFAULT, 0.0}, {CUBLASLT_EPILOGUE_BIAS, 0.07}}) {
        Product p({.k = 72, .epilogue = epilogue});
        cudaEvent_t from = nullptr, to = nullptr;
        for (cudaEvent_t* event : {&from, &to}) REQUIRE(cudaEventCreate(event) == cudaSuccess);
        const std::vector<cublasLtMatmulHeuristicResult_t> all = p.search_all();
        for (const auto& [which, want] : {std::pair{0, 0.2}, {1, 0.3}, {2, 0.1}, {3, 0.5}}) {
            p.found = all[size_t(which)];
            float ms = 0;
            REQUIRE(cudaEventRecord(from, nullptr) == cudaSuccess);
            REQUIRE(p.run() == kGood);
            REQUIRE(cudaEventRecord(to, nullptr) == cudaSuccess);
            REQUIRE(cudaEventSynchronize(to) == cudaSuccess);
            REQUIRE(cudaEventElapsedTime(&ms, from, to) == cudaSuccess);
            CHECK(ms == doctest::Approx(want + more));
        }
        for (cudaEvent_t event : {from, to}) cudaEventDestroy(event);
    }
    emulator::machine() = before;
}

TEST_CASE("emulated cublasLt: what the search refuses") {
    const auto refuses = [](Case c, cublasStatus_t want, auto change) {
        Product p(c);
        REQUIRE(p.search() == kGood);
        change(p);
        CHECK(p.search() == want);
    };
    const int64_t seven = 7;
    refuses({}, kInvalid, [&](Product& p) { p.set(p.la, CUBLASLT_MATRIX_LAYOUT_LD, seven); });
    refuses({}, kInvalid, [](Product& p) { p.set(p.lb, CUBLASLT_MATRIX_LAYOUT_COLS, uint64_t(17)); });
    refuses({}, kInvalid, [](Product& p) { p.set(p.la, CUBLASLT_MATRIX_LAYOUT_COLS, uint64_t(25)); });
    refuses({}, kInvalid, [](Product& p) { p.set(p.la, CUBLASLT_MATRIX_LAYOUT_ROWS, uint64_t(7)); });
    refuses({}, kInvalid, [](Product& p) { p.set(p.lc, CUBLASLT_MATRIX_LAYOUT_COLS, uint64_t(15)); });
    refuses({}, kUnsupported, [](Product& p) { p.set(p.la, CUBLASLT_MATRIX_LAYOUT_ORDER, int32_t(1)); });
    refuses({}, kUnsupported, [](Product& p) { p.set(p.la, CUBLASLT_MATRIX_LAYOUT_TYPE, uint32_t(CUDA_R_16BF)); });
    refuses({}, kUnsupported, [](Product& p) { p.set(p.lc, CUBLASLT_MATRIX_LAYOUT_TYPE, uint32_t(CUDA_R_16BF)); });
    refuses({}, kUnsupported, [](Product& p) {
        for (cublasLtMatrixLayout_t l : {p.lc, p.ld}) p.set(l, CUBLASLT_MATRIX_LAYOUT_TYPE, uint32_t(CUDA_R_16BF));
    });
    refuses({}, kUnsupported,
            [](Product& p) { p.set(CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, int32_t(CUBLAS_COMPUTE_64F)); });
    refuses({}, kUnsupported, [](Product& p) { p.set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(2)); });
    refuses(kGelu, kUnsupported, [](Product& p) { p.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(20)); });
    refuses(kGelu, kInvalid, [](Product& p) { p.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(0)); });
    refuses(kGelu, kUnsupported, [](Product& p) { p.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.aux.at(4)); });
    refuses(kGelu, kUnsupported, [](Product& p) { p.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias.at(1)); });
    refuses(kGelu, kUnsupported, [](Product& p) { p.set(p.la, CUBLASLT_MATRIX_LAYOUT_LD, int64_t(9)); });
    refuses(kGelu, kUnsupported, [](Product& p) {
        const uint32_t two = 2;
        cublasLtMatmulPreferenceSetAttribute(p.preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &two,
                                             sizeof two);
    });
    Product p{Case{}};
    CHECK(cublasLtMatmulDescSetAttribute(p.desc, CUBLASLT_MATMUL_DESC_TRANSA, &seven, sizeof seven) == kInvalid);
    CHECK(cublasLtMatrixLayoutSetAttribute(p.la, CUBLASLT_MATRIX_LAYOUT_LD, &seven, 4) == kInvalid);
    CHECK(cublasLtMatrixLayoutSetAttribute(p.la, CUBLASLT_MATRIX_LAYOUT_LD, nullptr, 8) == kInvalid);
}

TEST_CASE("emulated cublasLt: what a product refuses") {
    const Case split = {.k = 72};  // its algorithm wants 4 * 8 * 16 bytes of workspace
    const auto refuses = [](const Case& c, cublasStatus_t want, auto attempt) {
        Product p(c);
        REQUIRE(p.search() == kGood);
        CHECK(attempt(p) == want);
    };
    refuses(split, kGood, [](Product& p) { return p.run(p.d, p.a, 512); });
    refuses(split, kInvalid, [](Product& p) { return p.run(p.d, p.a, 511); });
    refuses(split, kInvalid, [](Product& p) { return p.run(p.d, p.a, 512, p.workspace.at(1)); });
    refuses(split, kInvalid, [](Product& p) { return p.run(p.workspace.at(4), p.a); });
    refuses({.gap = 8}, kInvalid, [](Product& p) { return p.run(p.d, p.a.at(1)); });
    refuses({}, kInvalid, [](Product& p) { return p.run(p.a, p.a); });
    refuses({}, CUBLAS_STATUS_EXECUTION_FAILED, [](Product& p) { return p.run(p.d.at(4), p.a); });
    refuses({}, CUBLAS_STATUS_EXECUTION_FAILED, [](Product& p) {
        alignas(16) static float on_host[8 * 16];
        return p.run(on_host, p.a);
    });
    refuses({.beta = 1, .in_place = true}, kInvalid, [](Product& p) {
        p.set(p.lc, CUBLASLT_MATRIX_LAYOUT_LD, int64_t(12));
        return p.search() == kGood ? p.run() : kGood;
    });
    refuses({}, kInvalid, [](Product& p) {  // an algorithm for another problem
        p.set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(CUBLASLT_EPILOGUE_BIAS));
        return p.run();
    });
    refuses({.epilogue = CUBLASLT_EPILOGUE_BIAS}, kInvalid, [](Product& p) {
        p.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(nullptr));
        return p.run();
    });
    refuses({}, kInvalid, [](Product& p) {
        p.found.algo = {};
        return p.run();
    });
    emulator::reset_device();
}

TEST_CASE("emulated cublasLt: a product runs in the stream's order, with the arguments as they were") {
    const emulator::StreamMode before = emulator::machine().mode;
    emulator::machine().mode = emulator::StreamMode::late;
    {
        Product p({.epilogue = CUBLASLT_EPILOGUE_BIAS});
        const Doubles sum = p.sum(false), absolutes = p.sum(true);
        REQUIRE(p.search() == kGood);
        REQUIRE(cudaMemsetAsync(p.bias, 0, 8 * sizeof(float), nullptr) == cudaSuccess);  // before
        REQUIRE(p.run() == kGood);
        REQUIRE(cudaMemsetAsync(p.a, 0, 8 * 24 * sizeof(float), nullptr) == cudaSuccess);  // after
        p.h.alpha = 7;
        p.set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t(CUBLASLT_EPILOGUE_DEFAULT));
        p.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(nullptr));
        const Doubles d = p.d.host();
        for (size_t i = 0; i < d.size(); i++)
            CHECK(near(d[i], sum[i] - p.vbias[i % 8], 30 * kUnit * absolutes[i], p.h.out));
    }
    emulator::machine().mode = before;
}
