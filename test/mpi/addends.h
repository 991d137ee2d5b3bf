// The numbers that the reduction tests add up: a pure function of rank and place.  Each rank knows those of all others.
#pragma once
#include <cmath>
#include <vector>

#include "common/rng.h"
#include "test/mpi/world.h"

inline float addend(int rank, size_t i) {
    const Philox4 p = philox(7, uint32_t(i), uint32_t(rank), 0, 0);
    return (uniform_open0(p.v[0]) - 0.5f) *
           std::exp2(float(p.v[1] % 20));  // 2^0..2^19: any other order gives other bits
}
inline std::vector<float> my_addends(size_t n) {
    std::vector<float> v(n);
    for (size_t i = 0; i < n; i++) v[i] = addend(world().rank(), i);
    return v;
}
// The largest error of a sum over ranks, as a part of the sum of magnitudes.
inline double worst_error(const std::vector<float>& sums) {
    double worst = 0;
    for (size_t i = 0; i < sums.size(); i++) {
        double sum = 0, magnitude = 0;
        for (int r = 0; r < world().size(); r++) sum += addend(r, i), magnitude += std::abs(addend(r, i));
        const double error = std::abs(sums[i] - sum) / magnitude;
        worst = error <= worst ? worst : error == error ? error : INFINITY;
    }
    return worst;
}
inline bool power_of_two_ranks() { return (world().size() & (world().size() - 1)) == 0; }
