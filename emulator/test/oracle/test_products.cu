// The products of Hopper's attention kernels: kiln's descriptors and results beside CuTe's.
#include "emulator/test/oracle/wgmma.h"
#include "kernels/cuda/attention_sm90_tile.cuh"

namespace {
using namespace oracle;

enum class Form { rows, rows_in_registers, tile, tile_added };  // multiply_rows, multiply_tile
constexpr bool is_tile(Form f) { return f == Form::tile || f == Form::tile_added; }

// registers: A (64, 16 * steps), as (steps, 128, 4).  out: d as it lies in registers; before the call, the numbers
// that a tile is added to.
template <int HS, int R, int N, Form kForm, int kDepth>
__global__ void product_kernel(const uint4* image, int n_image, const uint32_t* registers, int group, float* out) {
    SIMT_DYN_SHARED(shared);
    const int t = int(threadIdx.x);
    for (int i = t; i < n_image; i += 128) reinterpret_cast<uint4*>(shared)[i] = image[i];
    ptx::fence_proxy_async();
    __syncthreads();
    uint32_t a[kDepth / 16][4];
    for (int k = 0; k < kDepth / 16; k++)
        for (int i = 0; i < 4; i++) a[k][i] = registers[(k * 128 + t) * 4 + i];
    float d[N / 2];
    for (int i = 0; i < N / 2; i++) d[i] = out[t * (N / 2) + i];
    ptx::wgmma_fence();
    const uint8_t* b = shared + (kOther - kBase);
    if constexpr (kForm == Form::rows)
        attention_sm90::multiply_rows<HS, R>(d, shared + group * attention_sm90::kRows * 128, b);
    if constexpr (kForm == Form::rows_in_registers) attention_sm90::multiply_rows<HS, R>(d, a, b);
    if constexpr (is_tile(kForm)) attention_sm90::multiply_tile<HS, R, kDepth, kForm == Form::tile_added>(d, a, b);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    for (int i = 0; i < N / 2; i++) out[t * (N / 2) + i] = d[i];
}

// rows: d (64, N) = the group's rows of A's tile (128, HS) times the first N rows of B's (R, HS).
// tile: d (64, HS) = or += A (64, kDepth) in registers times the first kDepth rows of B's tile (R, HS).
template <int HS, int R, int N, Form kForm, int kDepth>
struct Product {
    static constexpr size_t kSteps = kDepth / 16;
    Steps a, b, b_mn_major;  // mn-major: a tile as CuTe lays an operand of this kind out; the same bytes
    std::vector<float> out = std::vector<float>(size_t(128 * N / 2));
    std::vector<Issued> issued;

    explicit Product(int group)
        : a(rows_operand_a(Swizzle::b128, kBase, HS, group)),
          b(is_tile(kForm) ? columns_operand(kOther, R, HS) : rows_operand_b(Swizzle::b128, kOther, R, HS, N)),
          b_mn_major(is_tile(kForm) ? mn_major_operand(Swizzle::b128, kOther, HS, R) : b) {}

