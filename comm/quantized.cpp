#include "comm/quantized.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/buf.h"

namespace {
constexpr float kLargest = 7;

// max |x| / 7 as the next bf16 that is not smaller; NaN where a number is not finite.
bf16 scale_of(std::span<const float> x) {
    float largest = 0;
    bool finite = true;
    for (float v : x) {
        largest = std::max(largest, std::abs(v));
        finite &= std::isfinite(v);
    }
    if (!finite) return bf16(std::numeric_limits<float>::quiet_NaN());
    bf16 scale;
    scale.bits = uint16_t((std::bit_cast<uint32_t>(largest / kLargest) + 0xffffu) >> 16);
    return scale;
}

std::byte nibble(float v, float scale) {
    if (!(scale > 0)) return std::byte(8);
    return std::byte(int(std::clamp(std::nearbyint(v / scale), -kLargest, kLargest)) + 8);
}

// A block: the scale, then element 2i in the low half of byte i and element 2i + 1 in the high half.
void pack_block(std::span<const float> x, std::byte* to) {
    const bf16 stored = scale_of(x);
    const float scale = float(stored);
    std::memcpy(to, &stored, 2);
    for (size_t i = 0; i < x.size(); i += 2)
        to[2 + i / 2] = nibble(x[i], scale) | (i + 1 < x.size() ? nibble(x[i + 1], scale) : std::byte(8)) << 4;
}

void unpack_block(const std::byte* from, std::span<float> x) {
    bf16 stored;
    std::memcpy(&stored, from, 2);
    const float scale = float(stored);
    for (size_t i = 0; i < x.size(); i++) x[i] = scale * float(int(from[2 + i / 2] >> (i % 2 * 4) & std::byte(15)) - 8);
}

// f(block of x, its bytes) for each block of int4.
template <class T, class Byte, class F>
void each_block(std::span<T> x, Byte* packed, F&& f) {
    for (size_t i = 0; i < x.size(); i += kInt4Block) {
        const std::span<T> block = x.subspan(i, std::min(kInt4Block, x.size() - i));
        f(block, packed);
        packed += packed_bytes(OuterDtype::int4, block.size());
    }
}
}  // namespace

void pack(OuterDtype t, std::span<const float> x, std::byte* to) {
    switch (t) {
        case OuterDtype::fp32:
            if (!x.empty()) std::memcpy(to, x.data(), x.size_bytes());
            return;
        case OuterDtype::bf16:
            for (size_t i = 0; i < x.size(); i++) {
                const bf16 rounded(x[i]);
                std::memcpy(to + 2 * i, &rounded, 2);
            }
            return;
        case OuterDtype::int4:
            return each_block(x, to, pack_block);
    }
}

void unpack(OuterDtype t, const std::byte* from, std::span<float> x) {
    switch (t) {
        case OuterDtype::fp32:
            if (!x.empty()) std::memcpy(x.data(), from, x.size_bytes());
            return;
        case OuterDtype::bf16:
            for (size_t i = 0; i < x.size(); i++) {
                bf16 stored;
                std::memcpy(&stored, from + 2 * i, 2);
                x[i] = float(stored);
            }
            return;
        case OuterDtype::int4:
            return each_block(x, from, [](std::span<float> block, const std::byte* b) { unpack_block(b, block); });
    }
}
