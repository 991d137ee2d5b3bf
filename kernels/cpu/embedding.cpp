// Token and position embedding.
//
//   forward    y[b,t] = wte[token[b,t]] + wpe[t]
//   backward   dwte[v] += sum over (b,t) with token v of dy[b,t]      dwpe[t] (+)= sum_b dy[b,t]
//
//   shapes     y, dy (B, T, C)    tokens (B, T)    wte (Vp, C)    wpe (>= T, C)
//   traffic    backward touches only the rows of dwte that occur: 2 BT C elements, not V C.   bound: memory
//   limits     any C >= 1; a token outside [0, V) is refused before anything is written
//   order      dwte: positions ascending, onto the old values; dwpe: b ascending.  Tasks are blocks of columns.
#include "kernels/cpu/cpu.h"

namespace {
constexpr int kColumns = 32;  // of one task of the backward: two cache lines of each row

template <class T>
void forward(const Embedding& a) {
    T* y = a.y.as<T>();                              // (BT, C)
    const T* wte = a.wte.as<T>();                    // (Vp, C)
    const T* wpe = a.wpe.as<T>();                    // (>= T, C)
    const int32_t* tokens = a.tokens.as<int32_t>();  // (BT)
    const size_t BT = size_t(a.B) * a.T, C = size_t(a.C);
#pragma omp parallel for schedule(static) if (BT * C >= cpu::kParallelFrom)
    for (size_t bt = 0; bt < BT; bt++) {
        const T* word = wte + size_t(tokens[bt]) * C;  // (C)
        const T* place = wpe + bt % size_t(a.T) * C;   // (C)
#pragma omp simd
        for (size_t c = 0; c < C; c++) y[bt * C + c] = word[c] + place[c];
    }
}

// Columns [c0, c1) of both gradients.
template <class T>
void backward_columns(const EmbeddingGrad& a, size_t c0, size_t c1) {
    T* dwte = a.dwte.as<T>();                        // (Vp, C)
    T* dwpe = a.dwpe.as<T>();                        // (>= T, C)
    const T* dy = a.dy.as<T>();                      // (B, T, C)
    const int32_t* tokens = a.tokens.as<int32_t>();  // (B, T)
    const size_t C = size_t(a.C), BT = size_t(a.B) * a.T;
    for (size_t i = 0; i < BT; i++) {
        T* row = dwte + size_t(tokens[i]) * C;
#pragma omp simd
        for (size_t c = c0; c < c1; c++) row[c] += dy[i * C + c];
    }
    const size_t rows = a.dwpe.count / C;
    for (size_t t = 0; t < rows && !a.accumulate; t++)
        for (size_t c = c0; c < c1; c++) dwpe[t * C + c] = 0;
    for (size_t i = 0; i < BT; i++) {
        T* row = dwpe + i % size_t(a.T) * C;
#pragma omp simd
        for (size_t c = c0; c < c1; c++) row[c] += dy[i * C + c];
    }
}

void expect_tokens(const char* what, const Buf& tokens, int V) {
    const int32_t* t = tokens.as<int32_t>();
    for (size_t i = 0; i < tokens.count; i++)
        if (t[i] < 0 || t[i] >= V) fail(Exit::data, "{}[{}] is {}, expected 0 <= token < V = {}", what, i, t[i], V);
}
}  // namespace

namespace cpu {
void embedding_forward(const Embedding& a, Stream) {
    expect_tokens("embedding.tokens", a.tokens, a.V);
    with_real(a.y.dtype, [&]<class T>() { forward<T>(a); });
}

void embedding_backward(const EmbeddingGrad& a, Stream) {
    const size_t BT = size_t(a.B) * a.T, C = size_t(a.C);
    expect_tokens("embedding.tokens", a.tokens, a.V);
    with_real(a.dy.dtype, [&]<class T>() {
        expect_dtype<T>({a.dwte, a.dwpe, a.dy});
#pragma omp parallel for schedule(static) if (BT * C >= kParallelFrom)
        for (size_t c0 = 0; c0 < C; c0 += kColumns) backward_columns<T>(a, c0, c0 + kColumns < C ? c0 + kColumns : C);
    });
}
}  // namespace cpu
