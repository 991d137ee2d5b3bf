// Broken on purpose and seen to fail: equal tokens in reverse order; token V accepted.
#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "common/error.h"
#include "common/token_order.h"

TEST_CASE("sort_rows_by_token: sorted by token, equal tokens in row order") {
    std::mt19937 gen(1);
    struct Case {
        size_t n;
        int V;
    };
    for (Case c : {Case{1, 1}, {7, 1}, {1, 50257}, {100, 3}, {1000, 257}, {4096, 50257}}) {
        CAPTURE(c.n);
        CAPTURE(c.V);
        std::vector<int32_t> tokens(c.n), order(c.n, -1), want(c.n);
        for (int32_t& t : tokens) t = int32_t(gen() % unsigned(c.V));
        tokens[0] = c.V - 1;
        std::iota(want.begin(), want.end(), 0);
        std::stable_sort(want.begin(), want.end(), [&](int32_t a, int32_t b) { return tokens[a] < tokens[b]; });
        sort_rows_by_token(tokens.data(), order.data(), c.n, c.V);
        CHECK(order == want);
    }
}

TEST_CASE("sort_rows_by_token: a token outside the vocabulary is named") {
    for (int32_t bad : {-1, 10, 1 << 30}) {
        const std::vector<int32_t> tokens = {0, 9, bad, 3};
        std::vector<int32_t> order(4);
        try {
            sort_rows_by_token(tokens.data(), order.data(), 4, 10);
            FAIL("accepted");
        } catch (const Error& e) {
            CHECK(e.code == Exit::data);
            CHECK(std::string(e.what()).find("token " + std::to_string(bad) + " at position 2") != std::string::npos);
        }
    }
}
