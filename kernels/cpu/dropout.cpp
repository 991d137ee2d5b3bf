// Dropout and the residual sum that follows it.
//
//   y = keep ? x / (1-p) : 0,   + residual where given;   p = 0 leaves y = x + residual
//
//   shapes     y, x, residual (B, T, C)    mask element t*C + c of batch row b
//   traffic    one read (two with the residual), one write; ten Philox rounds per four elements.   bound: compute
//   limits     any size; y may be x or residual itself
//   order      none: element by element
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/mask.h"

#include <algorithm>

namespace {
constexpr size_t kPiece = 1024;  // elements of one task, a multiple of 4: whole Philox counters

// n elements of row b from `element` on.
template <class T>
void piece(T* y, const T* x, const T* residual, const cpu::Mask& mask, int b, size_t element, size_t n) {
    uint32_t words[cpu::Mask::words_for(kPiece)];
    T factor[kPiece];  // 0 or 1/(1-p)
    const T scale = T(mask.scale);
    const uint32_t* word = mask.on ? mask.fill(words, b, element, n) : nullptr;
#pragma omp simd
    for (size_t i = 0; i < n; i++) factor[i] = word == nullptr || word[i] < mask.below ? scale : T(0);
    if (residual) {
#pragma omp simd
        for (size_t i = 0; i < n; i++) y[i] = (factor[i] == 0 ? T(0) : x[i] * factor[i]) + residual[i];
    } else {
#pragma omp simd
        for (size_t i = 0; i < n; i++) y[i] = factor[i] == 0 ? T(0) : x[i] * factor[i];
    }
}
}  // namespace

namespace cpu {
void dropout(const Dropout& a, Stream) {
    const size_t row = size_t(a.T) * a.C, n = size_t(a.B) * row;  // elements of one sequence, of all
    const Mask mask(a.mask);
    with_real(a.x.dtype, [&]<class T>() {
        T* y = a.y.as<T>();                      // (B, T, C)
        const T* x = a.x.as<T>();                // (B, T, C)
        const T* residual = a.residual.as<T>();  // (B, T, C) or null
        const size_t pieces = (row + kPiece - 1) / kPiece;
#pragma omp parallel for collapse(2) schedule(static) if (n >= kParallelFrom / 8)
        for (int b = 0; b < a.B; b++)
            for (size_t i = 0; i < pieces; i++) {
                const size_t e = i * kPiece, at = size_t(b) * row + e;
                piece(y + at, x + at, residual ? residual + at : nullptr, mask, b, e, std::min(kPiece, row - e));
            }
    });
}
}  // namespace cpu
