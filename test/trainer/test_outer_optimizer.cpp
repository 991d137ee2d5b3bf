// The outer optimizer beside its formula in double, written here anew.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "common/rng.h"
#include "trainer/outer_optimizer.h"

namespace {
float number(uint32_t i, uint32_t step) { return uniform_open0(philox(9, i, step, 0, 0).v[0]) - 0.5f; }
}  // namespace

// PyTorch's SGD(nesterov=True) on the gradient delta: buf = mu buf + delta; p -= lr (delta + mu buf).
// Seen to fail with: the old momentum in the step; mu left out of the step; no learning rate on the momentum's part.
TEST_CASE("outer optimizer: ten steps of Nesterov momentum follow the formula in double") {
    constexpr size_t n = 100;
    for (const OuterRule rule : {OuterRule{0.7f, 0.9f}, OuterRule{1, 0.5f}, OuterRule{0.5f, 0}}) {
        std::vector<float> outer(n), b(n), mean(n);
        std::vector<double> p(n), buf(n);
        for (uint32_t i = 0; i < n; i++) p[i] = outer[i] = number(i, 0);
        for (uint32_t step = 1; step <= 10; step++) {
            for (uint32_t i = 0; i < n; i++) {
                const float drift = 0.1f * number(i, step);  // how far the workers go from where they began
                mean[i] = outer[i] + drift;
                const double delta = double(outer[i]) - mean[i];
                buf[i] = double(rule.momentum) * buf[i] + delta;
                p[i] -= double(rule.learning_rate) * (delta + double(rule.momentum) * buf[i]);
            }
            outer_update(rule, outer, b, mean);
            double worst = 0;
            for (uint32_t i = 0; i < n; i++) worst = std::max(worst, std::abs(outer[i] - p[i]));
            // Per step some five roundings of numbers below 2; the difference to p carries over to the next step.
            CHECK(worst <= step * 5 * std::exp2(-24));
        }
    }
}

// Seen to fail with: outer - learning_rate (delta + momentum b), which rounds twice.
TEST_CASE("outer optimizer: rate 1 without momentum takes the mean as it is") {
    std::vector<float> outer(1000), b(1000), mean(1000);
    for (uint32_t i = 0; i < 1000; i++) outer[i] = number(i, 0), mean[i] = number(i, 1) * std::exp2(-float(i % 40));
    mean[0] = -0.0f;
    outer_update({}, outer, b, mean);
    CHECK(std::memcmp(outer.data(), mean.data(), 1000 * sizeof(float)) == 0);
}
