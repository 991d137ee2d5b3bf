// Kernels of the kinds that kiln has, each with the defects that are likely in its kind.  DEFECT selects one.
#pragma once
#include <cmath>
#include <cstring>

#include "kernels/ptx.cuh"

enum class Defect {
    none,
    no_barrier,           // between a write to shared memory and other threads' reads, or before the next write
    no_copy_wait,         // for cp.async
    shared_off_by_a_row,  // an index into shared memory
    no_bounds_check,      // a tail in global memory
    no_full_wait,         // the consumer of a pipeline does not wait for its data
    no_empty_wait,        // the producer does not wait for its buffer
    no_proxy_fence,       // between ordinary stores and the TMA store that reads them
    init_not_published,   // mbarriers used without a barrier after their init
    expects_too_many_bytes,
    read_before_wait,     // of wgmma's accumulators
    write_before_wait,    // to wgmma's accumulators
    operand_before_wait,  // a write to wgmma's operand in registers
    write_over_operand    // in shared memory, by a warp that knows of its own wait only
};

__global__ inline void vector_add_kernel(const float* a, const float* b, float* c, int n) {
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) c[i] = a[i] + b[i];
}

template <class T>
__device__ __forceinline__ T sum_of_warp(T v) {
    for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

// out[block] = sum of a row
template <Defect DEFECT>
__global__ void block_sum_kernel(const float* in, float* out, int n) {  // (blocks, n), (blocks)
    SIMT_SHARED(float, part, [32]);
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, n_warps = int(blockDim.x) / 32;
    float v = 0.0f;
    for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) v += in[size_t(blockIdx.x) * n + i];
    v = sum_of_warp(v);
    if (lane == 0) part[warp] = v;
    if (DEFECT != Defect::no_barrier) __syncthreads();
    if (warp != 0) return;
    v = sum_of_warp(lane < n_warps ? part[lane] : 0.0f);
    if (lane == 0) out[blockIdx.x] = v;
}

// y = (x - mean) rstd w + b, one block per row, eight bf16 per thread and step
__global__ inline void layernorm_kernel(const bf16* x, const float* w, const float* b, bf16* y, int C) {
    SIMT_SHARED(float, part, [2][32]);
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, n_warps = int(blockDim.x) / 32;
    const size_t row = size_t(blockIdx.x) * C;
    struct alignas(16) Eight {
        bf16 v[8];
    };
    float s = 0.0f, q = 0.0f;
    for (int i = int(threadIdx.x) * 8; i < C; i += int(blockDim.x) * 8) {
        const auto in = simt::ld_vec<Eight>(x + row + i);
        for (int k = 0; k < 8; k++) s += float(in.v[k]), q += float(in.v[k]) * float(in.v[k]);
    }
    s = sum_of_warp(s);
    q = sum_of_warp(q);
    if (lane == 0) part[0][warp] = s, part[1][warp] = q;
    __syncthreads();
    s = q = 0.0f;
    for (int k = 0; k < n_warps; k++) s += part[0][k], q += part[1][k];
    const float mean = s / float(C), rstd = rsqrtf(q / float(C) - mean * mean + 1e-5f);
    for (int i = int(threadIdx.x) * 8; i < C; i += int(blockDim.x) * 8) {
        auto v = simt::ld_vec<Eight>(x + row + i);
        for (int k = 0; k < 8; k++) v.v[k] = bf16((float(v.v[k]) - mean) * rstd * w[i + k] + b[i + k]);
        simt::st_vec(y + row + i, v);
    }
}

