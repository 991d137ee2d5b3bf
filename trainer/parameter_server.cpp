#include "trainer/parameter_server.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>

#include "model/memory.h"

namespace {
constexpr auto kPause = std::chrono::microseconds(50);  // between two looks for a message
constexpr double kMostSecondsUnanswered = 0.5;          // then a worker that asks hears that there is nothing yet

size_t count_params(const TrainerOptions& o) {
    return flat_params(o.model.architecture->params(o.model)).back().range.end();
}
std::vector<FlatParam> my_params(const TrainerOptions& o, Range shard) {
    return cut_params(flat_params(o.model.architecture->params(o.model)), shard);
}

// An update by one share of n in a step, instead of one by all of them.  Adam and Lion divide by the size of a gradient,
// which for a share is mostly noise: their rate falls with the square root of n (Malladi et al. 2022, arXiv 2205.10287).
// Decay that is apart from the gradient stays, over a step, what it is.
double rate_scale(const TrainerOptions& o, int n) {
    return o.optimizer.name == OptimizerKind::sgd ? 1.0 / n : 1 / std::sqrt(n);
}
Config::Optimizer of_share(const TrainerOptions& o, int n) {
    Config::Optimizer out = o.optimizer;
    if (out.name == OptimizerKind::adamw || out.name == OptimizerKind::lion) out.weight_decay /= n * rate_scale(o, n);
    return out;
}
double seconds_since(std::chrono::steady_clock::time_point t) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count();
}
}  // namespace

ParameterServer::ParameterServer(const Group& servers, const TrainerOptions& options)
    : k_(servers.backend()),
      group_(servers),
      o_(options),
      synchronous_(options.parallel.staleness == 0),
      link_(k_, *options.link, servers.size(), options.timeout_s),
      n_params_(count_params(options)),
      shard_(server_shard(n_params_, servers.rank(), servers.size())),
      n_slots_(synchronous_ ? int(std::bit_ceil(unsigned(link_.n_workers()))) : link_.n_workers()),
      stream_owner_(k_),
      stream_(stream_owner_.get()),
      master_arena_(make_param_arena("parameters", DType::f32)),
      moment_arena_(make_param_arena("optimizer state", DType::f32)),
      slot_arena_(make_param_arena("gradients of the workers", DType::f32)),
      scalar_arena_("scalars and scratch"),
      optimizer_(k_, {{synchronous_ ? o_.optimizer : of_share(o_, link_.n_workers()), my_params(o_, shard_)}},
                 DType::f32),
      workers_(size_t(link_.n_workers())),
      log_(link_.n_workers()),
      dealer_(link_.n_workers(), options.parallel.staleness) {
    master_arena_.add(masters_, "shard", shard_.count, DType::f32);
    slot_arena_.add(slots_, "slots", size_t(n_slots_) * shard_.count, DType::f32);
    optimizer_.plan(moment_arena_, scalar_arena_);
    scalar_arena_.add(norm_, "norm", 1, DType::f32);
    scalar_arena_.add(clip_, "clip", 1, DType::f32);
    scalar_arena_.add(my_sums_, "norm_scratch", grad_norm_scratch(shard_.count), DType::f32);
    scalar_arena_.add(all_sums_, "norm_scratch of all", grad_norm_scratch(n_params_), DType::f32);
    for (Arena* a : {&master_arena_, &moment_arena_, &slot_arena_, &scalar_arena_})
        a->allocate(k_.memory, [&](void* p, size_t n_bytes) { k_.zero(p, n_bytes, stream_); });
    k_.synchronize(stream_);
    optimizer_.start(stream_);
}

Exit ParameterServer::serve(const std::function<void(int64_t step)>& progress) {
    progress_ = progress;
    while (!is_over()) {
        const std::optional<ServerLink::Incoming> in = link_.receive();
        if (in) take(*in);
        deal();
        look_for_lost();
        if (!in) std::this_thread::sleep_for(kPause);
    }
    link_.flush();
    return *closed_;
}

// The server that deals goes last: it tells every worker that the run is over.
bool ParameterServer::is_over() const {
    if (!closed_) return false;
    return !deals() || std::ranges::all_of(workers_, [](const Worker& w) { return w.left || w.lost; });
}

bool ParameterServer::has_lost() const { return std::ranges::any_of(workers_, &Worker::lost); }

