#include "trainer/local_sgd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "common/hash.h"

namespace {
constexpr int64_t kFragments = 8;
constexpr float kKeep = 0.5f;  // of the replica, where a fragment arrives a step late (the paper's alpha)
constexpr const char* kWorker = "worker.";
constexpr const char* kOuter = "outer.";

std::span<float> part(const Buf& all, Range range) { return {all.as<float>() + range.first, range.count}; }

// [begin, end) of equal parts of n elements, cut between blocks of kDecayBlock.
Range equal_part(size_t n, int64_t i, int64_t parts) {
    const auto cut = [&](int64_t at) { return n / kDecayBlock * size_t(at) / size_t(parts) * kDecayBlock; };
    const size_t end = i + 1 == parts ? n : cut(i + 1);
    return {cut(i), end - cut(i)};
}

// `t` lies in the flat vector `flat`: the same place of `host`, a flat vector of as many elements in host memory.
StateTensor in_host(StateTensor t, const Buf& flat, float* host) {
    t.data.data = host + (t.data.as<float>() - flat.as<float>());
    t.on_host = true;
    return t;
}

// f(part) for each part of a vector that one message can carry.
template <class T, class F>
void each_message(std::span<T> x, F&& f) {
    constexpr size_t longest = size_t(1) << 24;
    for (size_t i = 0; i < x.size(); i += longest) f(x.subspan(i, std::min(longest, x.size() - i)));
}
void send(Comm& comm, std::span<const float> x, int to) {
    each_message(x, [&](std::span<const float> m) { comm.send(m.data(), m.size_bytes(), to); });
}
void recv(Comm& comm, std::span<float> x, int from) {
    each_message(x, [&](std::span<float> m) { comm.recv(m.data(), m.size_bytes(), from); });
}
}  // namespace

LocalSgd::LocalSgd(const Group& group, const TrainerOptions& options, TrainerMemory& memory)
    : k_(group.backend()),
      group_(group),
      memory_(memory),
      parallel_(options.parallel),
      rule_{float(parallel_.outer_learning_rate), float(parallel_.outer_momentum)},
      max_norm_(float(options.train.grad_clip)),
      n_(memory.n_params()),
      name_(fmt::format("{}{} DiLoCo", parallel_.streaming ? "streaming " : "", word_of(parallel_.outer_dtype))),
      own_comm_(parallel_.streaming ? group.host().split(0, group.rank()) : nullptr),
      mean_(own_comm_ ? *own_comm_ : group.host(), parallel_.outer_dtype),
      optimizer_(k_, {{options.optimizer, flat_params(memory.param_list)}}, memory.stat()),
      agreed_(k_),
      updated_(k_),
      exchanged_(k_),
      downloads_(k_),
      norm_(k_, sizeof(float)),
      host_(k_, 4 * n_ * sizeof(float)),
      outer_(host_.as<float>(), n_),
      momentum_(host_.as<float>() + n_, n_),
      error_(host_.as<float>() + 2 * n_, n_),
      replica_(host_.as<float>() + 3 * n_, n_) {
    CHECK_THAT(memory.stat() == DType::f32, "local SGD of {} parameters", dtype_name(memory.stat()));
    if (parallel_.zero > 0 || parallel_.overlap)
        fail(Exit::usage,
             "parallel.zero and parallel.overlap are for gradients, which parallel.method: diloco does not "
             "send; leave them out");
    optimizer_.plan(memory.moment_arena, memory.scalar_arena);
    std::memset(outer_.data, 0, 4 * n_ * sizeof(float));
    const int64_t n_fragments = parallel_.streaming ? std::min(kFragments, parallel_.sync_interval) : 0;
    for (int64_t p = 0; p < n_fragments; p++)
        fragments_.push_back({equal_part(n_, p, n_fragments), p * parallel_.sync_interval / n_fragments});
}

void LocalSgd::begin_step(int64_t step, double learning_rate) {
    optimizer_.set_rate(learning_rate);
    step_ = step;
    images_.clear();
    if (step > 0) send_ahead();
}

// Starts the exchange of the fragment whose turn it is.  Until receive() the thread alone uses the outer state.
void LocalSgd::send_ahead() {
    const auto due = std::ranges::find(fragments_, step_ % parallel_.sync_interval, &Fragment::remainder);
    if (due == fragments_.end()) return;
    sent_ = due->range;
    fetch_replica(sent_, downloads_.get());
    arrival_ = std::async(std::launch::async, [this, range = sent_] { exchange(range); });
}

