// CuTe's answers to questions about Hopper's and Ampere's instructions, in plain types.
//
// kiln's kernels and its emulator were written by the same hands.  A misreading of the PTX manual that both share would
// pass every other test.  So this program asks somebody else: CuTe, the headers of the package nvidia-cutlass, whose
// layouts can be evaluated on the host without a GPU.  cute_layouts.cpp and cute_tensor_map.cpp see only CuTe and
// CUDA's headers.  The tests see only kiln and its emulator.  The two halves meet in this header.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace oracle {
struct At {
    int row, column;
    bool operator==(const At&) const = default;
};

// ---- registers: [thread][value] of 16-bit or fp32 elements
using Fragment = std::vector<std::vector<At>>;
Fragment mma_a();         // m16n8k16: (m, k)
Fragment mma_b();         //           (n, k)
Fragment mma_c();         //           (m, n)
Fragment wgmma_a();       // m64k16 in registers: (m, k)
Fragment wgmma_c(int n);  // m64nN, n 64 or 128: (m, n)

// ---- ldmatrix, stmatrix: [thread][16-bit element of its registers] -> {thread that gives the row, element of the row}
Fragment matrix_load(int count, bool transposed);  // count 2 or 4
Fragment matrix_store(int count, bool transposed);

// ---- operands of wgmma in shared memory.  base: address of the tile in shared memory
struct Step {
    uint64_t descriptor;
    std::vector<uint32_t> address;  // of element (mn, k): [mn * 16 + k]
};
using Steps = std::vector<Step>;  // one for each 16 of k
enum class Swizzle { none, b32, b64, b128 };
// A tile (rows, columns) of bf16, K-major; its columns are k.  Rows and columns are 64 or 128.
Steps rows_operand_a(Swizzle s, uint32_t base, int columns, int group);        // the group's 64 rows of a tile of 128
Steps rows_operand_b(Swizzle s, uint32_t base, int rows, int columns, int n);  // the first n rows
// The same tile with the 128-byte swizzle, read the other way: its columns are mn, its rows are k.
Steps columns_operand(uint32_t base, int rows, int columns);
// As CuTe itself lays an MN-major operand (mn, k) out.
Steps mn_major_operand(Swizzle s, uint32_t base, int mn, int k);
// Addresses of the elements (row, column) of a K-major tile with the 128-byte swizzle, row by row.
std::vector<uint32_t> tile_addresses(uint32_t base, int rows, int columns);

// ---- TMA: the arguments of cuTensorMapEncodeTiled
struct MapArguments {
    int type, rank, interleave, swizzle, l2, fill;
    uint64_t dim[5], stride[5];  // stride[0] is that of dimension 1
    uint32_t box[5], step[5];
};
// For a (B, T, columns, HS) bf16 tensor in boxes of `rows` tokens, 64 of HS.
MapArguments tensor_map(int B, int T, int columns, int HS, int rows);
// The coordinates of element (b, t, column, x) of such a tensor, HS 64, in the order of the instruction.
std::vector<int> tma_coordinates(int B, int T, int columns, int b, int t, int column, int x);

// ---- bf16, by the host code of cuda_bf16.h
uint32_t pack_bf16(float low, float high);
float low_bf16(uint32_t both);
}  // namespace oracle
