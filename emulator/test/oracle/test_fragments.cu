// Which thread holds which element: mma.sync, ldmatrix, stmatrix, wgmma's registers, pairs of bf16.
#include <map>

#include "emulator/test/oracle/wgmma.h"

namespace {
using namespace oracle;

// ---- mma.sync
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b,
                           float* d) {  // (grid, 32, 4), (grid, 32, 2), (grid, 32, 4)
    const unsigned at = blockIdx.x * 32 + threadIdx.x;
    uint32_t of_a[4], of_b[2];
    float c[4];
    for (unsigned i = 0; i < 4; i++) of_a[i] = a[at * 4 + i], c[i] = d[at * 4 + i];
    for (unsigned i = 0; i < 2; i++) of_b[i] = b[at * 2 + i];
    ptx::mma_m16n8k16(c, of_a, of_b);
    for (unsigned i = 0; i < 4; i++) d[at * 4 + i] = c[i];
}
std::vector<float> mma(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b, const std::vector<float>& c) {
    DeviceArray<uint32_t> in_a(a), in_b(b);
    DeviceArray<float> d(c);
    run(mma_kernel, int(c.size() / 128), 32, 0, in_a.data(), in_b.data(), d.data());
    return d.host();
}
TEST_CASE("mma.sync: each element of A by itself") {
    Comparison item("mma.m16n8k16: each element of A against all of B, seen in D");
    const Fragment a_at = mma_a(), b_at = mma_b(), c_at = mma_c();
    constexpr size_t kProbes = 256;  // probe p: A is 1 in value p % 8 of thread p / 8; B holds 1 .. 128
    std::vector<uint32_t> a(kProbes * 128), b(kProbes * 64);
    for (size_t p = 0; p < kProbes; p++) {
        put16(a, p * 256 + p, bf16_bits(1));
        for (size_t i = 0; i < 128; i++) put16(b, p * 128 + i, bf16_bits(float(i + 1)));
    }
    std::map<std::pair<int, int>, int> b_value;  // by (n, k)
    for (int t = 0; t < 32; t++)
        for (int v = 0; v < 4; v++) {
            const At at = b_at[size_t(t)][size_t(v)];
            b_value[{at.row, at.column}] = t * 4 + v + 1;
        }
    const auto d = mma(a, b, std::vector<float>(kProbes * 128, 0.0f));
    for (size_t p = 0; p < kProbes; p++) {
        const At at = a_at[p / 8][p % 8];
        for (size_t t = 0; t < 32; t++)
            for (size_t v = 0; v < 4; v++) {
                const float got = d[p * 128 + t * 4 + v];
                const float want = c_at[t][v].row == at.row ? float(b_value[{c_at[t][v].column, at.column}]) : 0.0f;
                item.equal(got, want, "A: thread {} value {}, D: thread {} value {}: emulator {}, CuTe {}", p / 8,
                           p % 8, t, v, got, want);
            }
    }
}
TEST_CASE("mma.sync: whole products") {
    Comparison item("mma.m16n8k16: whole products, operands laid out by CuTe, c added");
    const Fragment a_at = mma_a(), b_at = mma_b(), c_at = mma_c();
    const auto am = [](At x) { return small_integer(uint32_t(x.row * 16 + x.column)); };
    const auto bm = [](At x) { return small_integer(uint32_t(1000 + x.row * 16 + x.column)); };
    const auto cm = [](At x) { return small_integer(uint32_t(2000 + x.row * 8 + x.column)); };
    std::vector<uint32_t> a(128), b(64);
    std::vector<float> c(128);
    for (size_t t = 0; t < 32; t++) {
        for (size_t v = 0; v < 8; v++) put16(a, t * 8 + v, bf16_bits(am(a_at[t][v])));
        for (size_t v = 0; v < 4; v++) put16(b, t * 4 + v, bf16_bits(bm(b_at[t][v])));
        for (size_t v = 0; v < 4; v++) c[t * 4 + v] = cm(c_at[t][v]);
    }
    const auto d = mma(a, b, c);
    for (size_t t = 0; t < 32; t++)
        for (size_t v = 0; v < 4; v++) {
            const At at = c_at[t][v];
            float want = cm(at);
            for (int k = 0; k < 16; k++) want += am({at.row, k}) * bm({at.column, k});
            item.equal(d[t * 4 + v], want, "D: thread {} value {}: {}, not {}", t, v, d[t * 4 + v], want);
        }
}