// The end of the exchange that send_ahead() began.
void LocalSgd::receive(Stream s) {
    const Range range = std::exchange(sent_, {});
    arrival_.get();
    fetch_replica(range, s);
    const std::span<float> replica = part(replica_, range), outer = part(outer_, range);
    for (size_t i = 0; i < replica.size(); i++) replica[i] = kKeep * replica[i] + (1 - kKeep) * outer[i];
    put_replica(range, replica_, s);
}

void LocalSgd::finish_step(StepGraphs& graphs, Stream s) {
    agree(graphs, s);
    k_.set_mark(agreed_.get(), s);
    if (outcome_.updated)
        graphs.run(update_piece_, s, [&] {
            optimizer_.update({.param = memory_.flat_masters(),
                               .copy = memory_.flat_copy(),
                               .grad = memory_.gradient(),
                               .clip = memory_.clip},
                              s);
        });
    k_.set_mark(updated_.get(), s);
    if (sent_.count > 0) receive(s);
    if (!parallel_.streaming && (step_ + 1) % parallel_.sync_interval == 0) {
        fetch_replica({0, n_}, s);
        exchange({0, n_});
        put_replica({0, n_}, outer_, s);
    }
    k_.set_mark(exchanged_.get(), s);
}

// The norm of this rank's gradient, and whether those of all ranks are finite: all update or none does, so that all
// have made the same number of updates.
void LocalSgd::agree(StepGraphs& graphs, Stream s) {
    graphs.run(norm_piece_, s, [&] {
        k_.grad_norm({.norm = memory_.norm,
                      .clip = memory_.clip,
                      .grad = memory_.gradient(),
                      .scratch = memory_.norm_scratch,
                      .max_norm = max_norm_},
                     s);
        k_.download(norm_.as<void>(), memory_.norm.data, memory_.norm.n_bytes(), s);
    });
    group_.device().wait(s);
    std::vector<float> norms(size_t(group_.size()));
    group_.host().all_gather(norm_.as<float>(), norms.data(), sizeof(float));
    const auto bad = std::ranges::find_if_not(norms, [](float norm) { return std::isfinite(norm); });
    outcome_.updated = bad == norms.end();
    outcome_.norm = outcome_.updated ? *norm_.as<float>() : *bad;
    optimizer_.set_updates(optimizer_.updates() + outcome_.updated);
}

// replica_ has these elements of this rank's replica, and becomes the mean of all ranks'; outer_ takes a step.
void LocalSgd::exchange(Range range) {
    const std::span<float> x = part(replica_, range), outer = part(outer_, range);  // (range.count)
    const bool sends_difference = parallel_.outer_dtype != OuterDtype::fp32;
    const auto from_outer = [&] {  // to the difference, and back
        for (size_t i = 0; sends_difference && i < x.size(); i++) x[i] = outer[i] - x[i];
    };
    from_outer();
    mean_.mean(x, sends_difference ? part(error_, range) : std::span<float>());
    from_outer();
    outer_update(rule_, outer, part(momentum_, range), x);
}

// The host waits for the replica's way to replica_, but not for the way back.
void LocalSgd::fetch_replica(Range range, Stream s) {
    const Buf from = memory_.flat_masters().slice(range.first, range.count);
    k_.download(part(replica_, range).data(), from.data, from.n_bytes(), s);
    k_.synchronize(s);
}

void LocalSgd::put_replica(Range range, const Buf& from, Stream s) {
    const Buf masters = memory_.flat_masters().slice(range.first, range.count);
    k_.upload(masters.data, part(from, range).data(), masters.n_bytes(), s);
    if (const Buf copy = memory_.flat_copy()) k_.cast({.y = copy.slice(range.first, range.count), .x = masters}, s);
}

GradientSync::Outcome LocalSgd::wait(Stream s) {
    group_.device().wait(s);
    return outcome_;
}

void LocalSgd::enter_evaluation(Stream s) {
    fetch_replica({0, n_}, s);
    put_replica({0, n_}, outer_, s);
    k_.synchronize(s);
}

void LocalSgd::leave_evaluation(Stream s) {
    put_replica({0, n_}, replica_, s);
    k_.synchronize(s);
}

uint64_t LocalSgd::weights_hash(Stream s) {
    enter_evaluation(s);
    const uint64_t hash = memory_.weights_hash(k_, s);
    leave_evaluation(s);
    return hash;
}

std::vector<StateTensor> LocalSgd::parameters() {
    std::vector<StateTensor> out = memory_.parameters();
    for (StateTensor& t : out) t = in_host(t, memory_.flat_masters(), outer_.as<float>());
    return out;
}

