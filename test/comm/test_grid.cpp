#include "comm/grid.h"

#include <doctest/doctest.h>

#include <vector>

#include "common/error.h"

TEST_CASE("grid: a rank has one place, and a place one rank") {
    for (int data : {1, 2, 5})
        for (int tensor : {1, 2, 4})
            for (int pipeline : {1, 3}) {
                const Grid grid = make_grid(data * tensor * pipeline, tensor, pipeline);
                CHECK(grid.data == data);
                CHECK(grid.size() == data * tensor * pipeline);
                std::vector<bool> seen(size_t(grid.size()));
                for (int p = 0; p < pipeline; p++)
                    for (int d = 0; d < data; d++)
                        for (int t = 0; t < tensor; t++) {
                            const Grid::Place place{.data = d, .tensor = t, .pipeline = p};
                            const int rank = grid.rank_at(place);
                            REQUIRE(rank >= 0);
                            REQUIRE(rank < grid.size());
                            CHECK(!seen[size_t(rank)]);
                            seen[size_t(rank)] = true;
                            CHECK(grid.place_of(rank) == place);
                        }
            }
}

TEST_CASE("grid: the tensor axis is the fastest, then data") {
    const Grid grid = make_grid(12, 2, 2);
    CHECK(grid.data == 3);
    CHECK(grid.place_of(1) == Grid::Place{.data = 0, .tensor = 1, .pipeline = 0});
    CHECK(grid.place_of(2) == Grid::Place{.data = 1, .tensor = 0, .pipeline = 0});
    CHECK(grid.place_of(6) == Grid::Place{.data = 0, .tensor = 0, .pipeline = 1});
}

TEST_CASE("grid: an impossible product shows the arithmetic") {
    CHECK_THROWS_WITH_AS(make_grid(8, 3, 1),
                         "8 ranks = data x 3 x 1 has no solution: parallel.tensor * parallel.pipeline = 3 * 1 = 3 does "
                         "not divide 8; use 6 or 9 ranks, or change one of the two keys",
                         Error);
    CHECK_THROWS_WITH_AS(make_grid(2, 2, 2), doctest::Contains("use 4 ranks"), Error);
}
