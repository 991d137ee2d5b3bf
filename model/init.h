// Random numbers that a model begins with.
#pragma once
#include <cstdint>

#include "kernels/ops.h"

struct Init {  // normal numbers
    float mean, stddev;
    static Init normal(float s) { return {0, s}; }
    static Init zeros() { return {0, 0}; }
    static Init ones() { return {1, 0}; }
};

// y (n) = f32 or f64.  Every element is a pure function of (seed, number of the tensor, element).
void init_tensor(const Backend& k, Init init, Buf y, uint32_t tensor, uint64_t seed, Stream s);
