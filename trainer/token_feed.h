// The tokens of a step, on their way from the caller to the ops, while the device computes the step before.
//
//     next()  ->  pinned host memory  ->  staging  ->  batch, which the ops read
//        the host, in fetch()     copy stream    compute stream, at the start of the step
#pragma once
#include <exception>
#include <functional>
#include <span>

#include "trainer/memory.h"

class TokenFeed {
  public:
    // One micro-batch; valid until the next call of NextMicroBatch.
    struct Tokens {
        std::span<const int32_t> inputs, targets;  // (B, T) each
        std::span<const int32_t> order;            // (B*T) of inputs (common/token_order.h); empty: sorted here
    };
    using NextMicroBatch = std::function<Tokens()>;

    // `staging` and `batch` lie in the backend's memory and outlive the feed.
    TokenFeed(const Backend& k, const TrainerOptions& options, const BatchShare& share, const StepBatch& staging,
              const StepBatch& batch);
    TokenFeed(const TokenFeed&) = delete;
    TokenFeed& operator=(const TokenFeed&) = delete;
    ~TokenFeed();

    // Gives the compute stream a copy of this step's tokens into `batch`.  `next` is called for each micro-batch of
    // this rank unless fetch_ahead() has fetched the tokens of this step.  Throws the error that fetch_ahead() met,
    // once.
    void take(int64_t step, const NextMicroBatch& next, Stream compute);
    // Fetches the tokens of `step` and sends them to `staging`.  Never throws: an error belongs to the step that needs
    // the tokens, and the step that is running may still end well.
    void fetch_ahead(int64_t step, const NextMicroBatch& next) noexcept;

  private:
    void fetch(int64_t step, const NextMicroBatch& next);

    const Backend& k_;
    const BatchShare share_;
    const int B_, T_, V_;
    const StepBatch &staging_, &batch_;
    StepBatch host_;  // pinned
    const StreamOwner copy_stream_;
    const MarkOwner sent_;   // in the copy stream: `staging` holds the tokens of `host_`
    const MarkOwner taken_;  // in the compute stream: `batch` holds the tokens of `staging`
    int64_t fetched_ = -1;   // the step whose tokens are in `host_`; -1: none
    std::exception_ptr error_;
};
