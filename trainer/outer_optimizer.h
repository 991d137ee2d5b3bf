// The outer optimizer of local SGD and DiLoCo (Douillard et al. 2023, arXiv 2311.08105): SGD with Nesterov momentum,
// whose gradient is the way that the mean of all workers has gone from the outer parameters.
#pragma once
#include <span>

struct OuterRule {
    float learning_rate = 1, momentum = 0;  // these two average the parameters, exactly
};

// delta = outer - mean;  b = momentum b + delta;  outer -= learning_rate (delta + momentum b).    All (n), host memory.
void outer_update(const OuterRule& rule, std::span<float> outer, std::span<float> b, std::span<const float> mean);