std::vector<StateTensor> LocalSgd::state() {
    if (images_.empty()) images_.assign(takes_workers_ ? size_t(group_.size()) : 1, std::vector<float>(n_image()));
    std::vector<StateTensor> out;
    for (const StateTensor& t : optimizer_.state())
        out.push_back(in_host(t, memory_.flat_moments(), images_[0].data() + n_));
    for (StateTensor& t : memory_.parameters()) {
        if (!takes_momentum_) break;
        out.push_back(in_host(t, memory_.flat_masters(), momentum_.as<float>()));
        out.back().name = kOuter + t.name;
    }
    for (size_t r = 0; takes_workers_ && r < images_.size(); r++) {
        out.push_back(StateTensor::whole(kWorker + std::to_string(r), {n_image()}, Buf(images_[r].data(), n_image())));
        out.back().on_host = true;
    }
    return out;
}

std::string LocalSgd::accept(const std::vector<std::string>& saved) {
    const auto count = [&](const char* prefix) {
        return std::ranges::count_if(saved, [&](const std::string& name) { return name.starts_with(prefix); });
    };
    const auto n_workers = count(kWorker);
    images_.clear();  // state() makes those that are taken
    takes_momentum_ = count(kOuter) > 0;
    takes_workers_ = n_workers == group_.size();
    if (n_workers == 0 || takes_workers_) return {};
    return fmt::format("{} worker(s) were saved, {} rank(s) go on from the outer parameters, with worker 0's moments",
                       n_workers, group_.size());
}

std::vector<float> LocalSgd::image(Stream s) {
    std::vector<float> image(n_image());
    const Buf masters = memory_.flat_masters(), moments = memory_.flat_moments();
    k_.download(image.data(), masters.data, masters.n_bytes(), s);
    k_.download(image.data() + n_, moments.data, moments.n_bytes(), s);
    k_.synchronize(s);
    std::ranges::copy(part(error_, {0, n_}), image.end() - ptrdiff_t(n_));
    return image;
}

void LocalSgd::load_image(const std::vector<float>& image, Stream s) {
    const Buf masters = memory_.flat_masters(), moments = memory_.flat_moments();
    k_.upload(masters.data, image.data(), masters.n_bytes(), s);
    k_.upload(moments.data, image.data() + n_, moments.n_bytes(), s);
    k_.synchronize(s);
    memory_.round_masters(k_, s);
    std::copy(image.end() - ptrdiff_t(n_), image.end(), error_.as<float>());
}

void LocalSgd::collect_state(Stream s) {
    if (group_.rank() > 0) return send(group_.host(), image(s), 0);
    images_ = {image(s)};
    for (int r = 1; r < group_.size(); r++) recv(group_.host(), images_.emplace_back(n_image()), r);
}

void LocalSgd::distribute_state(Stream s) {
    Comm& host = group_.host();
    const bool root = group_.rank() == 0;
    uint64_t plan[] = {updates(), takes_workers_ && images_.size() == size_t(group_.size())};
    host.broadcast(plan, sizeof plan, 0);
    set_updates(plan[0]);
    const bool fresh = plan[0] == 0;  // all but the parameters is zero
    host.broadcast(outer_.data, outer_.n_bytes(), 0);
    if (!fresh) host.broadcast(momentum_.data, momentum_.n_bytes(), 0);
    require_same(host, hash64(outer_.data, 2 * outer_.n_bytes()), Exit::internal,  // and of the momentum
                 "other outer parameters than rank 0 after the broadcast");
    std::vector<float> mine(n_image());
    if (plan[1]) {  // every worker goes on where it was
        if (root) mine = images_[0];
        for (int r = 1; root && r < group_.size(); r++) send(host, images_[size_t(r)], r);
        if (!root) recv(host, mine, 0);
    } else {  // or begins at the outer parameters with worker 0's moments
        if (root && !fresh) mine = images_.empty() ? image(s) : images_[0];
        std::ranges::copy(part(outer_, {0, n_}), mine.begin());
        if (!fresh) host.broadcast(mine.data() + n_, memory_.flat_moments().n_bytes(), 0);
        std::fill(mine.end() - ptrdiff_t(n_), mine.end(), 0.0f);
    }
    load_image(mine, s);
    images_.clear();
    takes_momentum_ = takes_workers_ = true;
}

std::unique_ptr<GradientSync> make_local_sgd(const Group& group, const TrainerOptions& options, TrainerMemory& memory) {
    return std::make_unique<LocalSgd>(group, options, memory);
}
