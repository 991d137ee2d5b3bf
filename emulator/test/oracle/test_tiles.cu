// Tiles in shared memory: kiln's moves between registers and tiles, TMA's loads and stores, and the arguments of its
// tensor maps.
#include <algorithm>
#include <array>

#include "emulator/test/oracle/comparison.h"
#include "kernels/cuda/attention_sm90.cu"  // for Call::map, which is local to that file

namespace oracle {
// kiln's make_tmap as nvcc compiles it (native_map.cu).
MapArguments native_map(int rank, const uint64_t* dim, const uint64_t* stride, const uint32_t* box, bool swizzle,
                        int element_bytes);
}  // namespace oracle

namespace {
using namespace oracle;

// ---- read_rows, write_rows
template <int HS>
__global__ void read_rows_kernel(const uint4* image, int n_image, int group, uint32_t* out) {  // (HS / 16, 128, 4)
    SIMT_DYN_SHARED(shared);
    const int t = int(threadIdx.x);
    for (int i = t; i < n_image; i += 128) reinterpret_cast<uint4*>(shared)[i] = image[i];
    __syncthreads();
    uint32_t a[HS / 16][4];
    attention_sm90::read_rows<HS>(a, shared + group * attention_sm90::kRows * 128);
    for (int k = 0; k < HS / 16; k++)
        for (int i = 0; i < 4; i++) out[(k * 128 + t) * 4 + i] = a[k][i];
}
template <int HS>
__global__ void write_rows_kernel(const float* in, int group, uint4* image, int n_image) {  // in: (128, HS / 2)
    SIMT_DYN_SHARED(shared);
    const int t = int(threadIdx.x);
    for (int i = t; i < n_image; i += 128) reinterpret_cast<uint4*>(shared)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    float d[HS / 2];
    for (int i = 0; i < HS / 2; i++) d[i] = in[t * (HS / 2) + i];
    const float one[2] = {1, 1};
    attention_sm90::write_rows<HS>(shared + group * attention_sm90::kRows * 128, d, one);
    __syncthreads();
    for (int i = t; i < n_image; i += 128) image[i] = reinterpret_cast<uint4*>(shared)[i];
}
template <int HS>
void compare_read_rows() {
    Comparison item(fmt::format("read_rows HS {}: registers as CuTe's operand A", HS));
    const auto at = tile_addresses(kBase, 128, HS);
    const Fragment layout = wgmma_a();
    std::vector<uint16_t> tile(size_t(128 * HS));  // element i of the tile holds i
    for (size_t i = 0; i < tile.size(); i++) tile[(at[i] - kBase) / 2] = uint16_t(i);
    DeviceArray<uint16_t> in(tile);
    for (int group = 0; group < 2; group++) {
        DeviceArray<uint32_t> out(size_t(HS / 16 * 512));
        run(read_rows_kernel<HS>, 1, 128, tile.size() * 2, reinterpret_cast<const uint4*>(in.data()),
            int(tile.size() / 8), group, out.data());
        const auto got = out.host();
        for (size_t k = 0; k < HS / 16; k++)
            for (size_t t = 0; t < 128; t++)
                for (size_t v = 0; v < 8; v++) {
                    const int have = get16(&got[(k * 128 + t) * 4], v);
                    const int want = (64 * group + layout[t][v].row) * HS + 16 * int(k) + layout[t][v].column;
                    item.equal(have, want, "group {} step {} thread {} value {}: ({},{}), by CuTe ({},{})", group, k, t,
                               v, have / HS, have % HS, want / HS, want % HS);
                }
    }
}
template <int HS>
void compare_write_rows() {
    Comparison item(fmt::format("write_rows HS {}: CuTe's accumulator to CuTe's tile", HS));
    const auto at = tile_addresses(kBase, 128, HS);
    const size_t n = size_t(128 * HS);
    const Fragment layout = wgmma_c(HS);
    for (int group = 0; group < 2; group++) {
        std::vector<float> found[2];  // a value's index modulo 128, and divided by 128
        for (int pass = 0; pass < 2; pass++) {
            std::vector<float> d(size_t(64 * HS));
            for (size_t i = 0; i < d.size(); i++) d[i] = float(pass == 0 ? i % 128 : i / 128);
            DeviceArray<float> in(d);
            DeviceArray<uint16_t> image(n);
            run(write_rows_kernel<HS>, 1, 128, n * 2, in.data(), group, reinterpret_cast<uint4*>(image.data()),
                int(n / 8));
            for (const uint16_t bits : image.host()) {
                bf16 x;
                x.bits = bits;
                found[pass].push_back(float(x));
            }
        }
        for (size_t t = 0; t < 128; t++)
            for (size_t v = 0; v < HS / 2; v++) {
                const size_t row = size_t(64 * group + layout[t][v].row), column = size_t(layout[t][v].column);
                const size_t element = (at[row * HS + column] - kBase) / 2, want = t * (HS / 2) + v;
                const size_t got = size_t(found[0][element] + 128 * found[1][element]);
                item.equal(got, want, "({},{}): thread {} value {}, by CuTe thread {} value {}", row, column,
                           got / (HS / 2), got % (HS / 2), t, v);
            }
    }
}
TEST_CASE("moves between registers and tiles") {
    compare_read_rows<64>();
    compare_read_rows<128>();
    compare_write_rows<64>();
    compare_write_rows<128>();
}

// ---- TMA
constexpr int kB = 2, kT = 200, kColumns = 3;  // a tensor (kB, kT, kColumns, HS)

template <int HS, int R>
__global__ void load_tile_kernel(SIMT_PARAM simt::TensorMap map, int column, int row, int b, uint16_t* out) {
    SIMT_DYN_SHARED(shared);
    SIMT_SHARED(uint64_t, barrier, [1]);
    if (threadIdx.x == 0) {
        ptx::mbar_init(barrier, 1);
        ptx::fence_mbarrier_init();
        ptx::mbar_arrive_expect_tx(barrier, R * HS * 2);
        attention_sm90::load_tile<HS, R>(shared, &map, barrier, column, row, b);
    }
    __syncthreads();
    ptx::mbar_wait(barrier, 0);
    for (int i = int(threadIdx.x); i < R * HS; i += int(blockDim.x)) out[i] = reinterpret_cast<uint16_t*>(shared)[i];
}
template <int HS>
__global__ void store_tile_kernel(SIMT_PARAM simt::TensorMap map, int column, int row, int b, const uint16_t* in) {
    SIMT_DYN_SHARED(shared);
    for (int i = int(threadIdx.x); i < 128 * HS; i += int(blockDim.x)) reinterpret_cast<uint16_t*>(shared)[i] = in[i];
    ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    attention_sm90::store_tile<HS>(&map, shared, column, row, b);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
}
Buf buffer(void* p, size_t n) {
    Buf b{};
    b.data = p;
    b.count = n;
    b.dtype = DType::bf16;
    return b;
}
template <int HS>
size_t element_at(int b, int t, int column, int x) {
    return ((size_t(b) * kT + size_t(t)) * kColumns + size_t(column)) * HS + size_t(x);
}
template <int HS>
std::vector<uint16_t> tensor() {  // odd bits: never those of a zero
    std::vector<uint16_t> values(size_t(kB) * kT * kColumns * HS);
    for (size_t i = 0; i < values.size(); i++) values[i] = uint16_t(noise(uint32_t(i)) | 1);
    return values;
}
template <int HS, int R>
void compare_load() {
    Comparison item(fmt::format("load_tile HS {} R {}: elements of shared memory", HS, R));
    const auto at = tile_addresses(kBase, R, HS);
    const auto values = tensor<HS>();
    DeviceArray<uint16_t> global(values);
    const simt::TensorMap map =
        Call<HS>(kB, kT, kColumns, nullptr).map(buffer(global.data(), values.size()), kColumns, R);
    constexpr int kOfB = 1, kOfColumns = 2;
    for (const int row : {0, 128, 192}) {  // the last tiles end past kT
        DeviceArray<uint16_t> out(size_t(R * HS));
        run(load_tile_kernel<HS, R>, 1, 64, size_t(R * HS * 2), map, kOfColumns, row, kOfB, out.data());
        const auto got = out.host();
        for (int r = 0; r < R; r++)
            for (int c = 0; c < HS; c++) {
                const int have = got[(at[size_t(r * HS + c)] - kBase) / 2];
                const int want = row + r < kT ? values[element_at<HS>(kOfB, row + r, kOfColumns, c)] : 0;
                item.equal(have, want, "rows from {}, ({},{}): {:04x}, by CuTe's layout {:04x}", row, r, c, have, want);
            }
    }
}
template <int HS>
void compare_store() {
    Comparison item(fmt::format("store_tile HS {}: elements of global memory", HS));
    constexpr int kRows = 128, kOfB = 1, kOfColumns = 1;
    const auto at = tile_addresses(kBase, kRows, HS);
    const auto values = tensor<HS>();
    for (const int row : {0, 128}) {
        std::vector<uint16_t> tile(size_t(kRows * HS));  // element i of the tile holds i
        for (size_t i = 0; i < tile.size(); i++) tile[(at[i] - kBase) / 2] = uint16_t(i);
        DeviceArray<uint16_t> in(tile), global(values);
        const simt::TensorMap map =
            Call<HS>(kB, kT, kColumns, nullptr).map(buffer(global.data(), values.size()), kColumns, kRows);
        run(store_tile_kernel<HS>, 1, 64, size_t(kRows * HS * 2), map, kOfColumns, row, kOfB, in.data());
        const auto got = global.host();
        for (int b = 0; b < kB; b++)
            for (int t = 0; t < kT; t++)
                for (int c = 0; c < kColumns; c++)
                    for (int x = 0; x < HS; x++) {
                        const size_t i = element_at<HS>(b, t, c, x);
                        const bool inside = b == kOfB && c == kOfColumns && t >= row && t < row + kRows;
                        const int want = inside ? (t - row) * HS + x : values[i], have = got[i];
                        item.equal(have, want, "({},{},{},{}): {}, by CuTe's layout {}", b, t, c, x, have, want);
                    }
    }
}
TEST_CASE("TMA's loads and stores of tiles") {
    compare_load<64, 128>();
    compare_load<128, 128>();
    compare_load<64, 64>();
    compare_load<128, 64>();
    compare_store<64>();
    compare_store<128>();
}
TEST_CASE("TMA's coordinates count along the dimensions of the tensor map") {
    Comparison item("TMA: CuTe's coordinates and strides lead to the element");
    const MapArguments m = oracle::tensor_map(kB, kT, kColumns, 64, 128);
    for (int b = 0; b < kB; b++)
        for (int t = 0; t < kT; t++)
            for (int c = 0; c < kColumns; c++)
                for (int x = 0; x < 64; x += 16) {
                    const auto at = tma_coordinates(kB, kT, kColumns, b, t, c, x);
                    uint64_t byte = uint64_t(at[0]) * 2;
                    for (size_t d = 1; d < 4; d++) byte += uint64_t(at[d]) * m.stride[d - 1];
                    item.equal(byte, element_at<64>(b, t, c, x) * 2, "({},{},{},{})", b, t, c, x);
                }
}

#if ORACLE_NATIVE
template <int HS>
MapArguments kiln_tensor_map(int columns, int rows) {
    alignas(1024) static uint8_t base[1024];
    const simt::TensorMap m = Call<HS>(kB, kT, kColumns, nullptr).map(buffer(base, 1), columns, rows);
    return native_map(m.rank, m.dim, m.stride, m.box, m.swizzle == 3, m.element_bytes);
}
TEST_CASE("arguments of cuTensorMapEncodeTiled") {
    Comparison item("cuTensorMapEncodeTiled: arguments of kiln's make_tmap by nvcc, and CuTe's");
    for (const int HS : {64, 128})
        for (const int rows : {64, 128})
            for (const int columns : {kColumns, 3 * kColumns}) {
                const MapArguments k =
                    HS == 64 ? kiln_tensor_map<64>(columns, rows) : kiln_tensor_map<128>(columns, rows);
                const MapArguments c = oracle::tensor_map(kB, kT, columns, HS, rows);
                const std::string name = fmt::format("HS {} rows {} columns {}", HS, rows, columns);
                item.equal(k.type, c.type, "{}: type {}, CuTe {}", name, k.type, c.type);
                item.equal(k.rank, c.rank, "{}: rank {}, CuTe {}", name, k.rank, c.rank);
                item.equal(k.interleave, c.interleave, "{}: interleave {}, CuTe {}", name, k.interleave, c.interleave);
                item.equal(k.swizzle, c.swizzle, "{}: swizzle {}, CuTe {}", name, k.swizzle, c.swizzle);
                item.equal(k.fill, c.fill, "{}: fill {}, CuTe {}", name, k.fill, c.fill);
                item.equal(std::array{k.dim[0], uint64_t(k.box[0]), uint64_t(k.step[0])},
                           std::array{c.dim[0], uint64_t(c.box[0]), uint64_t(c.step[0])}, "{}: first dimension", name);
                // The order of the other dimensions is free: coordinates follow it.
                const auto others = [](const MapArguments& m) {
                    std::vector<std::array<uint64_t, 4>> all;
                    for (int d = 1; d < m.rank; d++) all.push_back({m.dim[d], m.stride[d - 1], m.box[d], m.step[d]});
                    std::sort(all.begin(), all.end());
                    return all;
                };
                item.equal(others(k), others(c), "{}: dimensions, strides, boxes", name);
            }
}
#endif
}  // namespace
