// One small test per instruction that ptx.cuh wraps and per CUDA spelling that kernels use, written from the definition
// in the PTX manual and not from the emulator.  The tests run emulated and on a GPU: they tie the emulator to hardware.
// Made to fail by: an operand's map with two indices swapped, a swizzle on other address bits, a wrong barrier count.
#include <doctest/doctest.h>

#include <cmath>

#include "kernels/ptx.cuh"
#include "kernels/tensor_map.h"
#include "emulator/test/device_array.h"

// A native binary has the Hopper tests only for compute capability 9.0a (-DKILN_SM90=1), an emulated one always.
#ifndef KILN_SM90
#define KILN_SM90 SIMT_EMULATED
#endif

namespace {
constexpr unsigned kAll = 0xffffffffu;

template <class... P, class... A>
void run(void (*kernel)(P...), dim3 grid, dim3 block, size_t n_shared_bytes, A... arguments) {
    expect_success(simt::launch(kernel, grid, block, n_shared_bytes, nullptr, arguments...));
    expect_success(cudaDeviceSynchronize());
}

// ---- votes, shuffles, reductions ----
__global__ void isa_shuffle_kernel(unsigned* out) {  // (4, 64)
    const unsigned t = threadIdx.x, lane = t % 32;
    out[t] = __shfl_sync(kAll, lane, 40);  // 40 mod 32
    out[64 + t] = __shfl_up_sync(kAll, lane, 5);
    out[128 + t] = __shfl_down_sync(kAll, lane, 7, 16);
    out[192 + t] = __shfl_xor_sync(kAll, lane, 9, 16);
}
TEST_CASE("isa: shuffles") {
    DeviceArray<unsigned> out(256);
    run(isa_shuffle_kernel, 1, 64, 0, out.data());
    const auto got = out.host();
    for (unsigned t = 0; t < 64; t++) {
        const unsigned lane = t % 32;
        CAPTURE(t);
        CHECK(got[t] == 8);
        CHECK(got[64 + t] == (lane < 5 ? lane : lane - 5));
        CHECK(got[128 + t] == (lane % 16 + 7 < 16 ? lane + 7 : lane));
        CHECK(got[192 + t] == (lane ^ 9));
    }
}

__global__ void isa_vote_kernel(unsigned* out) {  // (8, 64)
    const unsigned t = threadIdx.x, lane = t % 32;
    out[t] = __ballot_sync(kAll, lane % 3 == 0);
    out[64 + t] = unsigned(__any_sync(kAll, lane == 31) * 2 + __all_sync(kAll, lane < 31));
    out[128 + t] = __reduce_add_sync(kAll, lane * lane);
    out[192 + t] = __reduce_max_sync(lane < 20 ? 0x000fffffu : 0xfff00000u, lane);
    out[256 + t] = __reduce_or_sync(kAll, 1u << lane / 2);
    out[320 + t] = unsigned(__syncthreads_count(t % 5 == 0));
    out[384 + t] = unsigned(__syncthreads_and(t < 63) * 2 + __syncthreads_and(t < 64));
    out[448 + t] = unsigned(__syncthreads_or(t == 63) * 2 + __syncthreads_or(t == 64));
}
TEST_CASE("isa: votes and reductions") {
    DeviceArray<unsigned> out(512);
    run(isa_vote_kernel, 1, 64, 0, out.data());
    const auto got = out.host();
    for (unsigned t = 0; t < 64; t++) {
        CAPTURE(t);
        CHECK(got[t] == 0x49249249u);
        CHECK(got[64 + t] == 2);
        CHECK(got[128 + t] == 31 * 32 * 63 / 6);
        CHECK(got[192 + t] == (t % 32 < 20 ? 19u : 31u));
        CHECK(got[256 + t] == 0xffffu);
        CHECK(got[320 + t] == 13);
        CHECK(got[384 + t] == 1);
        CHECK(got[448 + t] == 2);
    }
}

// ---- barriers, atomics ----
// Warps 0, 1 fill a buffer, warps 2, 3 read it: barrier 1 says full, barrier 2 says free.
__global__ void isa_named_barrier_kernel(unsigned* out) {  // (4, 64)
    SIMT_SHARED(unsigned, buffer, [64]);
    const unsigned t = threadIdx.x;
    for (unsigned round = 0; round < 4; round++) {
        if (t < 64) {
            if (round > 0) ptx::bar_sync(2, 128);
            buffer[t] = round * 100 + t;
            ptx::bar_arrive(1, 128);
        } else {
            ptx::bar_sync(1, 128);
            out[round * 64 + t - 64] = buffer[127 - t];
            if (round < 3) ptx::bar_arrive(2, 128);
        }
    }
}
TEST_CASE("isa: named barriers") {
    DeviceArray<unsigned> out(256);
    run(isa_named_barrier_kernel, 1, 128, 0, out.data());
    const auto got = out.host();
    for (unsigned i = 0; i < 256; i++) CHECK(got[i] == i / 64 * 100 + 63 - i % 64);
}

__global__ void isa_atomic_kernel(int* counts, float* sum) {  // (8), (1)
    atomicAdd(&counts[threadIdx.x % 4], 1);
    atomicMax(&counts[4], int(blockIdx.x * blockDim.x + threadIdx.x));
    atomicMin(&counts[5], -int(threadIdx.x));
    atomicCAS(&counts[6], 0, int(threadIdx.x) + 1);
    atomicAdd(sum, 0.5f);
}
TEST_CASE("isa: atomics") {
    DeviceArray<int> counts(std::vector<int>(8, 0));
    DeviceArray<float> sum(std::vector<float>(1, 0.0f));
    run(isa_atomic_kernel, 3, 128, 0, counts.data(), sum.data());
    const auto got = counts.host();
    for (int i = 0; i < 4; i++) CHECK(got[size_t(i)] == 96);
    CHECK(got[4] == 383);
    CHECK(got[5] == -127);
    CHECK(got[6] >= 1);
    CHECK(got[6] <= 128);
    CHECK(sum.host()[0] == 192.0f);
}

// ---- arithmetic ----
__global__ void isa_approximate_kernel(const float* x, float* y) {  // (64), (3, 64)
    const unsigned t = threadIdx.x;
    y[t] = ptx::ex2(x[t] - 3.0f);
    y[64 + t] = ptx::lg2(x[t]);
    y[128 + t] = ptx::rcp(x[t]);
}
TEST_CASE("isa: ex2, lg2, rcp") {
    std::vector<float> x(64);
    for (size_t i = 0; i < x.size(); i++) x[i] = 0.11f + 0.37f * float(i);
    DeviceArray<float> in(x), out(192);
    run(isa_approximate_kernel, 1, 64, 0, in.data(), out.data());
    const auto got = out.host();
    for (size_t i = 0; i < 64; i++) {  // the manual bounds the errors of these by 2^-22 relative, or absolute for lg2
        const double v = x[i], e2 = std::exp2(double(x[i] - 3.0f));
        CHECK(std::abs(got[i] - e2) <= e2 * 0x1p-22);
        CHECK(std::abs(got[64 + i] - std::log2(v)) <= std::max(1.0, std::abs(std::log2(v))) * 0x1p-21);
        CHECK(std::abs(got[128 + i] - 1 / v) <= 1 / v * 0x1p-22);
    }
}

// ---- cp.async ----
__global__ void isa_cp_async_kernel(const uint32_t* in, uint32_t* out) {  // (128), (3, 128)
    SIMT_SHARED(uint4, by16, [32]);
    SIMT_SHARED(uint2, by8, [64]);
    SIMT_SHARED(uint32_t, by4, [128]);
    const unsigned t = threadIdx.x;
    if (t < 32) ptx::cp_async16(&by16[t], in + t * 4, t != 5);
    ptx::cp_async_commit();
    if (t < 64) ptx::cp_async8(&by8[t], in + t * 2, t != 7);
    ptx::cp_async4(&by4[t], in + t, t != 9);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();  // the first group
    __syncthreads();
    out[t] = reinterpret_cast<const uint32_t*>(by16)[t];
    ptx::cp_async_wait<0>();
    __syncthreads();
    out[128 + t] = reinterpret_cast<const uint32_t*>(by8)[t];
    out[256 + t] = by4[t];
}
TEST_CASE("isa: cp.async of 16, 8 and 4 bytes, zeros where not valid") {
    std::vector<uint32_t> values(128);
    for (uint32_t i = 0; i < 128; i++) values[i] = i * i + 1;
    DeviceArray<uint32_t> in(values), out(384);
    run(isa_cp_async_kernel, 1, 128, 0, in.data(), out.data());
    const auto got = out.host();
    for (uint32_t i = 0; i < 128; i++) {
        CHECK(got[i] == (i / 4 == 5 ? 0 : values[i]));
        CHECK(got[128 + i] == (i / 2 == 7 ? 0 : values[i]));
        CHECK(got[256 + i] == (i == 9 ? 0 : values[i]));
    }
}

// ---- ldmatrix: matrix m is rows 8m .. 8m+7 of `in`; lane l points to row l ----
__global__ void isa_ldmatrix_kernel(const bf16* in, uint32_t* x4, uint32_t* x4_trans, uint32_t* x2,
                                    uint32_t* x2_trans) {
    SIMT_SHARED(uint4, rows, [32]);
    const unsigned t = threadIdx.x;
    rows[t] = simt::ld_vec<uint4>(in + t * 8);
    __syncthreads();
    uint32_t r[4], q[4], r2[2], q2[2];
    ptx::ldmatrix_x4(r, &rows[t]);
    ptx::ldmatrix_x4_trans(q, &rows[t]);
    ptx::ldmatrix_x2(r2, &rows[t]);
    ptx::ldmatrix_x2_trans(q2, &rows[t]);
    for (unsigned i = 0; i < 4; i++) x4[t * 4 + i] = r[i], x4_trans[t * 4 + i] = q[i];
    for (unsigned i = 0; i < 2; i++) x2[t * 2 + i] = r2[i], x2_trans[t * 2 + i] = q2[i];
}
uint32_t pair(bf16 low, bf16 high) { return uint32_t(low.bits) | uint32_t(high.bits) << 16; }
TEST_CASE("isa: ldmatrix") {
    const auto in = small_numbers<bf16>(256, 1);
    DeviceArray<bf16> device(in);
    DeviceArray<uint32_t> x4(128), x4_trans(128), x2(64), x2_trans(64);
    run(isa_ldmatrix_kernel, 1, 32, 0, device.data(), x4.data(), x4_trans.data(), x2.data(), x2_trans.data());
    const auto r = x4.host(), q = x4_trans.host(), r2 = x2.host(), q2 = x2_trans.host();
    for (size_t lane = 0; lane < 32; lane++) {
        for (size_t m = 0; m < 4; m++) {
            const auto at = [&](size_t row, size_t column) { return in[m * 64 + row * 8 + column]; };
            const size_t i = lane / 4, j = lane % 4 * 2;
            const uint32_t plain = pair(at(i, j), at(i, j + 1)), transposed = pair(at(j, i), at(j + 1, i));
            CHECK(r[lane * 4 + m] == plain);
            CHECK(q[lane * 4 + m] == transposed);
            if (m >= 2) continue;
            CHECK(r2[lane * 2 + m] == plain);
            CHECK(q2[lane * 2 + m] == transposed);
        }
    }
}

// ---- mma: fragments put together by the tables of the manual ----
__global__ void isa_mma_kernel(const bf16* a, const bf16* b, float* d) {  // (16, 16), (16, 8), (16, 8)
    const unsigned group = threadIdx.x / 4, in_group = threadIdx.x % 4;
    uint32_t af[4], bf[2];
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = i == 0 || i == 2 ? group : group + 8, column = in_group * 2 + (i >= 2 ? 8 : 0);
        af[i] = uint32_t(a[row * 16 + column].bits) | uint32_t(a[row * 16 + column + 1].bits) << 16;
    }
    for (unsigned i = 0; i < 2; i++) {
        const unsigned row = in_group * 2 + (i >= 1 ? 8 : 0);
        bf[i] = uint32_t(b[row * 8 + group].bits) | uint32_t(b[(row + 1) * 8 + group].bits) << 16;
    }
    float c[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    ptx::mma_m16n8k16(c, af, bf);
    for (unsigned i = 0; i < 4; i++) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = c[i];
}
TEST_CASE("isa: mma.m16n8k16") {
    const auto a = small_numbers<bf16>(256, 5), b = small_numbers<bf16>(128, 6);
    DeviceArray<bf16> da(a), db(b);
    DeviceArray<float> d(128);
    run(isa_mma_kernel, 1, 32, 0, da.data(), db.data(), d.data());
    const auto got = d.host();
    for (size_t m = 0; m < 16; m++) {
        for (size_t n = 0; n < 8; n++) {
            float want = 1.0f;  // exact: products are multiples of 2^-12, the sum is below 2^7
            for (size_t k = 0; k < 16; k++) want += float(a[m * 16 + k]) * float(b[k * 8 + n]);
            CHECK(got[m * 8 + n] == want);
        }
    }
}

#if KILN_SM90
// ---- stmatrix: stores the registers that ldmatrix has read ----
__global__ void isa_stmatrix_kernel(const bf16* in, uint4* x4, uint4* x4_trans, uint4* x2, uint4* x2_trans) {
    SIMT_SHARED(uint4, rows, [32]);
    SIMT_SHARED(uint4, back, [4][32]);
    const unsigned t = threadIdx.x;
    rows[t] = simt::ld_vec<uint4>(in + t * 8);
    __syncthreads();
    uint32_t r[4], q[4];
    ptx::ldmatrix_x4(r, &rows[t]);
    ptx::ldmatrix_x4_trans(q, &rows[t]);
    const uint32_t r2[2] = {r[0], r[1]}, q2[2] = {q[0], q[1]};
    ptx::stmatrix_x4(r, &back[0][t]);
    ptx::stmatrix_x4_trans(q, &back[1][t]);
    ptx::stmatrix_x2(r2, &back[2][t]);
    ptx::stmatrix_x2_trans(q2, &back[3][t]);
    __syncthreads();
    x4[t] = back[0][t];
    x4_trans[t] = back[1][t];
    if (t < 16) x2[t] = back[2][t], x2_trans[t] = back[3][t];
}
TEST_CASE("isa: stmatrix") {
    const auto in = small_numbers<bf16>(256, 2);
    DeviceArray<bf16> device(in);
    DeviceArray<uint4> x4(32), x4_trans(32), x2(16), x2_trans(16);
    run(isa_stmatrix_kernel, 1, 32, 0, device.data(), x4.data(), x4_trans.data(), x2.data(), x2_trans.data());
    for (DeviceArray<uint4>* out : {&x4, &x4_trans, &x2, &x2_trans}) {
        const auto got = out->host();
        CHECK(std::memcmp(got.data(), in.data(), got.size() * sizeof(uint4)) == 0);
    }
}

// ---- TMA ----
template <int RANK>
__global__ void isa_tma_load_kernel(SIMT_PARAM simt::TensorMap map, int4 at, bf16* out, int n) {
    SIMT_DYN_SHARED(box);
    SIMT_SHARED(uint64_t, barrier, [1]);
    if (threadIdx.x == 0) {
        ptx::mbar_init(barrier, 1);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbar_arrive_expect_tx(barrier, unsigned(n) * 2);
        if constexpr (RANK == 2) ptx::tma_load_2d(box, &map, barrier, at.x, at.y);
        if constexpr (RANK == 3) ptx::tma_load_3d(box, &map, barrier, at.x, at.y, at.z);
        if constexpr (RANK == 4) ptx::tma_load_4d(box, &map, barrier, at.x, at.y, at.z, at.w);
    }
    ptx::mbar_wait(barrier, 0);
    for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) out[i] = reinterpret_cast<const bf16*>(box)[i];
}
template <int RANK>
int wrong_elements(const uint64_t (&dim)[RANK], const uint32_t (&box)[RANK], const int (&at)[4], bool swizzle) {
    uint64_t stride[RANK] = {}, n_total = 1;
    size_t n_box = 1;
    for (int d = 0; d < RANK; d++) {
        stride[d] = n_total * 2;
        n_total *= dim[d];
        n_box *= box[d];
    }
    const auto in = small_numbers<bf16>(n_total, 7);
    DeviceArray<bf16> device(in), out(n_box);
    const auto map = simt::make_tmap(device.data(), 2, RANK, dim, stride, box, swizzle);
    run(isa_tma_load_kernel<RANK>, 1, 64, n_box * 2, map, make_int4(at[0], at[1], at[2], at[3]), out.data(),
        int(n_box));
    const auto got = out.host();
    int n_wrong = 0;
    for (uint32_t i = 0; i < n_box; i++) {
        uint32_t rest = i, byte = i * 2;
        uint64_t from = 0;
        bool inside = true;
        for (int d = 0; d < RANK; d++) {
            const int64_t x = at[d] + int64_t(rest % box[d]);
            rest /= box[d];
            inside = inside && x >= 0 && x < int64_t(dim[d]);
            from += uint64_t(x) * stride[d] / 2;
        }
        if (swizzle) byte ^= (byte >> 7 & 7) << 4;  // 16-byte chunk of a 128-byte row, by the row modulo 8
        n_wrong += float(got[byte / 2]) != (inside ? float(in[from]) : 0.0f);
    }
    return n_wrong;
}
TEST_CASE("isa: TMA loads") {
    CHECK(wrong_elements<2>({128, 40}, {64, 16}, {64, 8, 0, 0}, true) == 0);
    CHECK(wrong_elements<2>({128, 40}, {128, 8}, {0, 36, 0, 0}, false) == 0);
    CHECK(wrong_elements<3>({64, 24, 3}, {64, 16, 1}, {0, 16, 2, 0}, true) == 0);
    CHECK(wrong_elements<4>({64, 24, 2, 3}, {64, 8, 2, 1}, {0, 4, 0, 1}, true) == 0);
}
TEST_CASE("isa: TMA loads that reach outside the tensor") {
    CHECK(wrong_elements<2>({72, 40}, {64, 16}, {-8, 32, 0, 0}, true) == 0);
    CHECK(wrong_elements<2>({72, 40}, {64, 16}, {-5, 3, 0, 0}, true) == 0);  // inside a 16-byte chunk
    CHECK(wrong_elements<2>({72, 40}, {64, 16}, {27, -3, 0, 0}, false) == 0);
    CHECK(wrong_elements<2>({72, 40}, {64, 16}, {72, 0, 0, 0}, true) == 0);
}

