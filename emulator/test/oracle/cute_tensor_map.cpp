// The arguments that CuTe gives to cuTensorMapEncodeTiled: the driver's function is a recorder here.  A file of its
// own, since CuTe makes tensor maps only when it is told that a compiler of CUDA 12 or later is at work.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL 1
#include <cuda.h>

#include <cute/tensor.hpp>  // before the others, which need it

#include <cute/atom/copy_atom.hpp>
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "emulator/test/oracle/cute.h"

namespace oracle {
namespace {
MapArguments recorded;
}
}  // namespace oracle
extern "C" CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void*,
                                                   const cuuint64_t* dim, const cuuint64_t* stride,
                                                   const cuuint32_t* box, const cuuint32_t* step,
                                                   CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                                   CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill fill) {
    oracle::MapArguments& m = oracle::recorded;
    m = {int(type), int(rank), int(interleave), int(swizzle), int(l2), int(fill), {}, {}, {}, {}};
    for (unsigned d = 0; d < rank; d++) {
        m.dim[d] = dim[d], m.box[d] = box[d], m.step[d] = step[d];
        if (d + 1 < rank) m.stride[d] = stride[d];
    }
    return CUDA_SUCCESS;
}

namespace oracle {
namespace {
using namespace cute;
using Bf16 = bfloat16_t;

template <int kRows, int kColumns>
auto make_map(int B, int T, int columns) {
    const auto of = make_gmem_ptr(reinterpret_cast<Bf16*>(size_t(1) << 20));  // an address; nothing is read
    const auto strides =
        make_stride(int64_t(columns) * kColumns, _1{}, int64_t(kColumns), int64_t(columns) * kColumns * T);
    const auto global = make_tensor(of, make_layout(make_shape(T, Int<kColumns>{}, columns, B), strides));
    const auto shared = tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Bf16>{}, Shape<Int<kRows>, Int<kColumns>>{});
    return make_tma_copy(SM90_TMA_LOAD{}, global, shared, Shape<Int<kRows>, Int<kColumns>>{}, _1{});
}
}  // namespace

MapArguments tensor_map(int B, int T, int columns, int HS, int rows) {
    if (HS == 64)
        rows == 64 ? void(make_map<64, 64>(B, T, columns)) : void(make_map<128, 64>(B, T, columns));
    else
        rows == 64 ? void(make_map<64, 128>(B, T, columns)) : void(make_map<128, 128>(B, T, columns));
    return recorded;
}
std::vector<int> tma_coordinates(int B, int T, int columns, int b, int t, int column, int x) {
    const auto tma = make_map<128, 64>(B, T, columns);
    const auto at = tma.get_tma_tensor(make_shape(T, _64{}, columns, B))(t, x, column, b);
    return {int(get<0>(at)), int(get<1>(at)), int(get<2>(at)), int(get<3>(at))};
}
}  // namespace oracle
