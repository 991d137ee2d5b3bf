#include "trainer/outer_optimizer.h"

#include <cstddef>

// From the mean on, not from the old parameters: with rate 1 and momentum 0 the mean loses (0 delta - 0 delta) = +0,
// which leaves all its bits.
void outer_update(const OuterRule& rule, std::span<float> outer, std::span<float> b, std::span<const float> mean) {
    const float keep = 1 - rule.learning_rate, push = rule.learning_rate * rule.momentum;
    for (size_t i = 0; i < outer.size(); i++) {
        const float delta = outer[i] - mean[i];
        b[i] = rule.momentum * b[i] + delta;
        outer[i] = mean[i] - (push * b[i] - keep * delta);
    }
}