void ParameterServer::take(const ServerLink::Incoming& in) {
    Worker& worker = workers_.at(size_t(in.from));
    worker.heard = Clock::now();
    worker.lost = false;
    switch (in.m.kind) {
        case Kind::load:
            return link_.store(
                in, in.m.tensor == 0 ? masters_ : moments().slice((in.m.tensor - 1) * shard_.count, shard_.count),
                stream_);
        case Kind::loaded:
            optimizer_.set_updates(in.m.updates);
            if (in.m.updates == 0 && moments()) k_.zero(moments().data, moments().n_bytes(), stream_);
            return answer(in.from, Kind::done);
        case Kind::push:
            return take_push(in);
        case Kind::pull:
            if (in.m.share >= 0) log_.expect_fresh(in.m.share, o_.parallel.staleness);
            return link_.post(in.from, {.kind = Kind::parameters, .updates = optimizer_.updates()}, masters_, stream_);
        case Kind::ask:
            dealer_.done(in.from, in.m.share);
            worker.asked = worker.heard;
            return;
        case Kind::open:
            if (deals()) dealer_.open(in.m.share, in.m.end);
            log_.begin_at(in.m.share);
            return answer(in.from, Kind::done);
        case Kind::shorten:
            return link_.post(in.from, {.kind = Kind::done, .end = dealer_.close_early()});
        case Kind::collect:
            return send_moments(in.from);
        case Kind::report: {
            log_.begin_at(in.m.end);  // checks that the run's shares are applied
            const std::vector<uint64_t> numbers = pack(report());
            return link_.post(in.from, {.kind = Kind::report}, std::as_bytes(std::span(numbers)));
        }
        case Kind::close:
            closed_ = Exit(in.m.end);
            worker.left = true;
            return;
        default:
            fail(Exit::internal, "a server received message {} from rank {}", int(in.m.kind), in.from);
    }
}

void ParameterServer::take_push(const ServerLink::Incoming& in) {
    Worker& worker = workers_[size_t(in.from)];
    if (in.m.first == 0) {
        log_.receive(in.from, in.m.sequence);
        worker.n_received = 0;
        if (synchronous_) {
            if (log_.is_fresh()) log_.begin_at(in.m.share - in.from);
            log_.expect_fresh(in.m.share, 0);
            if (!round_began_) round_began_ = worker.heard;
        }
    }
    CHECK_THAT(in.m.first == worker.n_received, "a push of rank {} goes on at {}, expected {}", in.from, in.m.first,
               worker.n_received);
    link_.store(in, slot(in.from), stream_);
    worker.n_received += in.count();
    if (worker.n_received < shard_.count) return;
    const bool is_new = log_.apply(in.from, in.m.share);
    if (!synchronous_) {
        if (is_new) update_by_one(in.from, in.m);
        return answer(in.from, Kind::done);
    }
    const int64_t step = in.m.share / link_.n_workers();
    CHECK_THAT(is_new, "rank {} pushed a stale gradient, of step {}", in.from, step);
    if (log_.floor() == (step + 1) * link_.n_workers()) update_by_all(in.m);
}

void ParameterServer::update_by_all(const ServerMessage& push) {
    round_began_.reset();
    const int n_workers = link_.n_workers();
    if (shard_.count) {
        if (n_slots_ > n_workers)
            k_.zero(slot(n_workers).data, size_t(n_slots_ - n_workers) * shard_.count * sizeof(float), stream_);
        k_.tree_sum({.y = slot(0), .x = slots_, .parts = n_slots_}, stream_);
    }
    const float norm = norm_of_all();
    update(slot(0), norm, push.learning_rate);
    send_to_all({.kind = Kind::parameters, .updates = optimizer_.updates(), .norm = norm});
}

// Norm and clip factor of the whole gradient, from the sums of squares of all servers' chunks in their order.
float ParameterServer::norm_of_all() {
    const int size = group_.size();
    if (shard_.count) k_.grad_norm({.grad = slot(0), .scratch = my_sums_}, stream_);
    const auto n_chunks = [&](int server) { return grad_norm_scratch(server_shard(n_params_, server, size).count); };
    size_t longest = 0;
    for (int s = 0; s < size; s++) longest = std::max(longest, n_chunks(s));
    std::vector<float> mine(longest), blocks(longest * size_t(size)), all;  // (longest), (servers, longest), (chunks)
    if (shard_.count) k_.download(mine.data(), my_sums_.data, my_sums_.n_bytes(), stream_);
    k_.synchronize(stream_);
    group_.host().all_gather(mine.data(), blocks.data(), longest * sizeof(float));
    for (int s = 0; s < size; s++) {
        const auto block = blocks.begin() + ptrdiff_t(size_t(s) * longest);
        all.insert(all.end(), block, block + ptrdiff_t(n_chunks(s)));
    }
    CHECK_THAT(all.size() == all_sums_.count, "{} sums of squares, expected {}", all.size(), all_sums_.count);
    k_.upload(all_sums_.data, all.data(), all_sums_.n_bytes(), stream_);
    k_.grad_norm({.norm = norm_, .clip = clip_, .scratch = all_sums_, .max_norm = float(o_.train.grad_clip)}, stream_);
    float norm = 0;
    k_.download(&norm, norm_.data, sizeof norm, stream_);
    k_.synchronize(stream_);
    return norm;
}

