// Descriptors of wgmma's operands: the emulator reads memory by CuTe's.
#include "emulator/test/oracle/wgmma.h"

namespace {
using namespace oracle;

const char* name_of(Swizzle s) {
    const char* const names[] = {"no swizzle", "32-byte swizzle", "64-byte swizzle", "128-byte swizzle"};
    return names[int(s)];
}
constexpr Swizzle kSwizzles[] = {Swizzle::b128, Swizzle::b64, Swizzle::b32, Swizzle::none};

TEST_CASE("the emulator reads K-major operands by CuTe's descriptors") {
    for (const Swizzle s : kSwizzles) {
        Comparison of_a(fmt::format("K-major A by CuTe's descriptors, {}", name_of(s)));
        for (const int columns : {64, 128})
            for (const int group : {0, 1}) {
                const Steps steps = rows_operand_a(s, kBase, columns, group);
                for (size_t k = 0; k < steps.size(); k++)
                    compare_reads(of_a, fmt::format("128 x {}, group {}, step {}", columns, group, k), true,
                                  steps[k].descriptor, steps[k], false, 64, size_t(128 * columns * 2));
            }
        Comparison of_b(fmt::format("K-major B by CuTe's descriptors, {}", name_of(s)));
        for (const int rows : {64, 128})
            for (const int columns : {64, 128})
                for (int n = 64; n <= rows; n += 64) {
                    const Steps steps = rows_operand_b(s, kBase, rows, columns, n);
                    for (size_t k = 0; k < steps.size(); k++)
                        compare_reads(of_b, fmt::format("{} x {}, n {}, step {}", rows, columns, n, k), false,
                                      steps[k].descriptor, steps[k], false, n, size_t(rows * columns * 2));
                }
    }
}
TEST_CASE("the emulator reads MN-major operands by CuTe's descriptors") {
    for (const Swizzle s : kSwizzles) {
        Comparison of_b(fmt::format("MN-major B by CuTe's descriptors, {}", name_of(s)));
        for (const int mn : {64, 128})
            for (const int depth : {64, 128}) {
                const Steps steps = mn_major_operand(s, kBase, mn, depth);
                for (size_t k = 0; k < steps.size(); k++)
                    compare_reads(of_b, fmt::format("{} x {}, step {}", mn, depth, k), false, steps[k].descriptor,
                                  steps[k], true, mn, size_t(mn * depth * 2));
            }
    }
    Comparison of_a("MN-major A by CuTe's descriptors, 128-byte swizzle");
    for (const int depth : {64, 128}) {  // made for B: a descriptor does not say which operand it is
        const Steps steps = mn_major_operand(Swizzle::b128, kBase, 64, depth);
        for (size_t k = 0; k < steps.size(); k++)
            compare_reads(of_a, fmt::format("64 x {}, step {}", depth, k), true, steps[k].descriptor, steps[k], true,
                          64, size_t(64 * depth * 2));
    }
}
}  // namespace
