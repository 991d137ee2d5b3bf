// Vectors of f32 in host memory, packed for a message:
//
//   fp32   as they are
//   bf16   2 bytes each, rounded to nearest even
//   int4   blocks of kInt4Block numbers: a scale s in bf16, then an integer q from -7 to 7 for each number, two to a
//          byte; x is unpacked as s q.  s is max |x| / 7, rounded up, so that |x - s q| <= s / 2.  A block with a number
//          that is not finite is unpacked as NaN.
#pragma once
#include <cstddef>
#include <span>

#include "common/config_words.h"

constexpr size_t kInt4Block = 512;

// Bytes of n numbers.
constexpr size_t packed_bytes(OuterDtype t, size_t n) {
    switch (t) {
        case OuterDtype::fp32:
            return 4 * n;
        case OuterDtype::bf16:
            return 2 * n;
        case OuterDtype::int4:
            return (n + 1) / 2 + 2 * ((n + kInt4Block - 1) / kInt4Block);
    }
    return 0;
}
void pack(OuterDtype t, std::span<const float> x, std::byte* to);
void unpack(OuterDtype t, const std::byte* from, std::span<float> x);
