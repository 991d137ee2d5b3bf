// The shards of a flat buffer: nothing is lost, nothing is owned twice, for any size.
#include "trainer/shards.h"

#include <doctest/doctest.h>

#include "kernels/ops.h"

namespace {
constexpr size_t kChunk = kGradNormChunk;
}

TEST_CASE("shards: each element has one owner and one place in the owner's shard") {
    for (int size : {1, 2, 3, 4, 7})
        for (size_t n : {size_t(64), kChunk, kChunk + 64, 5 * kChunk - 64, 29 * kChunk + 128})
            for (size_t max_row : {size_t(1), 8 * kChunk, size_t(1) << 40}) {
                CAPTURE(size);
                CAPTURE(n);
                CAPTURE(max_row);
                const ShardLayout layout(n, size, max_row);
                CHECK(layout.shard_count() * size_t(size) == layout.padded());
                CHECK(layout.padded() < n + size_t(size) * kChunk);
                size_t next = 0, next_in_shard = 0;
                for (int i = 0; i < layout.n_rows(); i++) {
                    CHECK(layout.row(i).first == next);
                    CHECK(layout.in_shard(i).first == next_in_shard);
                    CHECK(layout.in_shard(i).count % kChunk == 0);
                    for (int rank = 0; rank < size; rank++) {
                        const Range unit = layout.unit(i, rank), owned = layout.owned(i, rank);
                        CHECK(unit.first == next);
                        CHECK(unit.count == layout.in_shard(i).count);
                        CHECK(layout.row_of(unit.first) == i);
                        CHECK(owned.first == unit.first);
                        CHECK(owned.end() == (unit.first < n ? std::min(unit.end(), n) : unit.first));
                        next = unit.end();
                    }
                    next_in_shard = layout.in_shard(i).end();
                }
                CHECK(next == layout.padded());
                CHECK(next >= n);
                CHECK(next_in_shard == layout.shard_count());
            }
}

TEST_CASE("shards: rows have the size that was asked for, where units of a chunk allow it") {
    CHECK(ShardLayout(100 * kChunk, 2, 8 * kChunk).n_rows() == 13);
    CHECK(ShardLayout(100 * kChunk, 2, 9 * kChunk).n_rows() == 13);
    CHECK(ShardLayout(100 * kChunk, 2, 1).n_rows() == 50);
    CHECK(ShardLayout(100 * kChunk, 2, size_t(1) << 40).n_rows() == 1);
}

TEST_CASE("shards: the pieces of all ranks are the parameters") {
    std::vector<FlatParam> flat;
    size_t n = 0;
    for (size_t count : {3 * kChunk + 64, size_t(64), kChunk, 6 * kChunk, 2 * kChunk - 128}) {
        ParamInfo info{};
        info.name = std::to_string(flat.size());
        flat.push_back({info, {n, count}});
        n += count;
    }
    for (int size : {1, 2, 3, 5}) {
        CAPTURE(size);
        const ShardLayout layout(n, size, 4 * kChunk);
        std::vector<std::string> owner(n);
        for (int rank = 0; rank < size; rank++) {
            size_t end = 0;  // of the pieces before
            for (const FlatParam& piece : layout.pieces(flat, rank)) {
                CHECK(piece.range.first >= end);
                end = piece.range.end();
                for (size_t in_shard = piece.range.first; in_shard < end; in_shard++)
                    for (int i = 0; i < layout.n_rows(); i++) {
                        const Range place = layout.in_shard(i);
                        if (in_shard < place.first || in_shard >= place.end()) continue;
                        std::string& at = owner.at(layout.unit(i, rank).first + in_shard - place.first);
                        REQUIRE(at.empty());
                        at = piece.info.name;
                    }
            }
            CHECK(end <= layout.shard_count());
        }
        for (const FlatParam& p : flat)
            for (size_t i = p.range.first; i < p.range.end(); i++)
                if (owner[i] != p.info.name) FAIL("element " << i << " belongs to " << owner[i]);
    }
}