// A box of rows 1 .. 64, stored once and then added twice, over the corner of a (rows, 64) tensor.
template <class T>
__global__ void isa_tma_store_kernel(SIMT_PARAM simt::TensorMap map, int x, int y) {  // box (8, 64)
    SIMT_DYN_SHARED(box);
    auto* values = reinterpret_cast<T*>(box);
    for (unsigned i = threadIdx.x; i < 512; i += blockDim.x) values[i] = T(float(i % 64 + 1));
    ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    ptx::tma_store_2d(&map, box, x, y);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
    for (int i = 0; i < 2; i++) ptx::tma_reduce_add_2d(&map, box, x, y);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    ptx::bulk_wait<0>();
}
template <class T>
int wrong_stored(int x, int y) {
    constexpr int kRows = 12, kColumns = 64;
    DeviceArray<T> out(std::vector<T>(size_t(kRows * kColumns), T(-1.0f)));
    const auto map = simt::make_tmap_2d(out.data(), sizeof(T), kColumns, kRows, 64, 8, false);
    run(isa_tma_store_kernel<T>, 1, 64, 512 * sizeof(T), map, x, y);
    const auto got = out.host();
    int n_wrong = 0;
    for (int r = 0; r < kRows; r++) {
        for (int c = 0; c < kColumns; c++) {
            const bool inside = r >= y && r < y + 8 && c >= x && c < x + 64;
            n_wrong += float(got[size_t(r * kColumns + c)]) != (inside ? 3.0f * float(c - x + 1) : -1.0f);
        }
    }
    return n_wrong;
}
TEST_CASE("isa: TMA stores and additions, clipped") {
    CHECK(wrong_stored<float>(0, 2) == 0);
    CHECK(wrong_stored<float>(16, 9) == 0);
    CHECK(wrong_stored<float>(-8, -3) == 0);
    CHECK(wrong_stored<bf16>(0, 0) == 0);
}

