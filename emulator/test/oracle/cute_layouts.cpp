// CuTe's layouts of registers, of operands in shared memory, and the descriptors that it makes.  No instruction runs.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

// CuTe's descriptors ask for the shared address of a pointer: here an arena stands for shared memory.
namespace {
constexpr size_t kArena = 256 * 1024;
char* arena() {
    static char* const p = static_cast<char*>(std::aligned_alloc(kArena, kArena));
    return p;
}
}  // namespace
static inline size_t __cvta_generic_to_shared(const void* p) { return size_t(static_cast<const char*>(p) - arena()); }
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1

#include <cuda_bf16.h>

#include <cute/tensor.hpp>  // before the others, which need it

#include <cute/atom/copy_atom.hpp>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "emulator/test/oracle/cute.h"

namespace oracle {
namespace {
using namespace cute;
namespace G = SM90::GMMA;
using Bf16 = bfloat16_t;

// Of a layout (thread, value) -> row + rows * column.
template <class Layout>
Fragment fragment(Layout layout, int rows) {
    Fragment f(size_t(size<0>(layout)));
    for (int t = 0; t < int(size<0>(layout)); t++)
        for (int v = 0; v < int(size<1>(layout)); v++) {
            const int i = int(layout(t, v));
            f[size_t(t)].push_back({i % rows, i / rows});
        }
    return f;
}

// A copy by a whole warp: for each element of the registers, the row in shared memory that has the same bit.
template <class Registers, class Rows>
Fragment matrices(Registers registers, Rows rows, int count) {
    Fragment f(32);
    for (int t = 0; t < 32; t++)
        for (int v = 0; v < 2 * count; v++) {
            const int bit = int(registers(t, v * 16));
            for (int from = 0; from < 8 * count; from++)
                for (int e = 0; e < 8; e++)
                    if (int(rows(from, e * 16)) == bit) f[size_t(t)].push_back({from, e});
        }
    return f;
}
template <class Op>
Fragment load(int count) {
    using T = Copy_Traits<Op>;
    return matrices(typename T::DstLayout{}, typename T::SrcLayout{}, count);
}
template <class Op>
Fragment store(int count) {
    using T = Copy_Traits<Op>;
    return matrices(typename T::SrcLayout{}, typename T::DstLayout{}, count);
}

template <class Layout>
auto shared_tensor(uint32_t base, Layout layout) {
    return make_tensor(make_smem_ptr(reinterpret_cast<Bf16*>(arena() + base)), layout);
}
template <class Tensor>
uint32_t address(Tensor const& t, int i, int j) {
    return uint32_t(__cvta_generic_to_shared(&t(i, j)));
}

// Calls f with the two numbers, each 64 or 128, as compile-time constants.
template <class F>
auto with_sizes(int first, int second, F f) {
    if (first == 64) return second == 64 ? f(_64{}, _64{}) : f(_64{}, _128{});
    return second == 64 ? f(_128{}, _64{}) : f(_128{}, _128{});
}
template <class F>
auto with_k_major(Swizzle s, F f) {
    switch (s) {
        case Swizzle::none:
            return f(G::Layout_K_INTER_Atom<Bf16>{});
        case Swizzle::b32:
            return f(G::Layout_K_SW32_Atom<Bf16>{});
        case Swizzle::b64:
            return f(G::Layout_K_SW64_Atom<Bf16>{});
        default:
            return f(G::Layout_K_SW128_Atom<Bf16>{});
    }
}
template <class F>
auto with_mn_major(Swizzle s, F f) {
    switch (s) {
        case Swizzle::none:
            return f(G::Layout_MN_INTER_Atom<Bf16>{});
        case Swizzle::b32:
            return f(G::Layout_MN_SW32_Atom<Bf16>{});
        case Swizzle::b64:
            return f(G::Layout_MN_SW64_Atom<Bf16>{});
        default:
            return f(G::Layout_MN_SW128_Atom<Bf16>{});
    }
}

template <int N, G::Major kMajorB>
using Op = conditional_t<N == 64, SM90_64x64x16_F32BF16BF16_SS<G::Major::K, kMajorB>,
                         SM90_64x128x16_F32BF16BF16_SS<G::Major::K, kMajorB>>;
template <int N, G::Major kMajorB>
using Product = decltype(make_tiled_mma(Op<N, kMajorB>{}, Layout<Shape<_2, _1, _1>>{}));  // two warpgroups: 128 x N

// Descriptors as a kernel by CuTe makes them for operand A or B of warpgroup `group`, and where the elements are.
template <class Mma, bool kOperandA, class Tensor>
Steps steps(Tensor const& tile, int group, int n) {
    auto thread = Mma{}.get_slice(kOperandA ? 128 * group : 0);
    auto part = [&] {
        if constexpr (kOperandA)
            return thread.make_fragment_A(thread.partition_A(tile));
        else
            return thread.make_fragment_B(thread.partition_B(tile));
    }();
    static_assert(decltype(size<0>(part))::value == 1);
    Steps out;
    for (int k = 0; k < int(size<2>(part)); k++) {
        Step s{uint64_t(part(0, 0, k)), {}};
        for (int mn = 0; mn < n; mn++)
            for (int i = 0; i < 16; i++)
                s.address.push_back(address(tile, kOperandA ? 64 * group + mn : mn, 16 * k + i));
        out.push_back(s);
    }
    return out;
}
}  // namespace

Fragment mma_a() { return fragment(MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>::ALayout{}, 16); }
Fragment mma_b() { return fragment(MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>::BLayout{}, 8); }
Fragment mma_c() { return fragment(MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>::CLayout{}, 16); }
Fragment wgmma_a() {
    return fragment(MMA_Traits<SM90_64x64x16_F32BF16BF16_RS<G::Major::K, G::Major::MN>>::ALayout{}, 64);
}
Fragment wgmma_c(int n) {
    if (n == 64) return fragment(MMA_Traits<Op<64, G::Major::K>>::CLayout{}, 64);
    return fragment(MMA_Traits<Op<128, G::Major::K>>::CLayout{}, 64);
}

Fragment matrix_load(int count, bool transposed) {
    if (count == 4) return transposed ? load<SM75_U16x8_LDSM_T>(4) : load<SM75_U32x4_LDSM_N>(4);
    return transposed ? load<SM75_U16x4_LDSM_T>(2) : load<SM75_U32x2_LDSM_N>(2);
}
Fragment matrix_store(int count, bool transposed) {
    if (count == 4) return transposed ? store<SM90_U16x8_STSM_T>(4) : store<SM90_U32x4_STSM_N>(4);
    return transposed ? store<SM90_U16x4_STSM_T>(2) : store<SM90_U32x2_STSM_N>(2);
}

Steps rows_operand_a(Swizzle s, uint32_t base, int columns, int group) {
    return with_k_major(s, [&](auto atom) {
        return with_sizes(128, columns, [&](auto rows, auto k) {
            const auto tile = shared_tensor(base, tile_to_shape(atom, make_shape(rows, k)));
            return steps<Product<64, G::Major::K>, true>(tile, group, 64);
        });
    });
}
Steps rows_operand_b(Swizzle s, uint32_t base, int rows, int columns, int n) {
    return with_k_major(s, [&](auto atom) {
        return with_sizes(rows, columns, [&](auto of_rows, auto k) {
            const auto tile = shared_tensor(base, tile_to_shape(atom, make_shape(of_rows, k)));
            const auto first = [&](auto of_n) {
                return steps<Product<int(of_n), G::Major::K>, false>(
                    local_tile(tile, make_shape(of_n, k), make_coord(0, 0)), 0, n);
            };
            if constexpr (int(of_rows) == 64)
                return first(_64{});
            else
                return n == 64 ? first(_64{}) : first(_128{});
        });
    });
}
Steps columns_operand(uint32_t base, int rows, int columns) {
    return with_sizes(rows, columns, [&](auto k, auto mn) {
        const auto exchanged = make_layout(make_shape(mn, k), make_stride(k, _1{}));
        const auto layout = composition(tile_to_shape(G::Layout_K_SW128_Atom<Bf16>{}, make_shape(k, mn)), exchanged);
        return steps<Product<int(mn), G::Major::MN>, false>(shared_tensor(base, layout), 0, columns);
    });
}
Steps mn_major_operand(Swizzle s, uint32_t base, int mn, int k) {
    return with_mn_major(s, [&](auto atom) {
        return with_sizes(mn, k, [&](auto of_mn, auto of_k) {  // k varies first from atom to atom
            const auto tile = shared_tensor(base, tile_to_shape(atom, make_shape(of_mn, of_k), cute::Step<_2, _1>{}));
            return steps<Product<int(of_mn), G::Major::MN>, false>(tile, 0, mn);
        });
    });
}
std::vector<uint32_t> tile_addresses(uint32_t base, int rows, int columns) {
    return with_sizes(rows, columns, [&](auto of_rows, auto of_columns) {
        const auto tile =
            shared_tensor(base, tile_to_shape(G::Layout_K_SW128_Atom<Bf16>{}, make_shape(of_rows, of_columns)));
        std::vector<uint32_t> out;
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++) out.push_back(address(tile, r, c));
        return out;
    });
}

uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    std::memcpy(&bits, &both, sizeof bits);
    return bits;
}
float low_bf16(uint32_t both) {
    __nv_bfloat162 pair;
    std::memcpy(&pair, &both, sizeof both);
    return __low2float(pair);
}
}  // namespace oracle