void ParameterServer::update_by_one(int worker, const ServerMessage& push) {
    k_.upload(clip_.data, &push.clip, sizeof push.clip, stream_);
    update(slot(worker), push.norm, push.learning_rate * rate_scale(o_, link_.n_workers()));
}

// By the gradient, with the clip factor in clip_.
void ParameterServer::update(Buf gradient, float norm, double learning_rate) {
    optimizer_.set_rate(learning_rate);
    if (shard_.count) optimizer_.update({.param = masters_, .grad = gradient, .clip = clip_}, stream_);
    k_.synchronize(stream_);
    const bool updated = std::isfinite(norm);
    optimizer_.set_updates(optimizer_.updates() + updated);
    n_skipped_ += !updated;
    if (progress_) progress_(log_.floor() / link_.n_workers());
}

// All workers wait for them, so that no copy has to be kept.
void ParameterServer::send_to_all(ServerMessage m) {
    std::vector<int> all(size_t(link_.n_workers()));  // (workers)
    std::iota(all.begin(), all.end(), 0);
    do {
        const Buf piece = masters_.slice(m.first, std::min(ServerLink::kPiece, masters_.count - m.first));
        link_.send(all, m, piece, stream_);
        m.first += piece.count;
    } while (m.first < masters_.count);
}

void ParameterServer::send_moments(int to) {
    const size_t n = shard_.count ? n_moments(o_.optimizer.name) : 1;  // an empty shard: one empty message
    for (size_t i = 0; i < n; i++)
        link_.post(to, {.kind = Kind::moments, .tensor = uint32_t(i), .updates = optimizer_.updates()},
                   moments().slice(i * shard_.count, shard_.count), stream_);
}

// Answers those who ask for a share.
void ParameterServer::deal() {
    if (!deals()) return;
    for (int w = 0; w < link_.n_workers(); w++) {
        Worker& worker = workers_[size_t(w)];
        if (!worker.asked) continue;
        Kind kind = Kind::none;
        std::optional<int64_t> share;
        if (closed_)
            kind = Kind::over;
        else if (w == 0 && dealer_.drained())
            kind = Kind::drained;
        else if ((share = dealer_.deal(w)))
            kind = Kind::share;
        if (kind == Kind::none && seconds_since(*worker.asked) < kMostSecondsUnanswered) continue;
        worker.asked.reset();
        worker.heard = Clock::now();
        worker.left = kind == Kind::over;
        std::vector<int> lost;
        for (int other = 0; other < link_.n_workers(); other++)
            if (workers_[size_t(other)].lost) lost.push_back(other);
        link_.post(w,
                   {.kind = kind,
                    .share = share.value_or(-1),
                    .end = int64_t(closed_.value_or(Exit::complete)),
                    .updates = optimizer_.updates()},
                   std::as_bytes(std::span(lost)));
    }
}

void ParameterServer::look_for_lost() {
    const int64_t round = log_.floor() / link_.n_workers() * link_.n_workers();  // its first share
    for (int w = 0; w < link_.n_workers(); w++) {
        Worker& worker = workers_[size_t(w)];
        if (synchronous_) {
            if (round_began_ && !log_.is_applied(round + w) &&
                seconds_since(std::max(worker.heard, *round_began_)) > o_.timeout_s)
                fail_lost(w, "whose gradient a step waits for");
        } else if (deals() && !worker.lost && !worker.left && (dealer_.held_by(w) || closed_) &&
                   seconds_since(worker.heard) > o_.timeout_s) {
            if (w == 0) fail_lost(w, "which writes the run's files");
            worker.lost = true;
            dealer_.lose(w);
            link_.forget(w);
        }
    }
}

void ParameterServer::fail_lost(int worker, const char* why) const {
    fail(Exit::peer_lost, "rank {}, {}, is lost: not heard of for {:.4g} s (run.timeout_seconds); use --resume", worker,
         why, o_.timeout_s);
}

void ParameterServer::answer(int to, Kind kind) { link_.post(to, {.kind = kind, .updates = optimizer_.updates()}); }

ServerReport ParameterServer::report() const {
    return {.rank = link_.rank(),
            .first = shard_.first,
            .count = shard_.count,
            .n_repeated = log_.n_repeated(),
            .n_skipped = n_skipped_,
            .largest_staleness = log_.largest_staleness(),
            .applied = log_.applied()};
}
