// Dropout masks on the CPU: the words of DropoutMask (ops.h) for a run of elements of one row of the batch.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/rng.h"
#include "kernels/ops.h"

namespace cpu {
// The mask of one op call, read from its buffers once, outside any parallel loop.
struct Mask {
    uint64_t key = 0;
    uint32_t step = 0, place = 0, site = 0;
    uint32_t below = 0;  // an element stays when its word is below this
    double scale = 1;    // of the elements that stay
    bool on = false;

    explicit Mask(const DropoutMask& m) : site(m.site), on(m.p > 0) {
        if (!on) return;
        key = stream_key(m.seed, RngStream::dropout);
        step = m.where.as<uint32_t>()[0];
        place = m.where.as<uint32_t>()[1];
        below = keep_below(m.p);
        scale = 1 / (1 - double(m.p));
    }

    // Fills in the words of n elements from `element` on, of batch row b, and returns the place of the first: words +
    // element % 4.  `words` has room for words_for(n).
    static constexpr size_t words_for(size_t n) { return (n + 3 + 3) / 4 * 4; }
    const uint32_t* fill(uint32_t* words, int b, size_t element, size_t n) const {
        const size_t first = element / 4, groups = (element + n + 3) / 4 - first;
        const uint32_t c1 = place + uint32_t(b);
#pragma omp simd
        for (size_t g = 0; g < groups; g++) {
            const Philox4 r = philox(key, step, c1, site, uint32_t(first + g));
            words[4 * g] = r.v[0];
            words[4 * g + 1] = r.v[1];
            words[4 * g + 2] = r.v[2];
            words[4 * g + 3] = r.v[3];
        }
        return words + element % 4;
    }
};
}  // namespace cpu
