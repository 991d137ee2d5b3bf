#include "trainer/sharded_update.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/clock.h"
#include "kernels/owners.h"

namespace {
constexpr int kTag = 1;  // of shards on their way to rank 0 and back
}

ShardedUpdate::ShardedUpdate(const Group& group, const TrainerOptions& options, TrainerMemory& memory)
    : k_(group.backend()),
      group_(group),
      memory_(memory),
      stage_(options.parallel.zero),
      layout_(memory.layout.value()),
      max_norm_(float(options.train.grad_clip)),
      lane_(make_lane(group, memory.sums_beside(), stage_ == 1 ? Otherwise::at_join : Otherwise::at_give)),
      reduce_(make_gradient_reduce_scatter(lane_->group(), options.allreduce, layout_.in_shard(0).count)),
      name_(fmt::format("{}{}, ZeRO-{}", memory.sums_beside() && group.size() > 1 ? "overlapped " : "",
                        all_reduce_name(options.allreduce), stage_)),
      optimizer_(k_, {{options.optimizer, layout_.pieces(flat_params(memory.param_list), group.rank())}},
                 memory.stat()),
      summed_(k_),
      updated_(k_),
      gathered_(k_),
      norm_(k_, sizeof(double)) {
    CHECK_THAT(memory.stat() == DType::f32, "ZeRO in {}; shards are f32", dtype_name(memory.stat()));
    const size_t shard = layout_.shard_count();
    memory.master_arena.add(masters_, "shard of this rank", shard, DType::f32);
    memory.shard_arena.add(gradient_, "gradient", shard, DType::f32);
    if (memory.real() == DType::bf16) memory.shard_arena.add(rounded_, "parameters, rounded", shard, DType::bf16);
    if (stage_ > 1) memory.shard_arena.add(addend_, "addend", layout_.in_shard(0).count, DType::f32);
    optimizer_.plan(memory.moment_arena, memory.scalar_arena);
    reduce_->plan(memory.shard_arena);
    if (stage_ == 3) {
        in_slot_.resize(size_t(memory.param_windows->last()) + 1);
        memory.before_block = [this](int block, int next, Stream s) { before_block(block, next, s); };
    }
}

// At its first calls NCCL connects the ranks.  start() makes these while everything is zero.
void ShardedUpdate::start(Stream s) {
    optimizer_.start(s);
    if (needs_host()) return;
    gather_parameters(s);
    sum_squares(s);
    group_.device().wait(s);
}

void ShardedUpdate::begin_step(int64_t, double learning_rate) {
    optimizer_.set_rate(learning_rate);
    lane_->begin_step();
    next_row_ = layout_.n_rows();
    passes_ = 0;
    waited_ms_ = 0;
    std::ranges::fill(in_slot_, 0);  // a recorded step begins so, whatever an evaluation has left
}

// ---- The gradient: summed row by row, from the last to the first.

void ShardedUpdate::begin_backward(Stream s) {
    passes_++;
    if (stage_ == 1) return;
    join(s);
    next_row_ = layout_.n_rows();
    const int last = memory_.grad_windows->last();
    clear(last, s);
    if (last > 1) clear(last - 1, s);
    clear(0, s);
}

void ShardedUpdate::gradient_ready(Range part, Stream s) {
    if (stage_ == 1) {
        for (; next_row_ > 0 && layout_.row(next_row_ - 1).first >= part.first; next_row_--) {
            const int row = next_row_ - 1;
            const Range range = layout_.row(row);
            const Buf parts = memory_.padded_gradient().slice(range.first, range.count);  // (ranks, unit)
            lane_->give([=, this](Stream on) { reduce_row(row, parts, false, on); }, s);
        }
        return;
    }
    const Windows& windows = *memory_.grad_windows;
    int w = windows.last();
    while (windows.content(w).end() > part.end()) w--;
    for (; w >= 0 && windows.content(w).first >= part.first; w--) {
        join(s);  // also the sums of the window above, and the parameters that the next pass reads
        reduce_rows(w, s);
        hand_down(w, s);
        if (w > 2) clear(w - 2, s);  // the next pass writes there; its slot is not being summed
    }
}

