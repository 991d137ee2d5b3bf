// wgmma in the emulator, through kiln's wrappers: executed on given memory and registers, and recorded.
#pragma once
#include <functional>

#include "emulator/test/oracle/comparison.h"

namespace oracle {
// A product that a kernel has asked for.
struct Issued {
    int n;
    bool a_in_registers;
    uint64_t a, b;
    int scale_d, transpose_a, transpose_b;
};
// Those of thread 0, since the last call.
std::vector<Issued> take_issued();

struct Wgmma {
    uint64_t a = 0, b = 0;  // descriptors
    bool a_in_registers = false, a_mn_major = false, b_mn_major = false;
    int n = 64;
    std::vector<uint16_t> image;        // of shared memory from kBase on
    std::vector<uint32_t> a_registers;  // (128, 4)
};
// One product of a warpgroup, d as it lies in registers: (128, n / 2).
std::vector<float> execute(Wgmma w);
// The same values as a matrix (64, n), by CuTe's layout.
std::vector<std::vector<float>> by_rows(const std::vector<float>& d, int n);
// The registers (128, 4) of an operand A (64, 16), by CuTe's layout.
std::vector<uint32_t> operand_registers(const std::function<float(int, int)>& a);

// Writes x to the element of `image` at this address of shared memory.
inline void put(std::vector<uint16_t>& image, uint32_t address, float x) {
    image.at((address - kBase) / 2) = bf16_bits(x);
}

// Compares where the emulator reads each element of an operand with where CuTe has it.  The tile's n_bytes begin at
// kBase.  `step` names the case.
void compare_reads(Comparison& item, const std::string& step, bool operand_a, uint64_t descriptor, const Step& cute,
                   bool mn_major, int n, size_t n_bytes);
}  // namespace oracle
