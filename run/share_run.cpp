// The loop of a run whose ranks do not step together: each computes the share that it is dealt, until no share is left.
//
// Work is dealt up to the next step at which rank 0 evaluates or saves.  Then all shares before are applied and no rank
// computes, so what rank 0 evaluates and saves is the state after whole steps.
#include <algorithm>

#include "run/training_run.h"

Exit TrainingRun::run_shares(ShareSource& shares) {
    const Config& c = x_.config;
    const bool root = x_.comm.rank() == 0;
    shares_.per_step = shares.shares_per_step();
    const Loader::Plan plan = {.global_batch_size = c.train.global_batch_size / shares_.per_step,
                               .micro_batch_size = c.train.micro_batch_size,
                               .n_micro = trainer_.share().n_micro,
                               .first_micro = 0,
                               .vocab_size = c.model.vocab_size,
                               .shuffle = c.data.shuffle,
                               .seed = c.run.seed};
    while (!root || state_.step < total_steps_) {
        int64_t end = next_stop();
        bool stop = false;
        shares_.first = state_.step * shares_.per_step;
        shares_.first_tokens = state_.tokens;
        if (root) shares.open(shares_.first, end * shares_.per_step);
        while (const std::optional<int64_t> share = shares.next_share()) {
            record_lost(shares.lost());
            compute_share(*share, plan);
            if (!root || stop || !out_of_time()) continue;
            stop = true;
            end = shares.close_early() / shares_.per_step;
        }
        if (!root) return finish(shares.exit_code());
        record_lost(shares.lost());
        state_.tokens = shares_.first_tokens + uint64_t(end - state_.step) * tokens_per_step();
        state_.sequences += uint64_t(end - state_.step) * uint64_t(c.train.global_batch_size);
        x_.progress.step = state_.step = end;
        state_.updates = trainer_.updates();
        const bool last = end == total_steps_;
        const auto due = [&](int64_t interval) { return interval > 0 && (last || end % interval == 0); };
        if (due(c.eval.interval)) evaluate_and_sample();
        if (stop || due(c.checkpoint.interval)) save();
        if (stop && !last) {
            x_.log.info("run.max_minutes are over; saved, --resume goes on");
            return finish(Exit::stopped);
        }
    }
    return finish(Exit::complete);
}

// The step up to which shares are dealt.
int64_t TrainingRun::next_stop() const {
    int64_t stop = total_steps_;
    for (const int64_t interval : {x_.config.eval.interval, x_.config.checkpoint.interval})
        if (interval > 0) stop = std::min(stop, (state_.step / interval + 1) * interval);
    return stop;
}

void TrainingRun::compute_share(int64_t share, const Loader::Plan& plan) {
    const Stopwatch clock;
    const Traffic before = x_.comm.traffic();
    Loader::MicroBatch m;
    int micro = 0;
    const auto next = [&]() -> Trainer::Tokens {
        read_micro_batch(train_, x_.config.model.context_length, plan, uint64_t(share), micro++, m);
        record_sequences(m);
        return {m.inputs, m.targets, m.order};
    };
    const int64_t step = share / shares_.per_step;
    const double lr = learning_rate_at(schedule_, step);
    const StepResult r = trainer_.step(share, lr, next);
    bad_steps_ = r.updated ? 0 : bad_steps_ + 1;
    if (x_.comm.rank() == 0) record_share(share, r, lr, clock.ms(), traffic_since(before));
    if (++shares_.n_computed == kMemorySteps) check_memory();
    if (!r.updated) bad_step(r);
}

// Rank 0 computes some of a step's shares, and records the first of them.  Its loss and norm are those of the share; its
// speed counts what all ranks were dealt since the record before.
void TrainingRun::record_share(int64_t share, const StepResult& r, double learning_rate, double ms, Traffic traffic) {
    const int64_t step = share / shares_.per_step + 1;
    const uint64_t tokens = tokens_per_step() / uint64_t(shares_.per_step);
    if (step <= std::max(state_.step, x_.progress.step) || (step != total_steps_ && step % x_.config.log.interval != 0))
        return;
    const bool first = shares_.recorded < 0;
    const double n = first ? 1 : double(share - shares_.recorded), elapsed = first ? ms : shares_.since_record.ms();
    const RunState before = state_;
    state_.step = step;
    state_.tokens = shares_.first_tokens + uint64_t(share + 1 - shares_.first) * tokens;
    record_step(r, learning_rate, {.ms = ms, .tokens_per_s = n * double(tokens) / elapsed * 1e3, .traffic = traffic},
                step == total_steps_);
    state_ = before;
    x_.progress.step = step;
    shares_.recorded = share;
    shares_.since_record = Stopwatch();
}

void TrainingRun::record_lost(const std::vector<int>& lost) {
    if (x_.comm.rank() != 0) return;
    const auto tell = [&](int rank, const char* event, const std::string& message) {
        dir_->record(
            {{"type", "event"}, {"step", x_.progress.step}, {"event", event}, {"rank", rank}, {"message", message}});
        x_.log.warn("{}", message);
    };
    for (const int rank : lost)
        if (std::ranges::find(shares_.lost, rank) == shares_.lost.end())
            tell(rank, "lost_worker",
                 fmt::format(
                     "rank {} is lost: it was not heard of for {:.4g} s (run.timeout_seconds); the others train its "
                     "share and go on",
                     rank, x_.config.run.timeout_seconds));
    for (const int rank : shares_.lost)
        if (std::ranges::find(lost, rank) == lost.end())
            tell(rank, "worker_is_back", fmt::format("rank {} is back", rank));
    shares_.lost = lost;
}