// Sums the rows that begin in this window, and so are complete.
void ShardedUpdate::reduce_rows(int window, Stream s) {
    const Windows& windows = *memory_.grad_windows;
    for (; next_row_ > 0 && layout_.row(next_row_ - 1).first >= windows.content(window).first; next_row_--) {
        const int row = next_row_ - 1;
        const Buf parts = windows.part(window, layout_.row(row));  // (ranks, unit)
        const bool add = passes_ > 1;
        give([=, this](Stream on) { reduce_row(row, parts, add, on); }, s);
    }
}

void ShardedUpdate::reduce_row(int row, Buf parts, bool add, Stream s) {
    const Range place = layout_.in_shard(row);
    const Buf mine = gradient_.slice(place.first, place.count);  // (unit)
    if (!add) return reduce_->sum(parts, mine, s);
    const Buf addend = addend_.slice(0, place.count);  // (unit)
    reduce_->sum(parts, addend, s);
    k_.add({.y = mine, .x = addend}, s);
}

// Copies the upper part of a row that begins in the window below to that window.
void ShardedUpdate::hand_down(int window, Stream s) {
    const Windows& windows = *memory_.grad_windows;
    const size_t first = windows.content(window).first;
    const Range row = layout_.row(layout_.row_of(first));
    if (row.first == first) return;
    const Range upper{first, row.end() - first};
    const Buf from = windows.part(window, upper), to = windows.part(window - 1, upper);
    k_.copy(to.data, from.data, from.n_bytes(), s);
}

// Gaps between parameters must be zero for the norm; another block may have had numbers there.
void ShardedUpdate::clear(int window, Stream s) {
    const Buf all = memory_.grad_windows->memory(window);
    k_.zero(all.data, all.n_bytes(), s);
}

// ---- The update.

void ShardedUpdate::finish_step(StepGraphs& graphs, Stream s) {
    lane_->join(s);
    graphs.run(squares_piece_, s, [&] {
        k_.set_mark(summed_.get(), s);
        sum_squares(s);
    });
    group_.device().all_reduce_sum(memory_.norm_scratch, s);
    graphs.run(update_piece_, s, [&] { update(s); });
    gather_parameters(s);
    k_.set_mark(gathered_.get(), s);
}

// Each chunk's sum of squares stands on its owner, and zero on the others: their sum over ranks is exact.
void ShardedUpdate::sum_squares(Stream s) {
    k_.zero(memory_.norm_scratch.data, memory_.norm_scratch.n_bytes(), s);
    for (int row = 0; row < layout_.n_rows(); row++) {
        const Range owned = layout_.owned(row, group_.rank());
        if (owned.count == 0) continue;
        k_.grad_norm(
            {.grad = gradient_.slice(layout_.in_shard(row).first, owned.count),
             .scratch = memory_.norm_scratch.slice(owned.first / kGradNormChunk, grad_norm_scratch(owned.count))},
            s);
    }
}

void ShardedUpdate::update(Stream s) {
    k_.grad_norm({.norm = memory_.norm, .clip = memory_.clip, .scratch = memory_.norm_scratch, .max_norm = max_norm_},
                 s);
    optimizer_.update({.param = masters_, .copy = rounded_, .grad = gradient_, .clip = memory_.clip}, s);
    k_.set_mark(updated_.get(), s);
    k_.download(norm_.as<void>(), memory_.norm.data, memory_.norm.n_bytes(), s);
}

GradientSync::Outcome ShardedUpdate::wait(Stream s) {
    group_.device().wait(s);
    const double norm = double(*norm_.as<float>());
    const bool updated = std::isfinite(norm);
    optimizer_.set_updates(optimizer_.updates() + updated);
    return {norm, updated};
}

