// The small ops: add, cast, tree_sum, row_sum, hash.
//
//   add        y[i] += x[i]                   shapes (n)
//   cast       y[i] = x[i] rounded            shapes (n)
//   tree_sum   y[i] = tree over p of x[p,i]   shapes y (n), x (parts, n)
//   row_sum    y[b] = sum_t x[b,t]            shapes y (B), x (B, T)
//   hash       sum_i hash_word(i, word i)     shapes x: a multiple of 4 bytes, y (2): low, high
//
//   traffic    add 2 reads, 1 write per element; cast 1 and 1; tree_sum 2 (parts-1) and parts-1, and one copy; row_sum
//              and hash one read.   bound: memory, hash: integer multiplication
//   order      row_sum: t ascending, in double.  tree_sum: the tree of ops.h, equal on every backend
#include "common/hash.h"
#include "kernels/cpu/cpu.h"

#include <algorithm>
#include <cstring>

namespace {
template <class T>
void add_range(T* y, const T* x, size_t n) {  // y, x (n)
#pragma omp parallel for simd schedule(static) if (n >= cpu::kParallelFrom)
    for (size_t i = 0; i < n; i++) y[i] += x[i];
}

template <class T>
void row_sums(T* y, const T* x, int B, size_t n) {  // y (B), x (B, n)
    for (int b = 0; b < B; b++) {
        double sum = 0;
        for (size_t t = 0; t < n; t++) sum += double(x[b * n + t]);
        y[b] = T(sum);
    }
}

// The sum of a pair replaces its left part; the last sum is in part 0.
void tree_sums(float* y, float* x, size_t parts, size_t n) {  // y (n), x (parts, n)
    for (size_t stride = 1; stride < parts; stride *= 2)
        for (size_t p = 0; p < parts; p += 2 * stride) add_range(x + p * n, x + (p + stride) * n, n);
    if (y != x) std::copy(x, x + n, y);
}

template <class To>
void round_to(To* y, const float* x, size_t n) {  // y, x (n)
#pragma omp parallel for schedule(static) if (n >= cpu::kParallelFrom)
    for (size_t i = 0; i < n; i++) y[i] = To(x[i]);
}

// Reads words by memcpy: a slice of two-byte numbers may start between words.
uint64_t hash_words(const char* x, size_t n_words) {  // x (4 * n_words)
    uint64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum) if (n_words >= cpu::kParallelFrom)
    for (size_t i = 0; i < n_words; i++) {
        uint32_t word;
        std::memcpy(&word, x + 4 * i, 4);
        sum += hash_word(i, word);
    }
    return sum;
}
}  // namespace

namespace cpu {
void add(const Add& a, Stream) {
    with_real(a.y.dtype, [&]<class T>() { add_range(a.y.as<T>(), a.x.as<T>(), a.y.count); });
}

void row_sum(const RowSum& a, Stream) {
    with_real(a.x.dtype, [&]<class T>() { row_sums(a.y.as<T>(), a.x.as<T>(), a.B, size_t(a.T)); });
}

void tree_sum(const TreeSum& a, Stream) { tree_sums(a.y.as<float>(), a.x.as<float>(), size_t(a.parts), a.y.count); }

void cast(const Cast& a, Stream) {
    const float* x = a.x.as<float>();  // (n)
    if (a.y.dtype == DType::bf16)
        round_to(a.y.as<bf16>(), x, a.x.count);
    else
        round_to(a.y.as<float>(), x, a.x.count);
}

void hash(const Hash& a, Stream) {
    uint32_t* y = a.y.as<uint32_t>();  // (2)
    const uint64_t sum = hash_words(static_cast<const char*>(a.x.data), a.x.n_bytes() / 4);
    y[0] = uint32_t(sum);
    y[1] = uint32_t(sum >> 32);
}
}  // namespace cpu
