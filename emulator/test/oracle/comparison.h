// Shared by the oracle's tests: comparisons that are counted, launches, and numbers to multiply.
#pragma once
#include <doctest/doctest.h>
#include <fmt/format.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "emulator/test/device_array.h"
#include "emulator/test/oracle/cute.h"
#include "kernels/ptx.cuh"

namespace oracle {
struct Total {
    long compared = 0;
    ~Total() { std::printf("%ld comparisons with CuTe\n", compared); }
};
inline Total total;

// The comparisons of one item.  It prints a line when it ends, and fails the test when answers differ or none was
// compared.
class Comparison {
  public:
    explicit Comparison(std::string item) : item_(std::move(item)) {}
    Comparison(const Comparison&) = delete;
    Comparison& operator=(const Comparison&) = delete;
    ~Comparison() {
        const bool passes = n_compared_ > 0 && n_wrong_ == 0;
        std::printf("%s  %-80s %8ld compared, %ld wrong\n", passes ? "PASS" : "FAIL", item_.c_str(), n_compared_,
                    n_wrong_);
        total.compared += n_compared_;
        CHECK_MESSAGE(passes, item_ << ": " << n_wrong_ << " of " << n_compared_ << " differ; first: " << first_);
    }
    // `text` is a format of fmt and describes the case, with both answers where they help.
    template <class Kiln, class Cute, class... A>
    void equal(const Kiln& kiln, const Cute& cute, fmt::format_string<const A&...> text, const A&... arguments) {
        n_compared_++;
        if (kiln == cute) return;
        if (n_wrong_++ == 0) first_ = fmt::format(text, arguments...);
    }

  private:
    std::string item_, first_;
    long n_compared_ = 0, n_wrong_ = 0;
};

template <class... P, class... A>
void run(void (*kernel)(P...), int grid, int block, size_t n_shared, A... arguments) {
    expect_success(simt::launch(kernel, dim3(unsigned(grid)), dim3(unsigned(block)), n_shared, nullptr, arguments...));
    expect_success(cudaDeviceSynchronize());
}

constexpr uint32_t kBase = 1024;                             // address of the emulator's dynamic shared memory
constexpr uint32_t kOther = kBase + 64 * 1024;               // of a second tile
constexpr size_t kImage = (kOther + 32 * 1024 - kBase) / 2;  // elements of both

inline uint16_t bf16_bits(float x) { return bf16(x).bits; }
inline uint32_t noise(uint32_t i) {
    i ^= i >> 16, i *= 0x7feb352du, i ^= i >> 15, i *= 0x846ca68bu;
    return i ^ i >> 16;
}
// -3 .. 3: bf16 holds them, and sums of thousands of products are exact in fp32.
inline float small_integer(uint32_t i) { return float(int(noise(i) % 7) - 3); }

// Writes the 16-bit element of this index into an array of pairs.
inline void put16(std::vector<uint32_t>& pairs, size_t index, uint16_t v) {
    uint32_t& pair = pairs[index / 2];
    pair = index % 2 ? (pair & 0xffffu) | uint32_t(v) << 16 : (pair & 0xffff0000u) | v;
}
inline uint16_t get16(const uint32_t* pairs, size_t index) { return uint16_t(pairs[index / 2] >> 16 * (index % 2)); }
}  // namespace oracle