// A swizzled box (64, 2, 8, 1) of a (3, 12, 5, 64) tensor: rows 1, 2 of 5 and some of 12, of the last of 3.
__global__ void isa_tma_store_4d_kernel(SIMT_PARAM simt::TensorMap map, int z) {
    SIMT_DYN_SHARED(box);
    for (unsigned i = threadIdx.x; i < 1024; i += blockDim.x) {
        const unsigned row = i / 64,
                       chunk = i % 64 / 8 ^ row % 8;  // 16-byte chunk of a 128-byte row, by the row modulo 8
        reinterpret_cast<bf16*>(box)[row * 64 + chunk * 8 + i % 8] = bf16(float(i % 256));
    }
    ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    ptx::tma_store_4d(&map, box, 0, 1, z, 2);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
}
TEST_CASE("isa: TMA stores of four dimensions, swizzled and clipped") {
    constexpr int kW = 3, kZ = 12, kY = 5;
    const uint64_t dim[4] = {64, kY, kZ, kW}, stride[4] = {0, 128, 128 * kY, 128 * kY * kZ};
    const uint32_t box[4] = {64, 2, 8, 1};
    for (const int z : {2, 9, -3}) {
        CAPTURE(z);
        DeviceArray<bf16> out(std::vector<bf16>(size_t(64 * kY * kZ * kW), bf16(-1.0f)));
        run(isa_tma_store_4d_kernel, 1, 64, 2048, simt::make_tmap(out.data(), 2, 4, dim, stride, box, true), z);
        const auto got = out.host();
        int n_wrong = 0;
        for (size_t i = 0; i < got.size(); i++) {
            const int x = int(i % 64), row = int(i / 64), y = row % kY, at_z = row / kY % kZ, w = row / kY / kZ;
            const bool inside = w == 2 && y >= 1 && y < 3 && at_z >= z && at_z < z + 8;
            const int in_box = ((at_z - z) * 2 + y - 1) * 64 + x;
            n_wrong += float(got[i]) != (inside ? float(in_box % 256) : -1.0f);
        }
        CHECK(n_wrong == 0);
    }
}

