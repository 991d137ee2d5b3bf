#include "emulator/test/oracle/wgmma.h"

namespace oracle {
namespace {
std::vector<Issued> issued;
}
std::vector<Issued> take_issued() { return std::exchange(issued, {}); }
}  // namespace oracle

// The linker's --wrap sends calls of emulator::wgmma_issue(int, float*, const uint32_t*, uint64_t, uint64_t, int, int,
// int) to here.
extern "C" {
void __real__ZN8emulator11wgmma_issueEiPfPKjmmiii(int, float*, const uint32_t*, uint64_t, uint64_t, int, int, int);
void __wrap__ZN8emulator11wgmma_issueEiPfPKjmmiii(int n, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b,
                                                  int scale_d, int transpose_a, int transpose_b) {
    if (emulator::t_cur->lin == 0)
        oracle::issued.push_back({n, a_registers != nullptr, a, b, scale_d, transpose_a, transpose_b});
    __real__ZN8emulator11wgmma_issueEiPfPKjmmiii(n, d, a_registers, a, b, scale_d, transpose_a, transpose_b);
}
}

namespace oracle {
namespace {
template <int N, bool kRegisters, int kTransposeA, int kTransposeB>
__global__ void wgmma_kernel(uint64_t a, uint64_t b, const uint4* image, int n_image, const uint32_t* registers,
                             float* out) {
    SIMT_DYN_SHARED(shared);
    const int t = int(threadIdx.x);
    for (int i = t; i < n_image; i += 128) reinterpret_cast<uint4*>(shared)[i] = image[i];
    uint32_t in[4];
    for (int i = 0; i < 4; i++) in[i] = registers[t * 4 + i];
    ptx::fence_proxy_async();
    __syncthreads();
    float d[N / 2];
    for (float& x : d) x = 0;
    ptx::wgmma_fence();
    if constexpr (N == 64 && kRegisters) ptx::wgmma_m64n64k16_rs<kTransposeB>(d, in, b, 0);
    if constexpr (N == 64 && !kRegisters) ptx::wgmma_m64n64k16_ss<kTransposeA, kTransposeB>(d, a, b, 0);
    if constexpr (N == 128 && kRegisters) ptx::wgmma_m64n128k16_rs<kTransposeB>(d, in, b, 0);
    if constexpr (N == 128 && !kRegisters) ptx::wgmma_m64n128k16_ss<kTransposeA, kTransposeB>(d, a, b, 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    for (int i = 0; i < N / 2; i++) out[t * (N / 2) + i] = d[i];
}
template <int N>
auto kernel_of(const Wgmma& w) {
    if (w.a_in_registers) return w.b_mn_major ? wgmma_kernel<N, true, 0, 1> : wgmma_kernel<N, true, 0, 0>;
    if (w.a_mn_major) return wgmma_kernel<N, false, 1, 0>;
    return w.b_mn_major ? wgmma_kernel<N, false, 0, 1> : wgmma_kernel<N, false, 0, 0>;
}

// Addresses of shared memory that the emulator reads for each (mn, k) of an operand: memory holds its own addresses,
// and the other operand is the identity.
std::vector<uint32_t> addresses_read(bool operand_a, uint64_t descriptor, bool mn_major, int n, size_t n_bytes) {
    std::vector<std::vector<float>> d[2];  // an element's index modulo 128, and divided by 128: bf16 holds both
    for (int pass = 0; pass < 2; pass++) {
        Wgmma w{.n = operand_a ? 64 : n, .image = std::vector<uint16_t>(kImage)};
        for (size_t i = 0; i < n_bytes / 2; i++) w.image[i] = bf16_bits(float(pass == 0 ? i % 128 : i / 128));
        if (operand_a) {
            const Steps unit = rows_operand_b(Swizzle::b128, kOther, 64, 64, 64);
            w.a = descriptor, w.a_mn_major = mn_major, w.b = unit[0].descriptor;
            for (int k = 0; k < 16; k++) put(w.image, unit[0].address[size_t(k * 16 + k)], 1.0f);
        } else {
            w.b = descriptor, w.b_mn_major = mn_major, w.a_in_registers = true;
            w.a_registers = operand_registers([](int m, int k) { return m == k ? 1.0f : 0.0f; });
        }
        d[pass] = by_rows(execute(w), w.n);
    }
    std::vector<uint32_t> out;
    for (size_t mn = 0; mn < size_t(operand_a ? 64 : n); mn++)
        for (size_t k = 0; k < 16; k++) {
            const size_t row = operand_a ? mn : k, column = operand_a ? k : mn;
            out.push_back(kBase + 2 * uint32_t(d[0][row][column] + 128 * d[1][row][column]));
        }
    return out;
}
}  // namespace

std::vector<float> execute(Wgmma w) {
    w.image.resize((w.image.size() + 7) / 8 * 8);
    w.a_registers.resize(512);
    DeviceArray<uint16_t> image(w.image);
    DeviceArray<uint32_t> registers(w.a_registers);
    DeviceArray<float> out(size_t(128 * w.n / 2));
    run(w.n == 64 ? kernel_of<64>(w) : kernel_of<128>(w), 1, 128, w.image.size() * 2, w.a, w.b,
        reinterpret_cast<const uint4*>(image.data()), int(w.image.size() / 8), registers.data(), out.data());
    take_issued();
    return out.host();
}

std::vector<std::vector<float>> by_rows(const std::vector<float>& d, int n) {
    const Fragment layout = wgmma_c(n);
    std::vector<std::vector<float>> m(64, std::vector<float>(size_t(n)));
    for (size_t t = 0; t < 128; t++)
        for (size_t v = 0; v < size_t(n / 2); v++)
            m[size_t(layout[t][v].row)][size_t(layout[t][v].column)] = d[t * size_t(n / 2) + v];
    return m;
}

std::vector<uint32_t> operand_registers(const std::function<float(int, int)>& a) {
    std::vector<uint32_t> registers(512);
    const Fragment layout = wgmma_a();
    for (size_t t = 0; t < 128; t++)
        for (size_t v = 0; v < 8; v++) put16(registers, t * 8 + v, bf16_bits(a(layout[t][v].row, layout[t][v].column)));
    return registers;
}

void compare_reads(Comparison& item, const std::string& step, bool operand_a, uint64_t descriptor, const Step& cute,
                   bool mn_major, int n, size_t n_bytes) {
    const auto got = addresses_read(operand_a, descriptor, mn_major, n, n_bytes);
    for (size_t i = 0; i < got.size(); i++)
        item.equal(got[i], cute.address[i],
                   "{}, element ({},{}): the emulator reads byte {} of the tile, CuTe has it at byte {}", step, i / 16,
                   i % 16, got[i] - kBase, cute.address[i] - kBase);
}
}  // namespace oracle