// ---- The parameters that ops read.

// whole (ranks, unit) gets a row.
void ShardedUpdate::gather_row(int row, Buf whole, Stream s) {
    const Range place = layout_.in_shard(row);
    const Group& group = stage_ == 3 ? lane_->group() : group_;
    group.device().all_gather((rounded_ ? rounded_ : masters_).slice(place.first, place.count), whole, s);
}

void ShardedUpdate::gather_window(int window, Stream s) {
    const Windows& windows = *memory_.param_windows;
    const Range span = windows.span(window);
    for (int row = layout_.row_of(span.first); row < layout_.n_rows() && layout_.row(row).first < span.end(); row++)
        gather_row(row, windows.part(window, layout_.row(row)), s);
}

// All parameters; in stage 3 the embedding's.
void ShardedUpdate::gather_parameters(Stream s) {
    if (stage_ == 3) {
        std::ranges::fill(in_slot_, 0);
        lane_->give([this](Stream on) { gather_window(0, on); }, s);
        return lane_->join(s);
    }
    for (int row = 0; row < layout_.n_rows(); row++) {
        const Range range = layout_.row(row);
        gather_row(row, memory_.padded_params().slice(range.first, range.count), s);
    }
}

// The block's parameters are in their slot when the stream has come here; those of the next one are on their way.
void ShardedUpdate::before_block(int block, int next, Stream s) {
    fetch(block + 1, s);
    if (is_fetching_) join(s);
    if (next >= 0 && next < memory_.param_windows->last()) fetch(next + 1, s);
}

void ShardedUpdate::fetch(int window, Stream s) {
    const Windows& windows = *memory_.param_windows;
    if (std::exchange(in_slot_[size_t(window)], 1)) return;
    for (int w = 1; w <= windows.last(); w++)
        if (w != window && windows.share_slot(w, window)) in_slot_[size_t(w)] = false;
    give([this, window](Stream on) { gather_window(window, on); }, s);
    is_fetching_ = true;
}

// Work during a pass.
void ShardedUpdate::give(Lane::Work work, Stream s) {
    const Stopwatch clock;
    lane_->give(std::move(work), s);
    if (needs_host()) waited_ms_ += clock.ms();
}

void ShardedUpdate::join(Stream s) {
    const Stopwatch clock;
    lane_->join(s);
    if (needs_host()) waited_ms_ += clock.ms();
    is_fetching_ = false;
}

// ---- Checkpoints: rank 0 has all in host memory, in the order of the flat buffers.

// This rank's part of the masters and of each moment, (owned_count(rank)).
std::vector<Buf> ShardedUpdate::kept() const {
    const size_t n = layout_.owned_count(group_.rank());
    std::vector<Buf> out = {masters_.slice(0, n)};
    for (size_t m = 0; m < optimizer_.n_moments(); m++)
        out.push_back(n > 0 ? memory_.flat_moments().slice(m * n, n) : Buf());
    return out;
}

void ShardedUpdate::make_wholes() {
    if (!wholes_.empty() || group_.rank() > 0) return;
    wholes_.assign(1 + optimizer_.n_moments(), Whole(layout_.n()));
}

std::vector<StateTensor> ShardedUpdate::tensors_of(size_t whole, const std::string& prefix) {
    make_wholes();
    std::vector<StateTensor> out;
    for (const FlatParam& p : flat_params(memory_.param_list)) {
        const Buf all(wholes_[whole].data() + p.range.first, p.info.count(), DType::f32);
        out.push_back(state_tensor(prefix, p.info, all));
        out.back().on_host = true;
    }
    return out;
}

std::vector<StateTensor> ShardedUpdate::parameters() { return tensors_of(0, ""); }

