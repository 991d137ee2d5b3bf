// The order of sequences, and the thread that fetches them.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <set>

#include "data/loader.h"
#include "test/scratch.h"

namespace {
constexpr int T = 3;

std::vector<uint64_t> epoch_order(uint64_t n, uint64_t epoch, uint64_t seed) {
    std::vector<uint64_t> order;
    for (uint64_t p = 0; p < n; p++) order.push_back(sequence_at(epoch * n + p, n, true, seed));
    return order;
}

// n sequences of three tokens; sequence i begins with token 3 i.
struct Fixture {
    Scratch dir;
    Log log;
    std::string path;
    const int V;
    TokenStream data;
    explicit Fixture(size_t n)
        : path(dir.write("a.bin", shard_bytes(counting<uint32_t>(n * T + 1)))),
          V(int(n * T + 1)),
          data("data.train", {path}, ShardFormat::automatic, T, V, log) {}
};

// The sequences that the loader delivers in n_micro_batches, each checked to come with its own tokens.
std::vector<uint64_t> take(Loader& loader, int n_micro_batches) {
    std::vector<uint64_t> all;
    for (int m = 0; m < n_micro_batches; m++) {
        const Loader::MicroBatch& batch = loader.next();
        REQUIRE(batch.inputs.size() == batch.sequences.size() * T);
        REQUIRE(batch.targets.size() == batch.inputs.size());
        bool own_tokens = true;
        for (size_t k = 0; k < batch.inputs.size(); k++) {
            const int32_t want = int32_t(batch.sequences[k / T] * T + k % T);
            own_tokens = own_tokens && batch.inputs[k] == want && batch.targets[k] == want + 1;
        }
        CHECK(own_tokens);
        std::vector<int32_t> order(batch.inputs.size());
        std::iota(order.begin(), order.end(), 0);
        std::ranges::stable_sort(order, {}, [&](int32_t i) { return batch.inputs[size_t(i)]; });
        CHECK(batch.order == order);
        all.insert(all.end(), batch.sequences.begin(), batch.sequences.end());
    }
    return all;
}
}  // namespace

TEST_CASE("shuffle: every epoch is a permutation") {
    for (const uint64_t n : {1, 2, 3, 4, 5, 16, 17, 64, 1000, 4096, 4097})
        for (const uint64_t seed : {0ull, 1337ull, ~0ull})
            for (const uint64_t epoch : {0, 1, 7}) {
                CAPTURE(n);
                std::vector<uint64_t> order = epoch_order(n, epoch, seed);
                std::sort(order.begin(), order.end());
                bool whole = true;
                for (uint64_t i = 0; i < n; i++) whole = whole && order[i] == i;
                CHECK(whole);
            }
}

TEST_CASE("shuffle: differs by epoch and by seed, and is the same every time") {
    for (const uint64_t n : {64, 1000, 4097}) {
        CHECK(epoch_order(n, 0, 1) != epoch_order(n, 1, 1));
        CHECK(epoch_order(n, 0, 1) != epoch_order(n, 0, 2));
        CHECK(epoch_order(n, 3, 1) != epoch_order(n, 3, 1ull << 40));
        CHECK(epoch_order(n, 3, 1) == epoch_order(n, 3, 1));
    }
    // Fixed for good: a checkpoint's position means the same sequences in every later version.
    CHECK(epoch_order(10, 0, 1337) == std::vector<uint64_t>{9, 5, 0, 1, 6, 2, 4, 8, 3, 7});
    const uint64_t huge = (1ull << 63) + 11;  // the widest halves
    std::set<uint64_t> seen;
    for (uint64_t p = 0; p < 1000; p++) seen.insert(sequence_at(p, huge, true, 5));
    CHECK(seen.size() == 1000);
    CHECK(*seen.rbegin() < huge);
    CHECK(*seen.rbegin() > huge / 2);
}

TEST_CASE("shuffle: each sequence is as likely in each place") {
    // 20,000 epochs of 5: each of 25 counts is 4000 +- 57 (1 sigma); 5 sigma allow for the worst of 25.
    std::vector<int> counts(25);
    for (uint64_t epoch = 0; epoch < 20000; epoch++)
        for (uint64_t p = 0; p < 5; p++) counts[p * 5 + sequence_at(epoch * 5 + p, 5, true, 9)]++;
    CHECK(*std::min_element(counts.begin(), counts.end()) > 4000 - 285);
    CHECK(*std::max_element(counts.begin(), counts.end()) < 4000 + 285);
    // Neighbours in the data are not neighbours in the order: of 4096 steps about one goes to the next sequence.
    const std::vector<uint64_t> order = epoch_order(4097, 0, 9);
    int follows = 0;
    for (size_t i = 1; i < order.size(); i++) follows += order[i] == order[i - 1] + 1;
    CHECK(follows < 10);
}

TEST_CASE("no shuffle: in order, and an epoch's end skips nothing") {
    for (uint64_t p = 0; p < 30; p++) CHECK(sequence_at(p, 10, false, 1) == p % 10);
    CHECK_THROWS_AS(sequence_at(0, 0, true, 1), Error);
}

