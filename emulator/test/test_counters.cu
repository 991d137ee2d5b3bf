// Sectors and bank conflicts, counted for accesses whose numbers are known.
// Made to fail by: sectors of 64 bytes, requests not told apart by their count, bytes counted for each lane that asks.
#include "emulator/test/emulated.h"

namespace {
using namespace emulated;

__global__ void count_matrices_kernel(uint32_t* out, int pitch) {  // pitch in bytes
    SIMT_DYN_SHARED(smem);
    for (int i = int(threadIdx.x); i < 8 * pitch / 4; i += 32) reinterpret_cast<uint32_t*>(smem)[i] = 0;
    __syncthreads();
    uint32_t r[2];
    ptx::ldmatrix_x2(r, smem + int(threadIdx.x) % 8 * pitch);
    out[threadIdx.x] = r[0] + r[1];
}
emulator::KernelCounters counters_of(const char* name) {
    const auto all = emulator::counters();
    const auto it = all.find(name);
    REQUIRE_MESSAGE(it != all.end(), name);
    return it->second;
}
class Counting {
  public:
    Counting() {
        emulator::config().counters = true;
        emulator::reset_counters();
    }

  private:
    WithConfig config_;
};
uint64_t matrix_conflicts(int pitch) {
    const Counting counting;
    Array<uint32_t> out(32);
    run(count_matrices_kernel, 1, 32, size_t(8 * pitch), out.data(), pitch);
    return counters_of("count_matrices_kernel").shared_conflict_cycles;
}
}  // namespace

TEST_CASE("counters: launches, and conflicts of ldmatrix") {
    CHECK(matrix_conflicts(16) == 0);       // 8 rows of 16 bytes fill the 32 banks
    CHECK(matrix_conflicts(16 + 64) == 0);  // rows 20 banks apart, all different modulo 32
    CHECK(matrix_conflicts(128) == 2 * 7);  // all rows in the same banks, two matrices
    CHECK(matrix_conflicts(64) == 2 * 3);   // four rows per bank
    CHECK(counters_of("count_matrices_kernel").launches == 1);
}

#if SIMT_HOOKED
namespace {
__global__ void copy_kernel(const float* in, float* out, int stride) {
    for (int round = 0; round < 3; round++) out[threadIdx.x + 64 * round] = in[(threadIdx.x + 64 * round) * stride];
}
__global__ void copy4_kernel(const float* in, float* out) {
    simt::st_vec(out + threadIdx.x * 4, simt::ld_vec<float4>(in + threadIdx.x * 4));
}
template <int PITCH>
__global__ void transpose_kernel(const float* in, float* out) {  // (32, 32) by 32 threads
    SIMT_SHARED(float, tile, [32][PITCH]);
    for (int r = 0; r < 32; r++) tile[r][threadIdx.x] = in[r * 32 + int(threadIdx.x)];
    __syncthreads();
    for (int r = 0; r < 32; r++) out[r * 32 + int(threadIdx.x)] = tile[threadIdx.x][r];
}
emulator::KernelCounters count_copy(int stride) {
    const Counting counting;
    Array<float> in(size_t(191 * stride + 1)), out(192);
    run(copy_kernel, 1, 64, 0, in.data(), out.data(), stride);
    return counters_of("copy_kernel");
}
template <int PITCH>
emulator::KernelCounters count_transpose() {
    const Counting counting;
    const auto values = normal<float>(1024, 1);
    Array<float> in(values), out(1024);
    run(transpose_kernel<PITCH>, 1, 32, 0, in.data(), out.data());
    for (size_t i = 0; i < 1024; i++) CHECK(out.data()[i] == values[i % 32 * 32 + i / 32]);
    return counters_of(PITCH == 32 ? "transpose_kernel<32>" : "transpose_kernel<33>");
}
}  // namespace

TEST_CASE("counters: a coalesced request takes 4 sectors, a strided one 32") {
    auto c = count_copy(1);
    CHECK(c.global_loads == 2 * 3);
    CHECK(c.global_load_sectors == 4 * c.global_loads);
    CHECK(c.global_load_bytes == 128 * c.global_loads);
    CHECK(c.global_stores == 2 * 3);
    CHECK(c.global_store_sectors == 4 * c.global_stores);
    CHECK(c.global_store_bytes == 128 * c.global_stores);
    c = count_copy(2);
    CHECK(c.global_load_sectors == 8 * c.global_loads);
    CHECK(c.global_load_bytes == 128 * c.global_loads);
    c = count_copy(32);
    CHECK(c.global_load_sectors == 32 * c.global_loads);
    CHECK(c.global_load_bytes == 128 * c.global_loads);
    c = count_copy(0);  // one number for all lanes
    CHECK(c.global_load_sectors == c.global_loads);
    CHECK(c.global_load_bytes == 4 * c.global_loads);
    CHECK(c.global_store_sectors == 4 * c.global_stores);
}

TEST_CASE("counters: a 16-byte access is one request of 16 sectors") {
    const Counting counting;
    Array<float> in(256), out(256);
    run(copy4_kernel, 1, 64, 0, in.data(), out.data());
    const auto c = counters_of("copy4_kernel");
    CHECK(c.global_loads == 2);
    CHECK(c.global_load_sectors == 32);
    CHECK(c.global_load_bytes == 1024);
    CHECK(c.global_stores == 2);
    CHECK(c.global_store_sectors == 32);
    CHECK(c.global_store_bytes == 1024);
}

TEST_CASE("counters: a transposition conflicts 32-way, with padding not at all") {
    const auto plain = count_transpose<32>(), padded = count_transpose<33>();
    CHECK(plain.shared_accesses == 64);
    CHECK(plain.shared_conflict_cycles == 32 * 31);  // the column's reads; the row's writes are free
    CHECK(padded.shared_accesses == 64);
    CHECK(padded.shared_conflict_cycles == 0);
}
#endif
