// 64-bit XXH3 of bytes: checkpoint integrity, config and weight fingerprints.  Not cryptographic.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "common/host_device.h"

uint64_t hash64(const void* data, size_t n_bytes);
inline uint64_t hash64(std::string_view s) { return hash64(s.data(), s.size()); }
std::string hash_text(uint64_t hash);  // 16 hex digits

// The hash of numbers in a backend's memory: the sum over all 32-bit words of hash_word(index, word), modulo 2^64.  A
// sum of integers: any order of summing gives the same value.  The mixing steps are splitmix64's (Steele, Lea, Flood
// 2014).
HOST_DEVICE inline uint64_t hash_word(uint64_t index, uint32_t word) {
    uint64_t x = (index + 1) * 0x9E3779B97F4A7C15u ^ word;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// The same hash over bytes that arrive in pieces.
class Hasher {
  public:
    Hasher();
    ~Hasher();
    Hasher(const Hasher&) = delete;
    Hasher& operator=(const Hasher&) = delete;
    void update(const void* data, size_t n_bytes);
    uint64_t digest() const;

  private:
    void* state_;
};
