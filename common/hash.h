// 64-bit XXH3 of bytes: checkpoint integrity, config and weight fingerprints.  Not cryptographic.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

uint64_t hash64(const void* data, size_t n_bytes);
inline uint64_t hash64(std::string_view s) { return hash64(s.data(), s.size()); }
std::string hash_text(uint64_t hash);  // 16 hex digits

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
