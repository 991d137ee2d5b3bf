// Chooses the algorithm of each kind of product, and whether bias, GELU and sums are fused to it.
//
// While tuning is on, the first call of a kind asks the library for its kMaxCandidates best guesses, adds some with k
// split otherwise where they are fewer than 16, and runs each on the call's own operands with the real workspace.
// Where a run takes more than 2 ms, it is timed once, and the 8 best guesses are all.  The call keeps the fastest that
// repeats its bits (a candidate runs twice, and its outputs are hashed on the device) and agrees with the library's
// first guess that does not split k.  A call that could also be computed apart (not fused) then times both ways and
// keeps the faster.  The outputs of a tuned call are meaningless: a product that adds to its own output has done so
// many times.  So tuning is for a step whose results nobody uses.
//
// While tuning is off, a kind without a choice takes the first guess that runs.  A captured stream never tunes.
#pragma once
#include <cublasLt.h>

#include <vector>

#include "kernels/cuda/gemm.h"

namespace cuda {
// The functions of these names in Backend (kernels/ops.h).
std::string tune(bool on);
std::string choices();
std::string set_choices(const std::string& text);

// ---- Between gemm.cpp and gemm_tuning.cpp.
constexpr int kMaxCandidates = 32;

struct GemmKey {  // a kind; the leading dimensions follow from the shape
    int M, N, K;
    bool a_transposed, b_transposed, adds;
    DType a_type, b_type, d_type;
    cublasLtEpilogue_t epilogue;
    uint32_t align_a, align_b, align_c, align_d, align_bias, align_aux;
    auto operator<=>(const GemmKey&) const = default;
};
std::string text_of(const GemmKey&);

using GemmAlgorithm = cublasLtMatmulAlgo_t;
struct GemmPlan {
    cublasLtMatmulDesc_t product = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;  // of the library's A, B and D; C is laid out as D
    cublasStatus_t status = CUBLAS_STATUS_NOT_SUPPORTED;           // success: `algorithm` can compute it
    GemmAlgorithm algorithm = {};
    bool apart = false;   // the product is computed apart, not fused
    bool chosen = false;  // by timing, or given
    bool used = false;    // false while only timing trials have used this plan; choices() lists chosen, used plans
};
GemmPlan describe(const Gemm&, const GemmKey&);
void destroy(const GemmPlan&);
// The library's n (up to kMaxCandidates) best guesses that fit into the workspace, best first.  add_splits() appends
// others where these are few.
std::vector<GemmAlgorithm> guesses(const GemmPlan&, const GemmKey&, int n, cublasStatus_t* status);
void add_splits(std::vector<GemmAlgorithm>&, const GemmPlan&, const GemmKey&);
bool is_split(const GemmAlgorithm&);  // adds up k in more than one part
// Success: this algorithm can compute the plan's product on the open device in the workspace.
cublasStatus_t check_algorithm(const GemmPlan&, const GemmAlgorithm&);
// Gives the stream one product.  `adds` false: c is left out.
cublasStatus_t multiply(const Gemm&, const GemmPlan&, const GemmAlgorithm&, bool adds, Stream);

// The plan of a kind, made or tuned now if need be.  `apart` computes the same unfused, or is null.
const GemmPlan& plan_of(const Gemm&, const GemmKey&, Stream, const std::function<void()>* apart);
}  // namespace cuda