TEST_CASE("loader: one rank gets exactly the sequences, in order, over the end of an epoch") {
    const Fixture f(10);
    for (const bool shuffle : {false, true}) {
        Loader loader(f.data, T, {4, 2, 2, 0, f.V, shuffle, 7}, 0);
        const std::vector<uint64_t> got = take(loader, 12);  // 24 sequences: 2.4 epochs
        REQUIRE(got.size() == 24);
        for (uint64_t p = 0; p < 24; p++) CHECK(got[p] == sequence_at(p, 10, shuffle, 7));
    }
}

TEST_CASE("loader: starting at step k equals going on from step k") {
    const Fixture f(17);
    const Loader::Plan plan{6, 2, 3, 0, f.V, true, 3};
    Loader whole(f.data, T, plan, 0);
    const std::vector<uint64_t> all = take(whole, 30);
    for (const int k : {0, 1, 2, 5, 9}) {
        Loader resumed(f.data, T, plan, uint64_t(k));
        const std::vector<uint64_t> rest = take(resumed, 30 - 3 * k);
        CHECK(std::equal(rest.begin(), rest.end(), all.begin() + 6 * k, all.end()));
    }
}

TEST_CASE("loader: the ranks' sequences are disjoint, and their union is the batch") {
    const Fixture f(1000);
    for (const int ranks : {1, 2, 3, 6}) {
        std::vector<std::vector<uint64_t>> share;
        for (int r = 0; r < ranks; r++) {
            Loader loader(f.data, T, {12, 2, 6 / ranks, r * 6 / ranks, f.V, true, 3}, 5);
            share.push_back(take(loader, 2 * 6 / ranks));
        }
        for (const size_t step : {0, 1}) {
            std::vector<uint64_t> batch;
            for (const auto& s : share)
                batch.insert(batch.end(), s.begin() + long(step * s.size() / 2),
                             s.begin() + long((step + 1) * s.size() / 2));
            REQUIRE(batch.size() == 12);
            for (size_t i = 0; i < 12; i++) CHECK(batch[i] == sequence_at((5 + step) * 12 + i, 1000, true, 3));
            CHECK(std::set<uint64_t>(batch.begin(), batch.end()).size() == 12);
        }
    }
}

TEST_CASE("loader: a reference stays good until the next call") {
    const Fixture f(1000);
    Loader loader(f.data, T, {1, 1, 1, 0, f.V, false, 0}, 0);
    for (uint64_t i = 0; i < 50; i++) {
        const Loader::MicroBatch& batch = loader.next();
        if (i % 10 == 0)
            std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the thread would overwrite it now
        CHECK(batch.sequences[0] == i);
        CHECK(batch.inputs[0] == int32_t(i * T));
    }
}

TEST_CASE("loader: what the thread meets is thrown by next(), after what was read before it") {
    const Fixture f(40000);
    Loader loader(f.data, T, {1, 1, 1, 0, f.V, false, 0}, 0);
    CHECK(loader.next().sequences[0] == 0);
    fs::resize_file(f.path, 4096);  // row 20: tokens from 768 on are gone
    std::string message;
    uint64_t delivered = 1;
    try {
        while (delivered < 40000) loader.next(), delivered++;
    } catch (const Error& e) {
        CHECK(e.code == Exit::data);
        message = e.what();
    }
    CHECK(message.find(f.path + ": shrank while it was in use") == 0);
    CHECK(delivered >= 255);                // 256 whole sequences lie before the cut
    CHECK_THROWS_AS(loader.next(), Error);  // and again, without waiting
}

TEST_CASE("loader: every micro-batch before a bad token is delivered") {
    const Scratch dir;
    std::vector<uint32_t> tokens = counting<uint32_t>(200 * T + 1);
    tokens[100 * T + 1] = 1u << 20;  // in sequence 100 only
    Log log;
    const TokenStream data("data.train", {dir.write("a.bin", shard_bytes(tokens))}, ShardFormat::automatic, T, 1000,
                           log);
    Loader loader(data, T, {1, 1, 1, 0, 1000, false, 0}, 0);
    for (int i = 0; i < 99; i++) loader.next();
    std::this_thread::sleep_for(std::chrono::milliseconds(50));  // by now the thread has met it, two ahead
    CHECK(loader.next().sequences[0] == 99);
    CHECK_THROWS_WITH_AS(loader.next(), doctest::Contains("token 301 is 1048576"), Error);
}

TEST_CASE("loader: stops cleanly at any moment") {
    const Fixture f(100);
    for (int i = 0; i < 200; i++) {
        Loader loader(f.data, T, {4, 2, 2, 0, f.V, true, 0}, 0);
        for (int k = 0; k < i % 7; k++) loader.next();
        if (i % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // all slots full: the thread waits
    }
    CHECK_THROWS_AS(Loader(f.data, T, {4, 2, 2, 1, true, 0}, 0), Error);  // more than the global batch
}
