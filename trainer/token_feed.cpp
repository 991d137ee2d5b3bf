#include "trainer/token_feed.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/token_order.h"

TokenFeed::TokenFeed(const Backend& k, const TrainerOptions& options, const BatchShare& share, const StepBatch& staging,
                     const StepBatch& batch)
    : k_(k),
      share_(share),
      B_(options.train.micro_batch_size),
      T_(options.model.T),
      V_(options.model.V),
      staging_(staging),
      batch_(batch),
      host_("tokens on the host", share.n_micro, size_t(B_) * T_),
      copy_stream_(k),
      sent_(k),
      taken_(k) {
    host_.arena.allocate(k.host_memory, [](void* p, size_t n_bytes) { std::memset(p, 0, n_bytes); });
}

// The copy stream may still read the pinned memory.
TokenFeed::~TokenFeed() {
    try {
        k_.synchronize(copy_stream_.get());
    } catch (const std::exception&) {}  // an error of the device has been told by the step that met it
}

void TokenFeed::fetch(int64_t step, const NextMicroBatch& next) {
    const size_t BT = size_t(B_) * T_;
    fetched_ = -1;
    k_.wait_mark(sent_.get());  // the device has the former tokens of host_
    for (int i = 0; i < share_.n_micro; i++) {
        const Tokens tokens = next();
        const auto& order = tokens.order;
        CHECK_THAT(tokens.inputs.size() == BT && tokens.targets.size() == BT && (order.empty() || order.size() == BT),
                   "a micro-batch of {} and {} tokens in an order of {}, expected B*T = {}", tokens.inputs.size(),
                   tokens.targets.size(), order.size(), BT);
        const size_t at = size_t(i) * BT;
        int32_t* host_order = host_.order.as<int32_t>() + at;  // (BT)
        std::ranges::copy(tokens.inputs, host_.inputs.as<int32_t>() + at);
        std::ranges::copy(tokens.targets, host_.targets.as<int32_t>() + at);
        std::ranges::copy(order, host_order);
        if (order.empty()) sort_rows_by_token(tokens.inputs.data(), host_order, BT, V_);
        uint32_t* where = host_.where.as<uint32_t>() + 2 * size_t(i);  // (2)
        where[0] = uint32_t(step);
        where[1] = uint32_t((share_.first_micro + i) * B_);
    }
    k_.wait_for(copy_stream_.get(), taken_.get());
    const Buf from = host_.arena.bytes();
    k_.upload(staging_.arena.bytes().data, from.data, from.count, copy_stream_.get());
    k_.set_mark(sent_.get(), copy_stream_.get());
    fetched_ = step;
}

void TokenFeed::take(int64_t step, const NextMicroBatch& next, Stream compute) {
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    if (fetched_ != step) fetch(step, next);
    k_.wait_for(compute, sent_.get());
    const Buf from = staging_.arena.bytes();
    k_.copy(batch_.arena.bytes().data, from.data, from.count, compute);
    k_.set_mark(taken_.get(), compute);
    fetched_ = -1;
}

void TokenFeed::fetch_ahead(int64_t step, const NextMicroBatch& next) noexcept {
    try {
        fetch(step, next);
    } catch (...) { error_ = std::current_exception(); }
}
