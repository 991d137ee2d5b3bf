// The hash of a tensor's bits (common/hash.h).
//
//   y = sum_i hash_word(i, word i of x) mod 2^64
//
//   shapes     x: any numbers, a multiple of 4 bytes    y (2) u32: low, high
//   traffic    one read; about 30 integer instructions per word.   bound: compute
//   limits     any size; 16-byte accesses where x starts on such a boundary, single bytes otherwise
//   order      any order gives the same value; up to kMaxBlocks sums pass through the workspace
#include "common/hash.h"
#include "kernels/cuda/launch.h"
#include "kernels/elementwise.cuh"

#include <algorithm>

namespace {
using device::kElementThreads;
constexpr size_t kMaxBlocks = 1024;

__device__ __forceinline__ uint64_t block_sum_to_one(uint64_t sum) {  // thread 0 gets the sum
    SIMT_SHARED(uint64_t, part, [kElementThreads / 32]);
    return device::block_sum(sum, part);
}

__global__ void hash_parts_kernel(uint64_t* parts,   // (gridDim.x)
                                  const uint8_t* x,  // (4 * n_words)
                                  size_t n_words, bool vectors) {
    const size_t first = size_t(blockIdx.x) * kElementThreads + threadIdx.x, step = size_t(gridDim.x) * kElementThreads;
    const size_t n_vectors = vectors ? n_words / 4 : 0;
    uint64_t sum = 0;
    for (size_t i = first; i < n_vectors; i += step) {
        const uint4 w = simt::ld_vec<uint4>(x + 16 * i);
        sum +=
            hash_word(4 * i, w.x) + hash_word(4 * i + 1, w.y) + hash_word(4 * i + 2, w.z) + hash_word(4 * i + 3, w.w);
    }
    for (size_t i = 4 * n_vectors + first; i < n_words; i += step) {
        const uint8_t* b = x + 4 * i;
        sum += hash_word(i, b[0] | uint32_t(b[1]) << 8 | uint32_t(b[2]) << 16 | uint32_t(b[3]) << 24);
    }
    sum = block_sum_to_one(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__global__ void hash_kernel(uint32_t* y,            // (2)
                            const uint64_t* parts,  // (n_parts)
                            int n_parts) {
    uint64_t sum = 0;
    for (int i = int(threadIdx.x); i < n_parts; i += int(kElementThreads)) sum += parts[i];
    sum = block_sum_to_one(sum);
    if (threadIdx.x == 0) {
        y[0] = uint32_t(sum);
        y[1] = uint32_t(sum >> 32);
    }
}
}  // namespace

namespace cuda {
void hash(const Hash& a, Stream s) {
    const auto* x = static_cast<const uint8_t*>(a.x.data);  // (n_bytes)
    const size_t n_words = a.x.n_bytes() / 4;
    const size_t blocks = std::clamp(n_words / (4 * kElementThreads), size_t(1), kMaxBlocks);
    auto* parts = workspace<uint64_t>(s, blocks, "hash");  // (blocks)
    cuda::launch(hash_parts_kernel, dim3(unsigned(blocks)), dim3(kElementThreads), 0, s, parts, x, n_words,
                 device::aligned16(x));
    cuda::launch(hash_kernel, dim3(1), dim3(kElementThreads), 0, s, a.y.as<uint32_t>(), parts, int(blocks));
}
}  // namespace cuda
