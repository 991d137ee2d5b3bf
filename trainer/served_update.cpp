#include "trainer/served_update.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "trainer/broadcast.h"

ServedUpdate::ServedUpdate(const Group& group, const TrainerOptions& options, TrainerMemory& memory)
    : k_(group.backend()),
      group_(group),
      o_(options),
      memory_(memory),
      synchronous_(options.parallel.staleness == 0),
      link_(k_, *options.link, options.parallel.servers, options.timeout_s),
      name_(synchronous_
                ? fmt::format("parameter server ({}), synchronous", link_.n_servers())
                : fmt::format("parameter server ({}), staleness {}", link_.n_servers(), options.parallel.staleness)),
      summed_(k_),
      updated_(k_),
      saved_arena_(make_param_arena("parameters and optimizer state to save", DType::f32)),
      saved_(1 + n_moments(o_.optimizer.name)) {
    CHECK_THAT(group_.size() == (synchronous_ ? link_.n_workers() : 1), "{} ranks step together, of {} workers",
               group_.size(), link_.n_workers());
}

Range ServedUpdate::shard(int server) const { return server_shard(memory_.n_params(), server, link_.n_servers()); }

// ---- A step.

void ServedUpdate::begin_step(int64_t step, double learning_rate) {
    share_ = synchronous_ ? step * link_.n_workers() + link_.rank() : step;
    learning_rate_ = learning_rate;
    if (!synchronous_) pull();
}

void ServedUpdate::finish_step(StepGraphs&, Stream s) {
    ServerMessage m{.kind = Kind::push, .sequence = n_pushed_++, .share = share_, .learning_rate = learning_rate_};
    if (synchronous_) {
        push(m, s);
        k_.set_mark(summed_.get(), s);
        receive_parameters(s);
        end_ = share_ - link_.rank() + link_.n_workers();
    } else {
        k_.grad_norm({.norm = memory_.norm,
                      .clip = memory_.clip,
                      .grad = memory_.gradient(),
                      .scratch = memory_.norm_scratch,
                      .max_norm = float(o_.train.grad_clip)},
                     s);
        k_.download(&m.norm, memory_.norm.data, sizeof m.norm, s);
        k_.download(&m.clip, memory_.clip.data, sizeof m.clip, s);
        k_.synchronize(s);
        push(m, s);
        k_.set_mark(summed_.get(), s);
        wait_for_all(Kind::done, "the receipt of a gradient");
        outcome_ = {m.norm, std::isfinite(m.norm)};
        done_ = share_;
    }
    k_.set_mark(updated_.get(), s);
}

GradientSync::Outcome ServedUpdate::wait(Stream s) {
    k_.synchronize(s);
    return outcome_;
}

// A piece to each server in turn, so that the servers receive at the same time.
void ServedUpdate::push(ServerMessage m, Stream s) {
    const Buf gradient = memory_.gradient();
    bool more = true;
    for (m.first = 0; more; m.first += ServerLink::kPiece) {
        more = false;
        for (int i = 0; i < link_.n_servers(); i++) {
            const Range r = shard(i);
            if (m.first > 0 && m.first >= r.count) continue;
            const Buf piece = gradient.slice(r.first + m.first, std::min(ServerLink::kPiece, r.count - m.first));
            const int to[] = {link_.server(i)};
            link_.send(to, m, piece, s);
            more |= m.first + ServerLink::kPiece < r.count;
        }
    }
}

ServerMessage ServedUpdate::gather(Kind kind, const char* what, const std::function<size_t(int server)>& count,
                                   const std::function<void(int server, const ServerLink::Incoming&)>& take) {
    std::vector<int> owing;  // ranks
    std::vector<size_t> left(size_t(link_.n_servers()));
    for (int i = 0; i < link_.n_servers(); i++) owing.push_back(link_.server(i)), left[size_t(i)] = count(i);
    ServerMessage last;
    while (!owing.empty()) {
        const ServerLink::Incoming in = link_.wait(what, owing);
        CHECK_THAT(in.m.kind == kind, "message {} from rank {}, expected {}: {}", int(in.m.kind), in.from, int(kind),
                   what);
        const int server = in.from - link_.n_workers();
        take(server, in);
        left.at(size_t(server)) -= std::min(left[size_t(server)], in.count());
        if (left[size_t(server)] == 0) std::erase(owing, in.from);
        last = in.m;
    }
    return last;
}

void ServedUpdate::wait_for_all(Kind kind, const char* what) {
    gather(
        kind, what, [](int) { return 0; }, [](int, const auto&) {});
}

void ServedUpdate::pull() {
    tell_servers({.kind = Kind::pull, .share = share_});
    receive_parameters(stream_);
}

void ServedUpdate::receive_parameters(Stream s) {
    const Buf masters = memory_.flat_masters();
    const ServerMessage m = gather(
        Kind::parameters, "the parameters", [&](int i) { return shard(i).count; },
        [&](int i, const auto& in) { link_.store(in, masters.slice(shard(i).first, shard(i).count), s); });
    memory_.round_masters(k_, s);
    if (!synchronous_) return;
    updates_ = m.updates;
    outcome_ = {m.norm, std::isfinite(m.norm)};
}

void ServedUpdate::tell_servers(const ServerMessage& m) {
    for (int i = 0; i < link_.n_servers(); i++) {
        const int to[] = {link_.server(i)};
        link_.send(to, m, Buf(), stream_);
    }
}

// ---- Shares.