// c = a b^T: tiles of 64 x 64 x 32, four warps, double-buffered cp.async, ldmatrix, mma.sync
template <Defect DEFECT>
__global__ void __launch_bounds__(128)
    gemm_kernel(const bf16* a, const bf16* b, float* c, int M, int N, int K) {  // (M, K), (N, K), (M, N)
    constexpr int kM = 64, kN = 64, kK = 32, kRow = kK + 8;
    SIMT_SHARED(bf16, sa, [2][kM * kRow]);
    SIMT_SHARED(bf16, sb, [2][kN * kRow]);
    const int t = int(threadIdx.x), lane = t % 32, warp = t / 32, m0 = int(blockIdx.y) * kM, n0 = int(blockIdx.x) * kN;
    const bool unchecked = DEFECT == Defect::no_bounds_check;
    const auto load = [&](int buffer, int k0) {
        for (int i = t; i < kM * kK / 8; i += 128) {
            const int r = i / (kK / 8), k = i % (kK / 8) * 8, to = DEFECT == Defect::shared_off_by_a_row ? r + 1 : r;
            ptx::cp_async16(&sa[buffer][to * kRow + k], a + size_t(m0 + r) * K + k0 + k, unchecked || m0 + r < M);
            ptx::cp_async16(&sb[buffer][r * kRow + k], b + size_t(n0 + r) * K + k0 + k, unchecked || n0 + r < N);
        }
        ptx::cp_async_commit();
    };
    float d[8][4] = {};
    load(0, 0);
    const int n_tiles = K / kK;
    for (int tile = 0; tile < n_tiles; tile++) {
        if (tile + 1 < n_tiles) load((tile + 1) % 2, (tile + 1) * kK);
        if (DEFECT == Defect::no_copy_wait) {
        } else if (tile + 1 < n_tiles) {
            ptx::cp_async_wait<1>();
        } else {
            ptx::cp_async_wait<0>();
        }
        __syncthreads();
        SIMT_UNROLL
        for (int k = 0; k < kK; k += 16) {
            uint32_t af[4];
            ptx::ldmatrix_x4(af, &sa[tile % 2][(warp * 16 + lane % 16) * kRow + k + lane / 16 * 8]);
            SIMT_UNROLL
            for (int n = 0; n < 8; n += 2) {
                uint32_t r[4];
                ptx::ldmatrix_x4(r, &sb[tile % 2][(n * 8 + lane % 8 + lane / 16 * 8) * kRow + k + lane / 8 % 2 * 8]);
                const uint32_t b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
                ptx::mma_m16n8k16(d[n], af, b0);
                ptx::mma_m16n8k16(d[n + 1], af, b1);
            }
        }
        if (DEFECT != Defect::no_barrier) __syncthreads();
    }
    for (int n = 0; n < 8; n++) {
        for (int h = 0; h < 2; h++) {
            const int row = m0 + warp * 16 + lane / 4 + h * 8, column = n0 + n * 8 + lane % 4 * 2;
            if (row < M && column < N)
                simt::st_vec(c + size_t(row) * N + column, make_float2(d[n][2 * h], d[n][2 * h + 1]));
        }
    }
}

