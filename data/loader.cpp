#include "data/loader.h"

#include <algorithm>
#include <bit>

#include "common/rng.h"
#include "common/token_order.h"

// A permutation of [0, N) as a function, so that an epoch's order costs no memory and any position can be computed
// alone.
//
//   A Feistel network permutes [0, 4^w), w the least with 4^w >= N: x = (left, right), w bits each; every round
//       (left, right) <- (right, left ^ (Philox(key; right, round, epoch) & (2^w - 1)))
//   can be undone whatever the round function, so the network is a bijection.  Cycle walking restricts it to [0, N):
//   while the result is not below N, permute again.  The walk follows a cycle of the bijection that starts inside
//   [0, N), so it comes back inside, and different starts end differently.  4^w < 4 N for N > 1: fewer than 4 walks on
//   average.  8 rounds: 4 rounds of a pseudorandom function already make a pseudorandom permutation (Luby and Rackoff
//   1988).
uint64_t sequence_at(uint64_t position, uint64_t n_sequences, bool shuffle, uint64_t seed) {
    CHECK_THAT(n_sequences > 0, "a stream of no sequences");
    const uint64_t epoch = position / n_sequences;
    uint64_t x = position % n_sequences;
    if (!shuffle || n_sequences == 1) return x;
    const int half_bits = (std::bit_width(n_sequences - 1) + 1) / 2;
    const uint32_t mask = uint32_t((uint64_t(1) << half_bits) - 1);
    const uint64_t key = stream_key(seed, RngStream::shuffle);
    do {
        uint32_t left = uint32_t(x >> half_bits), right = uint32_t(x) & mask;
        for (uint32_t round = 0; round < 8; round++) {
            const uint32_t mixed =
                left ^ (philox(key, right, round, uint32_t(epoch), uint32_t(epoch >> 32)).v[0] & mask);
            left = right;
            right = mixed;
        }
        x = (uint64_t(left) << half_bits) | right;
    } while (x >= n_sequences);
    return x;
}

Loader::Loader(const TokenStream& data, int context_length, Plan plan, uint64_t first_step)
    : data_(data),
      context_length_(context_length),
      plan_(plan),
      step_(first_step),
      slot_(size_t(std::max(plan.n_micro, 0)) + 2) {
    CHECK_THAT(plan.micro_batch_size > 0 && plan.n_micro > 0 && plan.first_micro >= 0 &&
                   (int64_t(plan.first_micro) + plan.n_micro) * plan.micro_batch_size <= plan.global_batch_size,
               "micro-batches [{}, {}+{}) of {} in a global batch of {}", plan.first_micro, plan.first_micro,
               plan.n_micro, plan.micro_batch_size, plan.global_batch_size);
    thread_ = std::thread([this] { run(); });
}

Loader::~Loader() {
    {
        const std::lock_guard lock(mutex_);
        stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
}

const Loader::MicroBatch& Loader::next() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return filled_ > taken_ || error_; });
    if (filled_ == taken_) std::rethrow_exception(error_);  // micro-batches read before the error come first
    taken_++;
    changed_.notify_all();
    return slot_[(taken_ - 1) % slot_.size()];
}

// Slot k % slot_.size() holds micro-batch k of this loader.  The caller holds micro-batch taken_ - 1, so [taken_ - 1,
// filled_) are in use; only this thread writes the slot of micro-batch filled_, without the lock.
void Loader::run() {
    try {
        while (true) {
            {
                std::unique_lock lock(mutex_);
                changed_.wait(lock, [&] { return stop_ || filled_ + 1 < taken_ + slot_.size(); });
                if (stop_) return;
            }
            read_micro_batch(data_, context_length_, plan_, step_ + filled_ / uint64_t(plan_.n_micro),
                             int(filled_ % uint64_t(plan_.n_micro)), slot_[filled_ % slot_.size()]);
            {
                const std::lock_guard lock(mutex_);
                filled_++;
            }
            changed_.notify_all();
        }
    } catch (...) {
        const std::lock_guard lock(mutex_);
        error_ = std::current_exception();
        changed_.notify_all();
    }
}

void read_micro_batch(const TokenStream& data, int context_length, const Loader::Plan& plan, uint64_t step, int micro,
                      Loader::MicroBatch& batch) {
    const size_t T = size_t(context_length), B = size_t(plan.micro_batch_size);
    batch.inputs.resize(B * T);
    batch.targets.resize(B * T);
    batch.order.resize(B * T);
    batch.sequences.resize(B);
    const uint64_t first = step * uint64_t(plan.global_batch_size) + (uint64_t(plan.first_micro) + uint64_t(micro)) * B;
    for (size_t b = 0; b < B; b++) {
        batch.sequences[b] = sequence_at(first + b, data.n_sequences(), plan.shuffle, plan.seed);
        data.read(batch.sequences[b], std::span(batch.inputs).subspan(b * T, T),
                  std::span(batch.targets).subspan(b * T, T));
    }
    sort_rows_by_token(batch.inputs.data(), batch.order.data(), B * T, plan.vocab_size);
}
