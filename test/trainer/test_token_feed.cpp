// Tokens reach the ops in the order of the micro-batches, one step ahead, and an error stays with its step.
#include "test/op_test.h"
#include "trainer/token_feed.h"

namespace {
constexpr int B = 2, T = 3, V = 11, n_micro = 2;
constexpr size_t BT = size_t(B) * T;

TrainerOptions options() {
    TrainerOptions o;
    o.model = {.L = 1, .NH = 1, .C = 8, .T = T, .V = V};
    o.train.micro_batch_size = B;
    return o;
}

// A feed, with the memory that it fills.
class Fed {
  public:
    explicit Fed(const Backend& k)
        : k_(k),
          stream_(k),
          staging_("staging", n_micro, BT),
          batch_("batch", n_micro, BT),
          feed(k, options(), {.n_micro = n_micro, .first_micro = 5, .run_length = 1, .n_runs = 2}, staging_, batch_) {
        for (StepBatch* b : {&staging_, &batch_})
            b->arena.allocate(k.memory, [&](void* p, size_t n) { k.zero(p, n, stream_.get()); });
        k.synchronize(stream_.get());
    }

    // Micro-batch i, counted over all steps, has the inputs i, i + 1, ... and the targets i + 1, i + 2, ...
    TokenFeed::Tokens next() {
        if (n_calls == fails_at) fail(Exit::data, "the shard has shrunk");
        in_.clear(), out_.clear();
        for (size_t i = 0; i < BT; i++) {
            in_.push_back(int32_t((n_calls + i) % V));
            out_.push_back(int32_t((n_calls + i + 1) % V));
        }
        n_calls++;
        return {in_, out_, order};
    }
    void take(int64_t step) {
        feed.take(
            step, [this] { return next(); }, stream_.get());
    }
    void fetch_ahead(int64_t step) {
        feed.fetch_ahead(step, [this] { return next(); });
    }
    template <class N>
    std::vector<N> read(Buf StepBatch::*member) const {
        const Buf from = batch_.*member;
        std::vector<N> out(from.count);
        k_.download(out.data(), from.data, from.n_bytes(), stream_.get());
        k_.synchronize(stream_.get());
        return out;
    }

  private:
    const Backend& k_;
    const StreamOwner stream_;
    StepBatch staging_, batch_;
    std::vector<int32_t> in_, out_;

  public:
    TokenFeed feed;
    std::vector<int32_t> order;  // of every micro-batch
    size_t n_calls = 0, fails_at = 1000;
};

std::vector<int32_t> counted(size_t first) {  // the inputs of two micro-batches from number `first` on
    std::vector<int32_t> out;
    for (size_t micro = first; micro < first + n_micro; micro++)
        for (size_t i = 0; i < BT; i++) out.push_back(int32_t((micro + i) % V));
    return out;
}
const Backend* const kBackends[] = {&cpu_backend(), &cuda_backend()};
}  // namespace

TEST_CASE("token feed: micro-batches in order, with step and place in the global batch") {
    for (const Backend* k : kBackends) {
        CAPTURE(k->name);
        Fed fed(*k);
        fed.take(7);
        CHECK(fed.n_calls == n_micro);
        CHECK(fed.read<int32_t>(&StepBatch::inputs) == counted(0));
        CHECK(fed.read<int32_t>(&StepBatch::targets) == counted(1));
        CHECK(fed.read<uint32_t>(&StepBatch::where) == std::vector<uint32_t>{7, 5 * B, 7, 6 * B});
    }
}

TEST_CASE("token feed: rows are sorted by token unless the caller did so") {
    for (const Backend* k : kBackends) {
        CAPTURE(k->name);
        Fed fed(*k);
        fed.n_calls = V - 2;  // inputs 9 10 0 1 2 3, then 10 0 1 2 3 4
        fed.take(0);
        CHECK(fed.read<int32_t>(&StepBatch::order) == std::vector<int32_t>{2, 3, 4, 5, 0, 1, 1, 2, 3, 4, 5, 0});
        fed.order = {5, 4, 3, 2, 1, 0};
        fed.take(1);
        CHECK(fed.read<int32_t>(&StepBatch::order) == std::vector<int32_t>{5, 4, 3, 2, 1, 0, 5, 4, 3, 2, 1, 0});
    }
}

// Seen to fail with: tokens fetched ahead written to `batch`; fetched anew by take().
TEST_CASE("token feed: tokens fetched ahead wait for their step") {
    for (const Backend* k : kBackends) {
        CAPTURE(k->name);
        Fed fed(*k);
        for (int64_t step = 0; step < 3; step++) {
            fed.take(step);
            fed.fetch_ahead(step + 1);
            CHECK(fed.n_calls == n_micro * size_t(step + 2));
            CHECK(fed.read<int32_t>(&StepBatch::inputs) == counted(n_micro * size_t(step)));
        }
        fed.take(4);  // another step than the one that was fetched
        CHECK(fed.n_calls == n_micro * 5);
        CHECK(fed.read<int32_t>(&StepBatch::inputs) == counted(n_micro * 4));
        CHECK(fed.read<uint32_t>(&StepBatch::where)[0] == 4);
    }
}

TEST_CASE("token feed: an error met ahead is thrown once, by the step that needs the tokens") {
    for (const Backend* k : kBackends) {
        CAPTURE(k->name);
        Fed fed(*k);
        fed.take(0);
        fed.fails_at = 3;
        fed.fetch_ahead(1);
        CHECK(fed.read<int32_t>(&StepBatch::inputs) == counted(0));
        CHECK_THROWS_WITH_AS(fed.take(1), doctest::Contains("the shard has shrunk"), Error);
        fed.fails_at = 1000;
        fed.take(1);
        CHECK(fed.read<int32_t>(&StepBatch::inputs) == counted(3));
    }
}

TEST_CASE("token feed: a micro-batch of another size is refused") {
    Fed fed(cpu_backend());
    fed.order = {0, 1};
    CHECK_THROWS_WITH_AS(fed.take(0), doctest::Contains("6 and 6 tokens in an order of 2, expected B*T = 6"), Error);
}