// Causal attention, FlashAttention-2 style, head size 64; smem: q, k and v tiles of 64 x 64
template <Defect DEFECT>
__global__ void __launch_bounds__(128)
    flash_kernel(const bf16* q, const bf16* k, const bf16* v, bf16* o, int T, float scale) {  // (heads, T, 64) each
    SIMT_DYN_SHARED(smem);
    bf16 *sq = reinterpret_cast<bf16*>(smem), *sk = sq + 64 * 64, *sv = sk + 64 * 64;
    const int t = int(threadIdx.x), lane = t % 32, warp = t / 32, q0 = int(blockIdx.x) * 64;
    const size_t head = size_t(blockIdx.y) * T * 64;
    // Chunks of 16 bytes are swizzled by their row, so that ldmatrix has no bank conflicts.
    const auto at = [](bf16* s, int r, int c) { return s + r * 64 + ((c / 8) ^ (r & 7)) * 8 + c % 8; };
    const auto load = [&](bf16* s, const bf16* g, int r0) {
        for (int i = t; i < 64 * 8; i += 128) {
            const int r = i / 8, c = i % 8 * 8;
            ptx::cp_async16(at(s, r, c), g + head + size_t(r0 + r) * 64 + c, r0 + r < T);
        }
    };
    load(sq, q, q0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    uint32_t qf[4][4];
    for (int i = 0; i < 4; i++) ptx::ldmatrix_x4(qf[i], at(sq, warp * 16 + lane % 16, i * 16 + lane / 16 * 8));
    float out[8][4] = {}, peak[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    const float log2_scale = scale * 1.4426950408889634f;
    for (int j0 = 0; j0 <= q0; j0 += 64) {
        if (DEFECT != Defect::no_barrier) __syncthreads();
        load(sk, k, j0);
        load(sv, v, j0);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        __syncthreads();
        float s[8][4] = {};
        for (int i = 0; i < 4; i++) {
            for (int n = 0; n < 8; n += 2) {
                uint32_t r[4];
                ptx::ldmatrix_x4(r, at(sk, n * 8 + lane % 8 + lane / 16 * 8, i * 16 + lane / 8 % 2 * 8));
                const uint32_t b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
                ptx::mma_m16n8k16(s[n], qf[i], b0);
                ptx::mma_m16n8k16(s[n + 1], qf[i], b1);
            }
        }
        for (int h = 0; h < 2; h++) {
            const int row = q0 + warp * 16 + lane / 4 + h * 8;
            float m = peak[h];
            for (int n = 0; n < 8; n++) {
                for (int e = 2 * h; e < 2 * h + 2; e++) {
                    if (j0 + n * 8 + lane % 4 * 2 + e % 2 > row) s[n][e] = -INFINITY;
                    m = fmaxf(m, s[n][e]);
                }
            }
            m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
            m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
            const float correction = ptx::ex2((peak[h] - m) * log2_scale);
            float row_sum = 0.0f;
            peak[h] = m;
            for (int n = 0; n < 8; n++) {
                for (int e = 2 * h; e < 2 * h + 2; e++) {
                    s[n][e] = ptx::ex2((s[n][e] - m) * log2_scale);
                    row_sum += s[n][e];
                    out[n][e] *= correction;
                }
            }
            sum[h] = sum[h] * correction + row_sum;
        }
        for (int i = 0; i < 4; i++) {
            const uint32_t p[4] = {ptx::pack_bf16(s[2 * i][0], s[2 * i][1]), ptx::pack_bf16(s[2 * i][2], s[2 * i][3]),
                                   ptx::pack_bf16(s[2 * i + 1][0], s[2 * i + 1][1]),
                                   ptx::pack_bf16(s[2 * i + 1][2], s[2 * i + 1][3])};
            for (int n = 0; n < 8; n += 2) {
                uint32_t r[4];
                ptx::ldmatrix_x4_trans(r, at(sv, i * 16 + lane % 16, n * 8 + lane / 16 * 8));
                const uint32_t b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
                ptx::mma_m16n8k16(out[n], p, b0);
                ptx::mma_m16n8k16(out[n + 1], p, b1);
            }
        }
    }
    for (int h = 0; h < 2; h++) {
        float total = sum[h];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const int row = q0 + warp * 16 + lane / 4 + h * 8;
        if (row >= T) continue;
        for (int n = 0; n < 8; n++) {
            const uint32_t two = ptx::pack_bf16(out[n][2 * h] / total, out[n][2 * h + 1] / total);
            std::memcpy(o + head + size_t(row) * 64 + n * 8 + lane % 4 * 2, &two, 4);
        }
    }
}

// Hopper: c (+)= a op(b), tiles of 64 x 128 x 64; one warp issues TMA, four multiply; a ring of two buffers.
// TB: 0 when b is (N, K), 1 when it is (K, N).  RS: A from registers.  ADD: TMA adds to c.
template <int TB, bool RS, bool ADD, Defect DEFECT>
__global__ void __launch_bounds__(160)
    hopper_gemm_kernel(SIMT_PARAM simt::TensorMap map_a, SIMT_PARAM simt::TensorMap map_b,
                       SIMT_PARAM simt::TensorMap map_c, int K) {
    constexpr int kBuffers = 2, kBytesA = 64 * 128, kBytesB = 128 * 128;
    SIMT_DYN_SHARED(smem);
    SIMT_SHARED(uint64_t, full, [kBuffers]);
    SIMT_SHARED(uint64_t, empty, [kBuffers]);
    uint8_t *sa = smem, *sb = smem + kBuffers * kBytesA;
    auto* sc = reinterpret_cast<float*>(smem + kBuffers * (kBytesA + kBytesB));
    const int t = int(threadIdx.x), warp = t / 32, lane = t % 32, m0 = int(blockIdx.y) * 64, n0 = int(blockIdx.x) * 128;
    const int n_tiles = K / 64;
    if (t == 0) {
        for (int i = 0; i < kBuffers; i++) ptx::mbar_init(&full[i], 1), ptx::mbar_init(&empty[i], 4);
        ptx::fence_mbarrier_init();
    }
    if (DEFECT != Defect::init_not_published) __syncthreads();
    if (warp == 4) {
        if (!ptx::elect_one()) return;
        for (int tile = 0; tile < n_tiles; tile++) {
            const int i = tile % kBuffers;
            if (tile >= kBuffers && DEFECT != Defect::no_empty_wait)
                ptx::mbar_wait(&empty[i], (tile / kBuffers - 1) & 1);
            ptx::mbar_arrive_expect_tx(&full[i],
                                       kBytesA + kBytesB + (DEFECT == Defect::expects_too_many_bytes ? 16 : 0));
            ptx::tma_load_2d(sa + i * kBytesA, &map_a, &full[i], tile * 64, m0);
            if (TB == 0) {
                ptx::tma_load_2d(sb + i * kBytesB, &map_b, &full[i], tile * 64, n0);
            } else {
                ptx::tma_load_2d(sb + i * kBytesB, &map_b, &full[i], n0, tile * 64);
                ptx::tma_load_2d(sb + i * kBytesB + kBytesB / 2, &map_b, &full[i], n0 + 64, tile * 64);
            }
        }
        return;
    }
    float d[64];
    SIMT_UNROLL
    for (int i = 0; i < 64; i++) d[i] = 0.0f;
    for (int tile = 0; tile < n_tiles; tile++) {
        const int i = tile % kBuffers;
        if (DEFECT != Defect::no_full_wait) ptx::mbar_wait(&full[i], (tile / kBuffers) & 1);
        uint32_t af[4][4];
        if (RS) {
            for (int k = 0; k < 4; k++) {
                const int row = warp * 16 + lane % 16, chunk = k * 2 + lane / 16;
                ptx::ldmatrix_x4(af[k], sa + i * kBytesA + row * 128 + ((chunk ^ (row & 7)) << 4));
            }
        }
        ptx::wgmma_fence();
        SIMT_UNROLL
        for (int k = 0; k < 4; k++) {
            uint8_t* b = sb + i * kBytesB + (TB ? k * 2048 : k * 32);
            const uint64_t desc_b = ptx::wgmma_desc_sw128(b, TB ? 8192 : 16, 1024);
            if constexpr (RS)
                ptx::wgmma_m64n128k16_rs<TB>(d, af[k], desc_b, 1);
            else
                ptx::wgmma_m64n128k16_ss<0, TB>(d, ptx::wgmma_desc_sw128(sa + i * kBytesA + k * 32, 16, 1024), desc_b,
                                                1);
        }
        ptx::wgmma_commit();
        if (DEFECT == Defect::write_before_wait) d[7] = 0.0f;
        if (DEFECT == Defect::operand_before_wait) af[1][2]++;
        if (DEFECT != Defect::read_before_wait) ptx::wgmma_wait<0>();
        if (DEFECT == Defect::write_over_operand && lane == 0) sa[i * kBytesA + 128 * 16 * warp] = 0;
        if (RS) __syncwarp();  // the other lanes' ldmatrix before lane 0 gives the buffer back
        if (lane == 0) ptx::mbar_arrive(&empty[i]);
    }
    SIMT_UNROLL
    for (int j = 0; j < 32; j++) {
        const int row = warp * 16 + lane / 4 + j % 2 * 8, column = j / 2 * 8 + lane % 4 * 2, i = j / 2 * 4 + j % 2 * 2;
        simt::st_vec(sc + row * 128 + column, make_float2(d[i], d[i + 1]));
    }
    if (DEFECT != Defect::no_proxy_fence) ptx::fence_proxy_async();
    ptx::bar_sync(1, 128);
    if (t == 0) {
        if (ADD)
            ptx::tma_reduce_add_2d(&map_c, sc, n0, m0);
        else
            ptx::tma_store_2d(&map_c, sc, n0, m0);
        ptx::bulk_commit();
        ptx::bulk_wait<0>();
    }
    if (DEFECT == Defect::read_before_wait) ptx::wgmma_wait<0>();
}