// ---- ldmatrix, stmatrix
__global__ void matrix_kernel(int count, bool transposed, bool store, uint16_t* out) {  // (32, 8)
    SIMT_SHARED(uint4, rows, [32]);
    const unsigned t = threadIdx.x;
    auto* elements = reinterpret_cast<uint16_t*>(rows);
    for (unsigned e = 0; e < 8; e++) elements[t * 8 + e] = store ? uint16_t(0xffff) : uint16_t(t * 8 + e);
    __syncthreads();
    uint32_t four[4] = {}, two[2] = {};
    if (store) {
        for (unsigned i = 0; i < 4; i++) four[i] = (t * 8 + 2 * i) | (t * 8 + 2 * i + 1) << 16;
        for (unsigned i = 0; i < 2; i++) two[i] = four[i];
        if (count == 4) transposed ? ptx::stmatrix_x4_trans(four, &rows[t]) : ptx::stmatrix_x4(four, &rows[t]);
        if (count == 2) transposed ? ptx::stmatrix_x2_trans(two, &rows[t]) : ptx::stmatrix_x2(two, &rows[t]);
        __syncthreads();
        for (unsigned e = 0; e < 8; e++) out[t * 8 + e] = elements[t * 8 + e];
        return;
    }
    if (count == 4) transposed ? ptx::ldmatrix_x4_trans(four, &rows[t]) : ptx::ldmatrix_x4(four, &rows[t]);
    if (count == 2) transposed ? ptx::ldmatrix_x2_trans(two, &rows[t]) : ptx::ldmatrix_x2(two, &rows[t]);
    for (unsigned v = 0; v < 8; v++)
        out[t * 8 + v] = uint16_t((count == 4 ? four : two)[v / 2 % count] >> 16 * (v % 2));
}
TEST_CASE("ldmatrix, stmatrix") {
    for (const int count : {2, 4})
        for (const bool transposed : {false, true})
            for (const bool store : {false, true}) {
                Comparison item(fmt::format("{}.x{}{}: (thread, value) <-> (row's thread, element)",
                                            store ? "stmatrix" : "ldmatrix", count, transposed ? ".trans" : ""));
                DeviceArray<uint16_t> out(256);
                run(matrix_kernel, 1, 32, 0, count, transposed, store, out.data());
                const auto got = out.host();
                const Fragment layout = store ? matrix_store(count, transposed) : matrix_load(count, transposed);
                for (size_t t = 0; t < 32; t++)
                    for (size_t v = 0; v < size_t(2 * count); v++) {
                        const size_t value = t * 8 + v, element = size_t(layout[t][v].row * 8 + layout[t][v].column);
                        if (store)
                            item.equal(size_t(got[element]), value, "element {} holds value {}, by CuTe value {}",
                                       element, got[element], value);
                        else
                            item.equal(size_t(got[value]), element, "value {} is element {}, by CuTe element {}", value,
                                       got[value], element);
                    }
            }
}

// ---- wgmma's registers
TEST_CASE("wgmma: registers of the accumulator") {
    for (const int n : {64, 128}) {
        Comparison item(fmt::format("wgmma m64n{}k16: accumulator (thread, value) -> (m, n)", n));
        const Steps a = rows_operand_a(Swizzle::b128, kBase, 64, 0);
        const Steps b = rows_operand_b(Swizzle::b128, kOther, 128, 64, n);
        std::vector<float> d[2];  // the row, then the column, of each value
        for (int pass = 0; pass < 2; pass++) {
            Wgmma w{.a = a[0].descriptor, .b = b[0].descriptor, .n = n, .image = std::vector<uint16_t>(kImage)};
            for (int m = 0; m < 64; m++) put(w.image, a[0].address[size_t(m * 16)], pass == 0 ? float(m) : 1.0f);
            for (int i = 0; i < n; i++) put(w.image, b[0].address[size_t(i * 16)], pass == 0 ? 1.0f : float(i));
            d[pass] = execute(w);
        }
        const Fragment layout = wgmma_c(n);
        for (size_t t = 0; t < 128; t++)
            for (size_t v = 0; v < size_t(n / 2); v++) {
                const At got{int(d[0][t * size_t(n / 2) + v]), int(d[1][t * size_t(n / 2) + v])}, want = layout[t][v];
                item.equal(got, want, "thread {} value {}: ({},{}), by CuTe ({},{})", t, v, got.row, got.column,
                           want.row, want.column);
            }
    }
}
TEST_CASE("wgmma: registers of operand A") {
    for (const int n : {64, 128}) {
        Comparison item(fmt::format("wgmma m64n{}k16: A in registers (thread, value) -> (m, k)", n));
        const Steps b = rows_operand_b(Swizzle::b128, kOther, 128, 64, n);
        std::vector<std::vector<float>> d[2];  // the index of each element's value modulo 32, and divided by 32
        for (int pass = 0; pass < 2; pass++) {
            Wgmma w{.b = b[0].descriptor, .a_in_registers = true, .n = n, .image = std::vector<uint16_t>(kImage)};
            for (int k = 0; k < 16; k++) put(w.image, b[0].address[size_t(k * 16 + k)], 1.0f);
            w.a_registers.resize(512);
            for (size_t i = 0; i < 1024; i++) put16(w.a_registers, i, bf16_bits(float(pass == 0 ? i % 32 : i / 32)));
            d[pass] = by_rows(execute(w), n);
        }
        const Fragment layout = wgmma_a();
        for (size_t t = 0; t < 128; t++)
            for (size_t v = 0; v < 8; v++) {
                const size_t m = size_t(layout[t][v].row), k = size_t(layout[t][v].column);
                const size_t got = size_t(d[0][m][k] + 32 * d[1][m][k]);
                item.equal(got, t * 8 + v, "({},{}) is thread {} value {}, by CuTe thread {} value {}", m, k, got / 8,
                           got % 8, t, v);
            }
    }
}

// ---- pairs of bf16
TEST_CASE("bf16: packed and unpacked") {
    Comparison item("pack_bf16, unpack_bf16: order of the halves, rounding, ties, infinities, as cuda_bf16.h");
    const auto compare = [&](uint32_t low_bits, uint32_t high_bits) {
        float low, high;
        std::memcpy(&low, &low_bits, 4), std::memcpy(&high, &high_bits, 4);
        if (low != low || high != high) return;
        const uint32_t got = ptx::pack_bf16(low, high), want = oracle::pack_bf16(low, high);
        item.equal(got, want, "pack({}, {}): {:08x}, by CUDA {:08x}", low, high, got, want);
        item.equal(ptx::unpack_bf16(want).x, low_bf16(want), "unpack({:08x})", want);
    };
    for (uint32_t i = 0; i < 0x10000; i++) {
        compare(i << 16 | 0x8000, noise(i));  // ties
        compare(i << 16 | 0x7fff, i << 16 | 0x8001);
        compare(noise(i), noise(i + 0x10000));
    }
}
}  // namespace