    void run(std::vector<uint16_t> image, const std::vector<uint32_t>& registers, int group) {
        DeviceArray<uint16_t> in_image(image);
        DeviceArray<uint32_t> in_registers(registers);
        DeviceArray<float> d(out);
        take_issued();
        oracle::run(product_kernel<HS, R, N, kForm, kDepth>, 1, 128, image.size() * 2,
                    reinterpret_cast<const uint4*>(in_image.data()), int(image.size() / 8), in_registers.data(), group,
                    d.data());
        issued = take_issued();
        out = d.host();
    }
    static std::string name(int group) {
        if (is_tile(kForm))
            return fmt::format("multiply_tile HS {} R {} K {}{}", HS, R, kDepth,
                               kForm == Form::tile_added ? " added" : "");
        return fmt::format("multiply_rows HS {} R {} N {} {}", HS, R, N,
                           kForm == Form::rows ? fmt::format("group {}", group) : "A in registers");
    }
};

struct Fields {
    uint64_t start, leading, stride, base_offset, swizzle, others;
    explicit Fields(uint64_t d)
        : start(d & 0x3fff),
          leading(d >> 16 & 0x3fff),
          stride(d >> 32 & 0x3fff),
          base_offset(d >> 49 & 7),
          swizzle(d >> 62),
          others(d & ~0xc00e3fff3fff3fffu) {}
};
// `with_leading` false: hardware does not use the leading offset of this operand.
void compare_fields(Comparison& item, const std::string& operand, uint64_t kiln, uint64_t cute, bool with_leading) {
    const Fields a(kiln), b(cute);
    item.equal(a.start, b.start, "{}: start {}, CuTe {}", operand, a.start, b.start);
    item.equal(a.stride, b.stride, "{}: stride {}, CuTe {}", operand, a.stride, b.stride);
    item.equal(a.base_offset, b.base_offset, "{}: base offset {}, CuTe {}", operand, a.base_offset, b.base_offset);
    item.equal(a.swizzle, b.swizzle, "{}: swizzle {}, CuTe {}", operand, a.swizzle, b.swizzle);
    item.equal(a.others, b.others, "{}: bits outside the fields {:x}, CuTe {:x}", operand, a.others, b.others);
    if (with_leading) item.equal(a.leading, b.leading, "{}: leading {}, CuTe {}", operand, a.leading, b.leading);
}

template <int HS, int R, int N, Form kForm, int kDepth>
void compare_product(int group) {
    using P = Product<HS, R, N, kForm, kDepth>;
    P p(group);
    const auto am = [](int m, int k) { return small_integer(uint32_t(m * 128 + k)); };
    const auto bm = [](int n, int k) { return small_integer(uint32_t(50000 + n * 128 + k)); };
    std::vector<uint16_t> image(kImage, bf16_bits(1000.0f));
    std::vector<uint32_t> registers;
    for (size_t k = 0; k < P::kSteps; k++) {
        const auto step = operand_registers([&](int m, int i) { return am(m, int(16 * k) + i); });
        registers.insert(registers.end(), step.begin(), step.end());
        for (int i = 0; i < 16; i++) {
            const int column = int(16 * k) + i;
            if (kForm == Form::rows)
                for (int m = 0; m < 64; m++) put(image, p.a[k].address[size_t(m * 16 + i)], am(m, column));
            for (int n = 0; n < N; n++) put(image, p.b[k].address[size_t(n * 16 + i)], bm(n, column));
        }
    }
    for (size_t i = 0; i < p.out.size(); i++) p.out[i] = float(i % 17);
    const auto before = by_rows(p.out, N);
    p.run(image, registers, group);

    Comparison descriptors(P::name(group) + ": descriptors");
    descriptors.equal(p.issued.size(), P::kSteps, "{} products, CuTe {}", p.issued.size(), P::kSteps);
    for (size_t k = 0; k < std::min(p.issued.size(), P::kSteps); k++) {
        const Issued& op = p.issued[k];
        const std::string step = fmt::format("step {}", k);
        descriptors.equal(op.n, N, "{}: n {}", step, op.n);
        descriptors.equal(op.a_in_registers, kForm != Form::rows, "{}: A in registers", step);
        descriptors.equal(op.transpose_a, 0, "{}: A's major", step);
        descriptors.equal(op.transpose_b, int(is_tile(kForm)), "{}: B's major", step);
        descriptors.equal(op.scale_d, int(kForm == Form::tile_added || k != 0), "{}: scale_d {}", step, op.scale_d);
        // K-major with a swizzle: hardware does not use the leading offset, and CuTe and kiln both write 1.  MN-major
        // with all of mn in one row of the swizzle: not used either, and CuTe writes another number.
        const bool with_leading = !is_tile(kForm) || N > 64;
        if (kForm == Form::rows) compare_fields(descriptors, step + " A", op.a, p.a[k].descriptor, true);
        compare_fields(descriptors, step + " B", op.b, p.b[k].descriptor, with_leading);
        compare_fields(descriptors, step + " B as MN-major", op.b, p.b_mn_major[k].descriptor, with_leading);
        for (size_t i = 0; i < p.b[k].address.size(); i++)
            descriptors.equal(p.b[k].address[i], p.b_mn_major[k].address[i],
                              "step {}: CuTe's exchanged view and its MN-major layout differ at {}", k, i);
    }
    Comparison values(P::name(group) + fmt::format(": result (64, {})", N));
    const auto got = by_rows(p.out, N);
    for (int m = 0; m < 64; m++)
        for (int n = 0; n < N; n++) {
            float want = kForm == Form::tile_added ? before[size_t(m)][size_t(n)] : 0.0f;
            for (int k = 0; k < kDepth; k++) want += am(m, k) * bm(n, k);
            const float value = got[size_t(m)][size_t(n)];
            values.equal(value, want, "({},{}): {}, not {}", m, n, value, want);
        }
}

// The emulator reads by kiln's descriptors, element by element.
template <int HS, int R, int N, Form kForm, int kDepth>
void compare_product_reads() {
    using P = Product<HS, R, N, kForm, kDepth>;
    constexpr int kGroup = 1;
    P p(kGroup);
    p.run(std::vector<uint16_t>(kImage), std::vector<uint32_t>(8 * 512), kForm == Form::rows ? kGroup : 0);
    Comparison item(P::name(kGroup) + ": elements read by kiln's descriptors");
    for (size_t k = 0; k < p.issued.size(); k++) {
        if (kForm == Form::rows)
            compare_reads(item, fmt::format("A step {}", k), true, p.issued[k].a, p.a[k], false, 64,
                          size_t(128 * HS * 2));
        // B's tile is at kOther.  compare_reads() wants it at kBase: both are multiples of 1024.
        Step moved = p.b[k];
        for (uint32_t& at : moved.address) at -= kOther - kBase;
        compare_reads(item, fmt::format("B step {}", k), false, p.issued[k].b - ((kOther - kBase) >> 4), moved,
                      is_tile(kForm), N, size_t(R * HS * 2));
    }
}

template <int HS, int R, int N, Form kForm, int kDepth = HS>
void compare() {
    for (int group = 0; group < (kForm == Form::rows ? 2 : 1); group++) compare_product<HS, R, N, kForm, kDepth>(group);
    compare_product_reads<HS, R, N, kForm, kDepth>();
}
// All that attention_sm90_forward.cuh and attention_sm90_backward.cuh use.
TEST_CASE("products of the forward pass") {
    compare<64, 128, 64, Form::rows>();
    compare<64, 128, 128, Form::rows>();
    compare<128, 128, 64, Form::rows>();
    compare<128, 128, 128, Form::rows>();
    compare<64, 128, 64, Form::tile, 64>();
    compare<64, 128, 64, Form::tile, 128>();
    compare<128, 128, 128, Form::tile, 64>();
    compare<128, 128, 128, Form::tile, 128>();
    compare<64, 128, 64, Form::tile_added, 64>();
    compare<64, 128, 64, Form::tile_added, 128>();
    compare<128, 128, 128, Form::tile_added, 64>();
    compare<128, 128, 128, Form::tile_added, 128>();
}
TEST_CASE("products of the backward pass") {
    compare<64, 64, 64, Form::rows_in_registers>();
    compare<128, 64, 64, Form::rows>();
    compare<64, 64, 64, Form::tile, 64>();
    compare<128, 64, 128, Form::tile, 64>();
    compare<64, 64, 64, Form::tile_added, 64>();
    compare<128, 64, 128, Form::tile_added, 64>();
}
}  // namespace
