// Sampling: the allowed tokens, their frequencies, and the same tokens again from the same seed.
#include <doctest/doctest.h>

#include <cmath>
#include <map>

#include "model/generate.h"

namespace {
const std::vector<float> kLogits = {0.0f, std::log(4.0f), std::log(2.0f), std::log(1.0f), -1e30f};  // 1/8 4/8 2/8 1/8 0

std::map<int32_t, int> draws(const SampleOptions& o, int n) {
    std::map<int32_t, int> count;
    for (int i = 0; i < n; i++) count[sample_token(kLogits, o, uint64_t(i))]++;
    return count;
}
}  // namespace

// Seen to fail with: weights not divided by the temperature; the running sum compared before the token was added.
TEST_CASE("sample: frequencies follow the probabilities") {
    const int n = 20000;
    auto count = draws({.temperature = 1, .seed = 5}, n);
    const double expected[] = {1 / 8.0, 4 / 8.0, 2 / 8.0, 1 / 8.0};
    for (int t = 0; t < 4; t++) {
        const double p = expected[t], sigma = std::sqrt(p * (1 - p) / n);
        CHECK(std::abs(count[t] / double(n) - p) < 5 * sigma);  // a fixed seed: passes always or never
    }
    CHECK(count.count(4) == 0);
    count = draws({.temperature = 0.5, .seed = 5}, n);  // squares: 1 16 4 1 of 22
    CHECK(std::abs(count[1] / double(n) - 16 / 22.0) < 5 * std::sqrt(16 / 22.0 * 6 / 22.0 / n));
}

TEST_CASE("sample: temperature 0, top-k and top-p cut off the unlikely") {
    CHECK(draws({.temperature = 0}, 100).size() == 1);
    CHECK(sample_token(kLogits, {.temperature = 0}, 3) == 1);
    CHECK(draws({.temperature = 1, .top_k = 1}, 100).begin()->first == 1);
    const auto two = draws({.temperature = 1, .top_k = 2, .seed = 1}, 1000);
    CHECK(two.size() == 2);
    CHECK((two.count(1) && two.count(2)));
    CHECK(draws({.temperature = 1, .top_p = 0.5}, 1000).size() == 1);   // exactly the half that token 1 has
    CHECK(draws({.temperature = 1, .top_p = 0.51}, 1000).size() == 2);  // and the next
    CHECK(draws({.temperature = 1, .top_p = 1e-6}, 100).size() == 1);   // never empty
}

TEST_CASE("sample: a pure function of seed and position") {
    std::vector<int32_t> a, b, c;
    for (uint64_t i = 0; i < 50; i++) {
        a.push_back(sample_token(kLogits, {.temperature = 1, .seed = 1}, i));
        b.push_back(sample_token(kLogits, {.temperature = 1, .seed = 1}, i));
        c.push_back(sample_token(kLogits, {.temperature = 1, .seed = 2}, i));
    }
    CHECK(a == b);
    CHECK(a != c);
}
