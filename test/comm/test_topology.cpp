// Each rank's share of the batch, and the sum whose fixed order makes bits independent of the number of ranks.
#include <doctest/doctest.h>

#include <numeric>
#include <string>

#include "comm/run_fold.h"
#include "comm/topology.h"

TEST_CASE("split_runs: M = 2^k q") {
    for (int m = 1; m <= 200; m++) {
        const Runs r = split_runs(m);
        CHECK(r.q % 2 == 1);
        CHECK((r.q << r.k) == m);
    }
}

TEST_CASE("batch_share: the ranks' micro-batches are disjoint, consecutive and complete") {
    for (const bool ordered : {true, false})
        for (const int size : {1, 2, 4}) {
            int next = 0;
            for (int rank = 0; rank < size; rank++) {
                const BatchShare s = batch_share(24, 2, rank, size, ordered);
                CHECK(s.first_micro == next);
                CHECK(s.n_runs * s.run_length == s.n_micro);
                next += s.n_micro;
            }
            CHECK(next == 12);
        }
    CHECK(batch_share(24, 2, 0, 2, true).run_length == 3);   // M = 12 = 2^2 * 3
    CHECK(batch_share(24, 2, 0, 2, false).run_length == 6);  // one run: accumulated in place
    CHECK(batch_share(24, 2, 2, 3, false).first_micro == 8);
}

TEST_CASE("batch_share: what cannot be divided is refused with the arithmetic") {
    CHECK_THROWS_WITH_AS(batch_share(30, 8, 0, 1, false),
                         doctest::Contains("30 is not divisible by ranks * train.micro_batch_size = 1 * 8 = 8"), Error);
    CHECK_THROWS_WITH_AS(batch_share(24, 2, 0, 3, true),
                         doctest::Contains("12 = 2^2 * 3 micro-batches, so it works on 1, 2, 4 ranks"), Error);
    CHECK_THROWS_AS(batch_share(24, 2, 0, 8, true), Error);
}

TEST_CASE("core_share: every core is used once, every rank has one") {
    for (const int cores : {1, 2, 3, 8, 13})
        for (const int ranks : {1, 2, 3, 5}) {
            int total = 0;
            for (int r = 0; r < ranks; r++) total += core_share(cores, r, ranks);
            CHECK(total == std::max(cores, ranks));
        }
}

namespace {
// Folds runs [first, first + n) by name: "((0+1)+(2+3))".
std::string folded(int first, int n) {
    RunFold fold(n);
    std::vector<std::string> buffer(size_t(fold.n_buffers()));
    for (int i = 0; i < n; i++) {
        buffer[size_t(fold.working())] = std::to_string(first + i);
        fold.push([&](int into, int from) {
            buffer[size_t(into)] = "(" + buffer[size_t(into)] + "+" + buffer[size_t(from)] + ")";
        });
    }
    return buffer[size_t(fold.result())];
}
}  // namespace

// Seen to fail with: the newer run as the left operand.
TEST_CASE("run fold: pairwise like a binary counter, and the tree over ranks continues it") {
    CHECK(folded(0, 1) == "0");
    CHECK(folded(0, 4) == "((0+1)+(2+3))");
    CHECK(folded(0, 8) == "(((0+1)+(2+3))+((4+5)+(6+7)))");
    CHECK("(" + folded(0, 4) + "+" + folded(4, 4) + ")" == folded(0, 8));
    CHECK(RunFold(8).n_buffers() == 4);
    for (int n_runs : {1, 2, 4, 8}) {  // TrainerMemory::gradient() is the first buffer
        RunFold fold(n_runs);
        for (int i = 0; i < n_runs; i++) fold.push([](int, int) {});
        CHECK(fold.result() == 0);
    }
    CHECK_THROWS_AS(RunFold(6), Error);
}
