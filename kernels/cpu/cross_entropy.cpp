// Softmax and cross-entropy of each row, and the gradient in place of the logits.
//
//   loss = m + log s - x[target],   m = max_v x[v],  s = sum_v exp(x[v] - m)       v over the V true columns
//   x[v] becomes (exp(x[v] - m) / s - (v == target)) * grad_scale, and 0 in the padded columns V..Vp
//
//   shapes     logits (BT, Vp)    targets, loss, correct (BT)
//   traffic    one read and one write of the logits; the passes after the first find the row in L2.   bound: memory
//   limits     any V <= Vp; a target outside [0, V) is refused before anything is written
//   order      sum: SIMD lanes add up 1024 columns in the logits' type; these sums are added in order in double.  A
//              thread takes whole rows.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/math.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace {
constexpr int kPiece = 1024;  // columns that are summed in the logits' type

// sum_v exp(x[v] - m).  With `keep` writes the terms to x.
template <bool keep, class T>
double exp_sum(T* x, int V, T m) {
    double sum = 0;
    for (int v0 = 0; v0 < V; v0 += kPiece) {
        const int v1 = std::min(V, v0 + kPiece);
        T part = 0;
#pragma omp simd reduction(+ : part)
        for (int v = v0; v < v1; v++) {
            const T e = cpu::fast_exp(x[v] - m);
            if constexpr (keep) x[v] = e;
            part += e;
        }
        sum += double(part);
    }
    return sum;
}

template <class T>
void row(T* x, int target, int V, int Vp, T grad_scale, T& loss, int32_t* correct) {
    const T m = cpu::largest(x, size_t(V), -std::numeric_limits<T>::infinity()), at_target = x[target];
    if (correct) *correct = at_target == m && std::find(x, x + target, m) == x + target;
    const double sum = grad_scale != 0 ? exp_sum<true>(x, V, m) : exp_sum<false>(x, V, m);
    loss = T(std::log(sum) + (double(m) - double(at_target)));
    if (grad_scale == 0) return;
    const T scale = T(double(grad_scale) / sum);
#pragma omp simd
    for (int v = 0; v < V; v++) x[v] *= scale;
    x[target] -= grad_scale;
    std::fill(x + V, x + Vp, T(0));
}
}  // namespace

namespace cpu {
void cross_entropy(const CrossEntropy& a, Stream) {
    const size_t BT = size_t(a.BT), Vp = size_t(a.Vp);
    const int32_t* targets = a.targets.as<int32_t>();  // (BT)
    int32_t* correct = a.correct.as<int32_t>();        // (BT) or null
    for (size_t i = 0; i < BT; i++)
        if (targets[i] < 0 || targets[i] >= a.V)
            fail(Exit::data, "cross_entropy.targets[{}] is {}, expected 0 <= target < V = {}", i, targets[i], a.V);
    with_real(a.logits.dtype, [&]<class T>() {
        T* logits = a.logits.as<T>();  // (BT, Vp)
        T* loss = a.loss.as<T>();      // (BT)
#pragma omp parallel for schedule(static) if (BT * Vp >= kParallelFrom)
        for (size_t i = 0; i < BT; i++)
            row(logits + i * Vp, targets[i], a.V, a.Vp, T(a.grad_scale), loss[i], correct ? correct + i : nullptr);
    });
}
}  // namespace cpu