// ---- setmaxnreg: the first of three warpgroups gives registers to the others; on a GPU this ends or hangs ----
__global__ void __launch_bounds__(384, 1) isa_setmaxnreg_kernel(unsigned* out) {  // (384)
    if (threadIdx.x < 128) {
        ptx::setmaxnreg_dec<40>();
        out[threadIdx.x] = threadIdx.x;
    } else {
        ptx::setmaxnreg_inc<232>();
        out[threadIdx.x] = threadIdx.x;
    }
}
TEST_CASE("isa: setmaxnreg") {
    DeviceArray<unsigned> out(std::vector<unsigned>(384, 0));
    run(isa_setmaxnreg_kernel, 1, 384, 0, out.data());
    const auto got = out.host();
    for (unsigned i = 0; i < 384; i++) CHECK(got[i] == i);
}

// ---- mbarrier: four warps arrive, one waits for each phase ----
__global__ void isa_mbarrier_kernel(unsigned* out) {  // (3)
    SIMT_SHARED(uint64_t, barriers, [2]);
    SIMT_SHARED(unsigned, values, [128]);
    const unsigned t = threadIdx.x;
    if (t == 0) {
        ptx::mbar_init(&barriers[0], 128);
        ptx::mbar_init(&barriers[1], 1);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    for (unsigned phase = 0; phase < 3; phase++) {
        if (t < 128) {
            if (phase > 0) ptx::mbar_wait(&barriers[1], (phase - 1) & 1);
            values[t] = phase + t;
            ptx::mbar_arrive(&barriers[0]);
        } else if (t == 128) {
            ptx::mbar_wait(&barriers[0], phase & 1);
            unsigned sum = 0;
            for (unsigned i = 0; i < 128; i++) sum += values[i];
            out[phase] = sum;
            ptx::mbar_arrive(&barriers[1]);
        }
    }
}
TEST_CASE("isa: mbarrier") {
    DeviceArray<unsigned> out(3);
    run(isa_mbarrier_kernel, 1, 160, 0, out.data());
    const auto got = out.host();
    for (unsigned phase = 0; phase < 3; phase++) CHECK(got[phase] == 127 * 64 + 128 * phase);
}

__global__ void isa_clocks_kernel(uint64_t* out) {  // (2) cycles, nanoseconds
    const uint64_t begin = ptx::global_ns(), first = ptx::sm_cycles();
    uint64_t ns = 0;
    while (ns < 200'000) ns = ptx::global_ns() - begin;
    out[0] = ptx::sm_cycles() - first;
    out[1] = ns;
}
TEST_CASE("isa: the clocks run") {
    DeviceArray<uint64_t> out(2);
    run(isa_clocks_kernel, 1, 1, 0, out.data());
    const auto got = out.host();
    CHECK(got[1] >= 200'000);
    const double ghz = double(got[0]) / double(got[1]);
    CHECK(ghz > 0.1);  // a GPU runs at 0.2 to 3 GHz; the emulator's cycles are nanoseconds
    CHECK(ghz < 4);
}

__global__ void isa_elect_kernel(unsigned* out) {
    if (ptx::elect_one()) atomicAdd(&out[threadIdx.x / 32], 1);
}
TEST_CASE("isa: elect.sync elects one lane of each warp") {
    DeviceArray<unsigned> out(std::vector<unsigned>(2, 0));
    run(isa_elect_kernel, 1, 64, 0, out.data());
    CHECK(out.host() == std::vector<unsigned>{1, 1});
}

// ---- wgmma: operands placed element by element, by the canonical layouts of the manual ----
__device__ void put_swizzled(uint8_t* base, int byte, bf16 v) {
    *reinterpret_cast<bf16*>(base + (byte ^ ((byte >> 7 & 7) << 4))) = v;
}
template <int N, bool A_IN_REGISTERS, int TA, int TB>
__global__ void isa_wgmma_kernel(const bf16* a, const bf16* b, float* out) {  // (64, 16), (16, N), (64, N)
    SIMT_DYN_SHARED(smem);
    uint8_t *sa = smem, *sb = smem + 8192;
    const int t = int(threadIdx.x), lane = t % 32, warp = t / 32;
    for (int i = t; i < 64 * 16; i += 128) {
        const int m = i / 16, k = i % 16;
        put_swizzled(sa, TA ? k * 128 + m * 2 : m * 128 + k * 2, a[i]);
    }
    for (int i = t; i < 16 * N; i += 128) {
        const int k = i / N, n = i % N;
        put_swizzled(sb, TB ? n / 64 * 2048 + k * 128 + n % 64 * 2 : n * 128 + k * 2, b[i]);
    }
    ptx::fence_proxy_async();
    __syncthreads();
    uint32_t af[4];
    for (int i = 0; i < 4; i++) {
        const bf16* p = a + (warp * 16 + lane / 4 + (i & 1) * 8) * 16 + lane % 4 * 2 + (i >= 2 ? 8 : 0);
        af[i] = uint32_t(p[0].bits) | uint32_t(p[1].bits) << 16;
    }
    float d[N / 2];
    SIMT_UNROLL
    for (int i = 0; i < N / 2; i++) d[i] = 2.0f;
    const uint64_t da = ptx::wgmma_desc_sw128(sa, TA ? 2048 : 16, 1024);
    const uint64_t db = ptx::wgmma_desc_sw128(sb, TB ? 2048 : 16, 1024);
    ptx::wgmma_fence();
    if constexpr (N == 64 && A_IN_REGISTERS) ptx::wgmma_m64n64k16_rs<TB>(d, af, db, 0);
    if constexpr (N == 64 && !A_IN_REGISTERS) ptx::wgmma_m64n64k16_ss<TA, TB>(d, da, db, 0);
    if constexpr (N == 128 && A_IN_REGISTERS) ptx::wgmma_m64n128k16_rs<TB>(d, af, db, 1);
    if constexpr (N == 128 && !A_IN_REGISTERS) ptx::wgmma_m64n128k16_ss<TA, TB>(d, da, db, 1);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    SIMT_UNROLL
    for (int i = 0; i < N / 2; i++)
        out[(warp * 16 + lane / 4 + (i & 2) * 4) * N + i / 4 * 8 + lane % 4 * 2 + (i & 1)] = d[i];
}
template <int N, bool A_IN_REGISTERS, int TA, int TB>
int wrong_products() {
    const auto a = small_numbers<bf16>(64 * 16, 3), b = small_numbers<bf16>(16 * N, 4);
    DeviceArray<bf16> da(a), db(b);
    DeviceArray<float> d(64 * N);
    run(isa_wgmma_kernel<N, A_IN_REGISTERS, TA, TB>, 1, 128, 8192 + 16384, da.data(), db.data(), d.data());
    const auto got = d.host();
    int n_wrong = 0;
    for (size_t m = 0; m < 64; m++) {
        for (size_t n = 0; n < size_t(N); n++) {
            float want = N == 64 ? 0.0f : 2.0f;  // scale_d 0 and 1; exact as above
            for (size_t k = 0; k < 16; k++) want += float(a[m * 16 + k]) * float(b[k * N + n]);
            n_wrong += got[m * N + n] != want;
        }
    }
    return n_wrong;
}
TEST_CASE("isa: wgmma, both operands in shared memory") {
    CHECK(wrong_products<128, false, 0, 0>() == 0);
    CHECK(wrong_products<128, false, 0, 1>() == 0);
    CHECK(wrong_products<128, false, 1, 0>() == 0);
    CHECK(wrong_products<128, false, 1, 1>() == 0);
    CHECK(wrong_products<64, false, 0, 0>() == 0);
    CHECK(wrong_products<64, false, 1, 1>() == 0);
}
TEST_CASE("isa: wgmma, A in registers") {
    CHECK(wrong_products<128, true, 0, 0>() == 0);
    CHECK(wrong_products<128, true, 0, 1>() == 0);
    CHECK(wrong_products<64, true, 0, 1>() == 0);
}
#endif  // KILN_SM90
}  // namespace