std::optional<int64_t> ServedUpdate::next_share() {
    while (true) {
        const int dealer[] = {link_.server(0)};
        link_.send(dealer, {.kind = Kind::ask, .share = done_}, Buf(), stream_);
        done_ = -1;
        const ServerLink::Incoming in = link_.wait("a share of the work", dealer);
        const auto lost = in.as<int>();
        lost_.assign(lost.begin(), lost.end());
        updates_ = in.m.updates;
        if (in.m.kind == Kind::none) continue;
        if (in.m.kind == Kind::share) return in.m.share;
        if (in.m.kind == Kind::over) exit_code_ = Exit(in.m.end);
        share_ = -1;
        if (in.m.kind == Kind::drained) pull();
        return std::nullopt;
    }
}

void ServedUpdate::open(int64_t first, int64_t end) {
    end_ = end;
    tell_servers({.kind = Kind::open, .share = first, .end = end});
    wait_for_all(Kind::done, "the start of its work");
}

int64_t ServedUpdate::close_early() {
    const int dealer[] = {link_.server(0)};
    link_.send(dealer, {.kind = Kind::shorten}, Buf(), stream_);
    return end_ = link_.wait("the end of its work", dealer).m.end;
}

std::vector<ServerReport> ServedUpdate::server_reports() {
    std::vector<ServerReport> reports(size_t(link_.n_servers()));
    tell_servers({.kind = Kind::report, .end = end_});
    gather(
        Kind::report, "its report", [](int) { return 0; },
        [&](int i, const auto& in) { reports[size_t(i)] = unpack(in.template as<uint64_t>()); });
    return reports;
}

void ServedUpdate::close(Exit code) { tell_servers({.kind = Kind::close, .end = int64_t(code)}); }

// ---- Checkpoints.

Buf ServedUpdate::saved(size_t tensor) {
    if (!saved_arena_.bytes()) {
        for (Tensors& t : saved_) plan(saved_arena_, t, memory_.param_list, DType::f32);
        saved_arena_.allocate(k_.host_memory, [](void* p, size_t n_bytes) { std::memset(p, 0, n_bytes); });
    }
    return saved_arena_.flat(DType::f32).slice(tensor * memory_.n_params(), memory_.n_params());
}

std::vector<StateTensor> ServedUpdate::tensors_of(size_t tensor, const std::string& prefix) {
    saved(tensor);
    std::vector<StateTensor> out;
    for (size_t i = 0; i < saved_[tensor].size(); i++) {
        out.push_back(state_tensor(prefix, memory_.param_list[i], saved_[tensor][i]));
        out.back().on_host = true;
    }
    return out;
}

std::vector<StateTensor> ServedUpdate::parameters() { return tensors_of(0, ""); }

std::vector<StateTensor> ServedUpdate::state() {
    std::vector<StateTensor> out;
    for (size_t m = 1; m < saved_.size(); m++)
        std::ranges::move(tensors_of(m, fmt::format("{}.", kMoments[m - 1])), std::back_inserter(out));
    return out;
}

void ServedUpdate::collect_state(Stream s) {
    if (!is_root()) return;
    const Buf masters = memory_.flat_masters();
    k_.download(saved(0).data, masters.data, masters.n_bytes(), s);
    k_.synchronize(s);
    tell_servers({.kind = Kind::collect});
    const ServerMessage m = gather(
        Kind::moments, "the optimizer's state", [&](int i) { return (saved_.size() - 1) * shard(i).count; },
        [&](int i, const ServerLink::Incoming& in) {
            const Buf part = saved(1 + in.m.tensor).slice(shard(i).first, shard(i).count);
            CHECK_THAT(in.m.first + in.count() <= part.count, "{} + {} moments for a shard of {}", in.m.first,
                       in.count(), part.count);
            std::ranges::copy(in.bytes(), reinterpret_cast<std::byte*>(part.as<float>() + in.m.first));
        });
    updates_ = m.updates;
    const Buf all = saved_arena_.flat(DType::f32);
    if (!std::all_of(all.as<float>(), all.as<float>() + all.count, [](float x) { return std::isfinite(x); }))
        fail(Exit::numeric,
             "the optimizer state of the servers is not finite; no checkpoint was saved, earlier ones stand; "
             "lower optimizer.learning_rate and --resume");
}

void ServedUpdate::distribute_state(Stream s) {
    if (is_root()) {
        const Buf masters = memory_.flat_masters();
        k_.upload(masters.data, saved(0).data, masters.n_bytes(), s);
        k_.synchronize(s);
        memory_.round_masters(k_, s);
        const size_t n_tensors = updates_ > 0 ? saved_.size() : 1;  // of a fresh run the moments are zero
        for (int i = 0; i < link_.n_servers(); i++) {
            const auto [first, count] = shard(i);
            for (size_t t = 0; t < n_tensors; t++)
                for (size_t at = 0; at < count; at += ServerLink::kPiece)
                    link_.post(link_.server(i), {.kind = Kind::load, .tensor = uint32_t(t), .first = at},
                               std::as_bytes(std::span(saved(t).as<float>() + first + at,
                                                       std::min(ServerLink::kPiece, count - at))));
            link_.post(link_.server(i), {.kind = Kind::loaded, .updates = updates_});
        }
        wait_for_all(Kind::done, "the receipt of the state");
    }
    if (!synchronous_) return;
    broadcast_parameters(k_, group_.host(), memory_, s);
    group_.host().broadcast(&updates_, sizeof updates_, 0);
}

std::unique_ptr<GradientSync> make_served_update(const Group& group, const TrainerOptions& options,
                                                 TrainerMemory& memory) {
    return std::make_unique<ServedUpdate>(group, options, memory);
}
