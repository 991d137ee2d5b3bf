// The order in which a run sees its sequences, and a thread that fetches them ahead.
#pragma once
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include "data/shard.h"

// Position p of the endless stream -> sequence index.  Epoch e = p / N; shuffled by a keyed permutation of [0, N)
// that is a pure function of (seed, e), or in order.  Needs no memory, so the position in a checkpoint is just a
// number.
uint64_t sequence_at(uint64_t position, uint64_t n_sequences, bool shuffle, uint64_t seed);

// Micro-batches of this rank in order, fetched and sorted by a thread that is a step ahead.
class Loader {
  public:
    struct Plan {
        int global_batch_size, micro_batch_size;  // sequences
        int n_micro, first_micro;                 // this rank's share of each global batch
        int vocab_size;
        bool shuffle;
        uint64_t seed;
    };
    struct MicroBatch {
        std::vector<int32_t> inputs, targets;  // (B, T) each
        std::vector<int32_t> order;            // (B*T) rows of inputs sorted by token (common/token_order.h)
        std::vector<uint64_t> sequences;       // (B) indices in the data set of the sequences read
    };
    // Starts at the first micro-batch of global batch `first_step` (counted from 0).
    Loader(const TokenStream& data, int context_length, Plan plan, uint64_t first_step);
    ~Loader();
    Loader(const Loader&) = delete;
    Loader& operator=(const Loader&) = delete;

    // Next micro-batch of this rank: n_micro of them make a step.  Rethrows an error of the thread.  The reference is
    // valid until the next call.
    const MicroBatch& next();

  private:
    void run();

    const TokenStream& data_;
    const int context_length_;
    const Plan plan_;
    uint64_t step_;
    std::vector<MicroBatch> slot_;  // one in the caller's hands, a whole step's ready, one being filled
    uint64_t filled_ = 0, taken_ = 0;
    bool stop_ = false;
    std::exception_ptr error_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::thread thread_;
};

// The micro-batch `micro` of a rank's share of global batch `step`, read now.
void read_micro_batch(const TokenStream& data, int context_length, const Loader::Plan& plan, uint64_t step, int micro,
                      Loader::MicroBatch& batch);
