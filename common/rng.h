// Philox4x32-10, a counter-based generator: random numbers are a pure function of (key, counter), so they do not depend
// on rank, thread or memory layout.  Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC
// 2011).
#pragma once
#include <cstdint>

#include "common/host_device.h"

struct Philox4 {
    uint32_t v[4];
};

HOST_DEVICE inline Philox4 philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
        const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c1 = uint32_t(p1);
        c3 = uint32_t(p0);
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// Uniform in (0, 1]: never 0, so that log() is finite.
HOST_DEVICE inline float uniform_open0(uint32_t bits) { return float((bits >> 8) + 1) * 0x1p-24f; }

// Dropout keeps an element when its random word is below this bound; p in [0, 1).
HOST_DEVICE inline uint32_t keep_below(float p) { return uint32_t((1.0 - double(p)) * 4294967295.0); }

// The streams of one seed, so that initialisation, dropout, shuffling and sampling never share a counter.
// A key is the seed with the stream in its top byte.
enum class RngStream : uint64_t { dropout = 0, init = 1, shuffle = 2, sample = 3 };
HOST_DEVICE inline uint64_t stream_key(uint64_t seed, RngStream s) { return seed ^ (uint64_t(s) << 56); }
