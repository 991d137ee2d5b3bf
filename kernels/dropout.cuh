// Dropout masks on the device: the words of DropoutMask (ops.h) for four elements of one row of the batch at a time.
//
//   host     device::dropout_stream(a.dropout)   the values known before the launch
//   kernel   device::DropoutStream drop = parameter;  drop.read_where();    then words(b, element / 4), keeps(word)
//
// on() tells whether dropout is on at all.  It is the same for all threads: the host may choose a kernel by it.
#pragma once
#include "common/rng.h"
#include "kernels/ops.h"
#include "kernels/simt.h"

namespace device {
struct DropoutStream {
    uint64_t key = 0;
    uint32_t step = 0, place = 0, site = 0;
    uint32_t below = 0;               // an element stays when its word is below this
    float scale = 1;                  // of the elements that stay
    const uint32_t* where = nullptr;  // (2) on the device: step, place; null: dropout is off

    HOST_DEVICE bool on() const { return where != nullptr; }
    __device__ __forceinline__ void read_where() {
        if (on()) step = where[0], place = where[1];
    }
    // Words of elements 4 group .. 4 group + 3 of batch row b.
    __device__ __forceinline__ Philox4 words(int b, uint32_t group) const {
        return philox(key, step, place + uint32_t(b), site, group);
    }
    __device__ __forceinline__ bool keeps(uint32_t word) const { return word < below; }
};

inline DropoutStream dropout_stream(const DropoutMask& mask) {
    DropoutStream d;
    if (!(mask.p > 0)) return d;
    d.key = stream_key(mask.seed, RngStream::dropout);
    d.site = mask.site;
    d.below = keep_below(mask.p);
    d.scale = float(1 / (1 - double(mask.p)));
    d.where = mask.where.as<uint32_t>();
    return d;
}
}  // namespace device