std::vector<StateTensor> ShardedUpdate::state() {
    std::vector<StateTensor> out;
    for (size_t m = 0; m < optimizer_.n_moments(); m++)
        std::ranges::move(tensors_of(1 + m, fmt::format("{}.", kMoments[m])), std::back_inserter(out));
    return out;
}

// Copies between a shard and its places in the whole.
template <class Copy>
void ShardedUpdate::for_each_place(int rank, std::vector<float>& shard, Whole& whole, Copy&& copy) const {
    for (int row = 0; row < layout_.n_rows(); row++) {
        const Range owned = layout_.owned(row, rank);
        copy(shard.data() + layout_.in_shard(row).first, whole.data() + owned.first, owned.count);
    }
}

void ShardedUpdate::collect_state(Stream s) {
    make_wholes();
    const std::vector<Buf> parts = kept();
    std::vector<float> shard;
    for (size_t i = 0; i < parts.size(); i++) {
        shard.resize(parts[i].count);
        k_.download(shard.data(), parts[i].data, parts[i].n_bytes(), s);
        k_.synchronize(s);
        if (group_.rank() > 0) {
            group_.host().send(shard.data(), shard.size() * sizeof(float), 0, kTag);
            continue;
        }
        for (int rank = 0; rank < group_.size(); rank++) {
            shard.resize(layout_.owned_count(rank));
            if (rank > 0) group_.host().recv(shard.data(), shard.size() * sizeof(float), rank, kTag);
            for_each_place(rank, shard, wholes_[i],
                           [](const float* part, float* whole, size_t n) { std::copy_n(part, n, whole); });
        }
    }
}

void ShardedUpdate::distribute_state(Stream s) {
    make_wholes();
    uint64_t n = updates();
    group_.host().broadcast(&n, sizeof n, 0);
    set_updates(n);
    const std::vector<Buf> parts = kept();
    std::vector<float> shard;
    for (size_t i = 0; i < parts.size(); i++) {
        // Rank 0 sends its own shard last, which stays in `shard`.
        for (int rank = group_.size() - 1; group_.rank() == 0 && rank >= 0; rank--) {
            shard.resize(layout_.owned_count(rank));
            for_each_place(rank, shard, wholes_[i],
                           [](float* part, const float* whole, size_t count) { std::copy_n(whole, count, part); });
            if (rank > 0) group_.host().send(shard.data(), shard.size() * sizeof(float), rank, kTag);
        }
        if (group_.rank() > 0) {
            shard.resize(parts[i].count);
            group_.host().recv(shard.data(), shard.size() * sizeof(float), 0, kTag);
        }
        k_.upload(parts[i].data, shard.data(), parts[i].n_bytes(), s);
        k_.synchronize(s);
    }
    if (rounded_) k_.cast({.y = rounded_, .x = masters_}, s);
    gather_parameters(s);
    compare_parameters(s);
}

// Of the parameters that all ranks hold: a difference is Error(Exit::internal) naming ranks.
void ShardedUpdate::compare_parameters(Stream s) {
    const Buf common = stage_ == 3 ? memory_.param_windows->memory(0) : memory_.padded_params();
    uint32_t halves[2];
    k_.hash({.y = memory_.hash, .x = common}, s);
    k_.download(halves, memory_.hash.data, memory_.hash.n_bytes(), s);
    k_.synchronize(s);
    require_same(group_.host(), halves[0] | uint64_t(halves[1]) << 32, Exit::internal,
                 "other parameters than rank 0 after these were distributed");
}

uint64_t ShardedUpdate::weights_hash(Stream s) {
    collect_state(s);
    if (group_.rank() > 0) return 0;
    const Whole& masters = wholes_.front();
    uint32_t halves[2];
    cpu_backend().hash(
        {.y = Buf(halves, 2, DType::u32), .x = Buf(const_cast<float*>(masters.data()), masters.size(), DType::f32)},
        nullptr);
    return halves[0] | uint64_t(halves[1]) << 32;
}
