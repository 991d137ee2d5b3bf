#include "run/training_run.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <utility>

#include "common/hash.h"
#include "common/json.h"
#include "run/inputs.h"
#include "run/options.h"
#include "run/rank_table.h"
#include "run/records.h"
#include "model/generate.h"
#include "trainer/tuning.h"

namespace {
constexpr int kMaxBadSteps = 10;  // so many in a row mean a dead run, not bad luck

int64_t total_steps(const Config& c, const TokenStream& data) {
    if (c.train.max_steps > 0) return c.train.max_steps;
    const double steps = c.train.max_epochs * double(data.n_sequences()) / c.train.global_batch_size;
    return std::max<int64_t>(1, int64_t(steps));
}

std::vector<DataPart> parts_of(const TokenStream* data) {
    std::vector<DataPart> parts;
    if (data)
        for (const TokenStream::Part& p : data->parts()) parts.push_back({p.file, p.tokens, p.fingerprint});
    return parts;
}

void require_same_data(const char* key, const std::vector<DataPart>& before, const std::vector<DataPart>& now) {
    if (before.size() != now.size())
        fail(Exit::data, "{}: {} shards now, {} when the checkpoint was saved", key, now.size(), before.size());
    for (size_t i = 0; i < now.size(); i++)
        if (!(now[i] == before[i]))
            fail(Exit::data,
                 "{}: {} ({} tokens, fingerprint {}) is not the shard that the checkpoint was trained on: {} ({} "
                 "tokens, "
                 "fingerprint {}); restore it, or start another run with model.init_from",
                 key, now[i].file, now[i].tokens, hash_text(now[i].fingerprint), before[i].file, before[i].tokens,
                 hash_text(before[i].fingerprint));
}

// With max_epochs only the data tell the number of steps, and so whether the schedule fits.
void check_schedule(Config c, int64_t steps) {
    const std::string name = fmt::format("train.max_epochs = {} makes {} steps", c.train.max_epochs, steps);
    c.train.max_epochs = 0;
    c.train.max_steps = steps;
    parse_config(to_yaml(c), name, {});
}

// Bytes of the GPU's memory that this and other processes took since CUDA's context was created.
size_t memory_taken(const RunDevice& d) {
    return d.memory.n_free - std::min(d.memory.n_free, d.k.memory_state().n_free);
}

}  // namespace

TrainingRun::TrainingRun(const Context& x, OpenMode mode)
    : x_(x),
      train_(open_data(x, "data.train", x.config.data.train)),
      total_steps_(total_steps(x.config, train_)),
      schedule_(schedule_of(x.config, total_steps_)),
      peak_(measure_run_peak(x.comm, x.device.k, real_of(x.config.device.dtype), x.device.name,
                             x.device.is_first_on_gpu)),
      trainer_(x.device.world, training_options(x)) {
    const Config& c = x.config;
    if (!c.data.val.empty()) val_.emplace(open_data(x, "data.val", c.data.val));
    if (train_.n_sequences() < uint64_t(c.train.global_batch_size))
        fail(Exit::data,
             "data.train holds {} sequences of {} tokens, fewer than train.global_batch_size = {}; use more data, "
             "a shorter context_length or a smaller batch",
             train_.n_sequences(), c.model.context_length, c.train.global_batch_size);
    // Without prompts only `generate` needs the tokenizer; rank 0, whose files count, reports a wrong one now.
    if (!c.eval.sample_prompts.empty() || (!c.data.tokenizer.empty() && x.comm.rank() == 0))
        tokenizer_.emplace(open_tokenizer(c));
    for (const std::string& prompt : c.eval.sample_prompts)
        prompt_tokens(*tokenizer_, prompt);  // refused now, not later
    if (c.train.max_epochs > 0) check_schedule(c, total_steps_);
    state_.config = to_yaml(c);
    state_.attention = x_.device.attention;
    state_.train = parts_of(&train_);
    state_.val = parts_of(val_ ? &*val_ : nullptr);
    const uint64_t data[] = {train_.fingerprint(), val_ ? val_->fingerprint() : 0, uint64_t(total_steps_)};
    require_same(x.comm, hash64(data, sizeof data), Exit::data, kOtherData);
    // Parameters first: an error in init_from, or on another rank, must not cost the files of an earlier run.
    const bool root = x.comm.rank() == 0;
    if (root && mode != OpenMode::resume) initialize();
    patient_barrier(x.comm);
    if (root) dir_ = std::make_unique<RunDirectory>(x.run_dir, mode);
    start(mode);
}

// KILN_RECORD_SEQUENCES=PREFIX: each rank appends the indices of the sequences it read to PREFIX.<rank>, a line per
// micro-batch.  For the tests, which check that the ranks' shares are disjoint and complete.
void TrainingRun::record_sequences(const Loader::MicroBatch& m) const {
    const char* prefix = std::getenv("KILN_RECORD_SEQUENCES");
    if (!prefix) return;
    OutFile out(fmt::format("{}.{}", prefix, x_.comm.rank()), true);
    out.write(fmt::format("{}\n", fmt::join(m.sequences, " ")));
}

Exit TrainingRun::run() {
    if (ShareSource* shares = trainer_.shares()) return run_shares(*shares);
    const Config& c = x_.config;
    Loader loader(train_, c.model.context_length,
                  {.global_batch_size = c.train.global_batch_size,
                   .micro_batch_size = c.train.micro_batch_size,
                   .n_micro = trainer_.share().n_micro,
                   .first_micro = trainer_.share().first_micro,
                   .vocab_size = c.model.vocab_size,
                   .shuffle = c.data.shuffle,
                   .seed = c.run.seed},
                  state_.sequences / uint64_t(c.train.global_batch_size));
    const auto next = [&]() -> Trainer::Tokens {
        const Loader::MicroBatch& m = loader.next();
        record_sequences(m);
        return {m.inputs, m.targets, m.order};
    };
    while (state_.step < total_steps_) {
        step(next);
        const bool last = state_.step == total_steps_, stop = !last && out_of_time();
        const auto due = [&](int64_t interval) { return interval > 0 && (last || state_.step % interval == 0); };
        if (due(c.eval.interval)) evaluate_and_sample();
        if (bad_steps_ > 0 && !last && !stop) continue;  // nothing is saved until a step is good again
        if (bad_steps_ > 0) fail(Exit::numeric, "the run ends on {} bad step(s) in a row", bad_steps_);
        if (stop || due(c.checkpoint.interval)) save();
        if (stop && x_.comm.rank() == 0) x_.log.info("run.max_minutes are over; saved, --resume goes on");
        if (stop) return finish(Exit::stopped);
    }
    return finish(Exit::complete);
}

// Success counts only when every rank has got here.
Exit TrainingRun::finish(Exit code) {
    x_.device.world.host().barrier();
    const uint64_t weights = trainer_.weights_hash();
    if (x_.comm.rank() != 0) return code;
    if (const std::vector<ServerReport> servers = trainer_.server_reports(); !servers.empty()) {
        dir_->record(servers_event(state_.step, servers, shares_.lost));
        x_.log.info("{}", servers_summary(servers, shares_.lost));
    }
    const char* state = code == Exit::complete ? "complete" : "stopped";
    x_.log.info("{} at step {}, weights {}", state, state_.step, hash_text(weights));
    write_status(x_.run_dir, state, state_.step, int(code), "");
    trainer_.close(code);
    return code;
}

// The parameters of rank 0 - random, imported or resumed - go to all; then the run may write.
void TrainingRun::start(OpenMode mode) {
    const bool root = x_.comm.rank() == 0;
    if (root && mode == OpenMode::resume) {
        const auto found = find_checkpoint(dir_->checkpoints(), x_.log, true);
        if (found) resume_from(*found);
        if (!found) initialize();
        if (!found) x_.log.info("--resume: no checkpoint in {} yet; starting at step 0", dir_->checkpoints().string());
    }
    patient_barrier(x_.comm);  // rank 0 has read the checkpoint
    uint64_t cursor[3] = {uint64_t(state_.step), state_.tokens, state_.sequences};
    x_.comm.broadcast(cursor, sizeof cursor, 0);
    state_.step = int64_t(cursor[0]);
    state_.tokens = cursor[1];
    state_.sequences = cursor[2];
    trainer_.distribute_state();
    x_.progress.run_dir = x_.run_dir;  // from here on a failure shows in status.json
    x_.progress.step = first_step_ = state_.step;
    if (x_.config.device.tuning == UseTuning::on) {
        const PatientScope scope(x_.comm);  // rank 0 measures
        state_.choices =
            agree_on_choices(x_.device.k, x_.comm, x_.log, state_.choices, [&] { return trainer_.tune(); });
    } else {
        state_.choices.clear();
    }
    const std::vector<std::string> ranks = rank_table(x_.comm, x_.device, grid_of(x_.config, x_.comm.size()));
    if (!root) return;
    // Every matrix product and the reduction have run by now: memory taken beyond our own holds the libraries' handles,
    // buffers and loaded kernels, or belongs to another process.
    const size_t ours = trainer_.memory().n_bytes() + x_.device.workspace_bytes, taken = memory_taken(x_.device);
    if (x_.device.has_own_gpu) libraries_.all = taken - std::min(taken, ours);
    libraries_.nccl = std::min(libraries_.all, x_.device.nccl_bytes + trainer_.sync().connection_bytes());
    x_.log.open((x_.run_dir / "train.log").string());
    if (!trainer_.sync().is_scattered() && (x_.config.checkpoint.interval > 0 || x_.config.run.max_minutes > 0)) {
        const Snapshot::Kind kind = snapshot_kind(x_.device.k);
        parameters_.emplace(x_.device.k, trainer_.parameters(), kind);
        moments_.emplace(x_.device.k, trainer_.moments(), kind);
    }
    dir_->write_config(state_.config);
    dir_->start_metrics(state_.step);
    announce();
    for (const std::string& line : ranks) x_.log.info("{}", line);
    if (!x_.device.bus_id.empty())
        gpu_.emplace(x_.device.bus_id, [this](const std::string& why) { x_.log.info("{}", why); });
    if (state_.step == total_steps_ && state_.step > 0)
        x_.log.info("the checkpoint is at step {}, which is the last: a larger train.max_steps or max_epochs goes on",
                    state_.step);
    if (state_.step > total_steps_)
        x_.log.warn("the checkpoint is at step {}, beyond train.max_steps = {}: nothing to do", state_.step,
                    total_steps_);
}

void TrainingRun::initialize() {
    const std::string& from = x_.config.model.init_from;
    if (from.empty()) return trainer_.initialize();
    verify_checkpoint(from);
    load_weights(from, x_.device.k, trainer_.config(), trainer_.parameters());
    trainer_.parameters_changed();
    x_.log.info("weights from {}", from);
}

void TrainingRun::resume_from(const fs::path& checkpoint) {
    const RunState saved = read_state(checkpoint);
    const Config before = parse_config(saved.config, (checkpoint / "state.json").string() + ": config", {});
    for (const std::string& key : differing_keys(before, x_.config))
        if (!may_change_on_resume(key))
            fail(Exit::usage,
                 "{} is {}, and {} was trained with {}; restore it, or start another run with model.init_from", key,
                 value_of(x_.config, key), checkpoint.string(), value_of(before, key));
    if (before.train.micro_batch_size != x_.config.train.micro_batch_size)
        x_.log.warn("train.micro_batch_size changed from {} to {}: the run goes on, but not bit for bit",
                    before.train.micro_batch_size, x_.config.train.micro_batch_size);
    if (before.parallel.method != x_.config.parallel.method)
        x_.log.warn("parallel.method changed from {} to {}: the run goes on, but not bit for bit",
                    word_of(before.parallel.method), word_of(x_.config.parallel.method));
    if (before.device.dtype != x_.config.device.dtype)
        x_.log.warn("device.dtype changed from {} to {}: the run goes on, but not bit for bit",
                    word_of(before.device.dtype), word_of(x_.config.device.dtype));
    const auto apart = [](const Config& c) { return c.train.recompute == Recompute::gelu; };  // GELU from its product
    if (apart(before) != apart(x_.config) && x_.config.device.dtype == Precision::bf16)
        x_.log.warn("train.recompute changed from {} to {}: the run goes on, but not bit for bit",
                    word_of(before.train.recompute), word_of(x_.config.train.recompute));
    if (const std::string& now = x_.device.attention;
        saved.attention != now && !saved.attention.empty() && !now.empty())
        x_.log.warn(
            "the attention kernels changed from {} to {} (device.attention: {}): the run goes on, but not bit for bit",
            saved.attention, now, word_of(x_.config.device.attention));
    require_same_data("data.train", saved.train, state_.train);
    require_same_data("data.val", saved.val, state_.val);
    load_weights(checkpoint, x_.device.k, trainer_.config(), trainer_.parameters());
    trainer_.parameters_changed();
    if (const std::string why = trainer_.accept(optimizer_tensors(checkpoint)); !why.empty())
        x_.log.warn("{}: the run goes on, but not bit for bit", why);
    load_optimizer(checkpoint, x_.device.k, trainer_.moments());
    trainer_.set_updates(saved.updates);
    state_.step = saved.step;
    state_.tokens = saved.tokens;
    state_.sequences = saved.sequences;
    state_.choices = saved.choices;
    x_.log.info("resuming from {}", checkpoint.string());
}

void TrainingRun::announce() {
    const ModelConfig& c = trainer_.config();
    const std::string& attention = x_.device.attention;
    x_.log.info("kiln {}: {} x {} in {}{}{} on {}, {} thread(s) each, {} reduction", x_.commit, x_.comm.size(),
                x_.device.name, word_of(x_.config.device.dtype), attention.empty() ? "" : " with attention ", attention,
                x_.comm.name(), x_.threads, trainer_.sync().name());
    if (!x_.device.note.empty()) x_.log.info("{}", x_.device.note);
    x_.log.info("{} parameters, {} layers, {} heads, width {}, context {}, vocabulary {}", count_params(c), c.L, c.NH,
                c.C, c.T, c.V);
    x_.log.info("{} training sequences; {} steps of {} tokens", train_.n_sequences(), total_steps_, tokens_per_step());
    const TrainerMemory& memory = trainer_.memory();
    x_.log.info("memory of one rank: {} ({}; train.log has the tensors)", human_bytes(memory.n_bytes()),
                memory.summary());
    x_.log.detail("memory of one rank\n" + memory.table());
    const RunDevice& d = x_.device;
    if (d.memory.n_total)
        x_.log.info(
            "and of the GPU's {}: {} workspace, {} NCCL, {} CUDA's other libraries, {} context and other processes",
            human_bytes(d.memory.n_total), human_bytes(d.workspace_bytes), human_bytes(libraries_.nccl),
            human_bytes(libraries_.all - libraries_.nccl), human_bytes(d.memory.n_total - d.memory.n_free));
    announce_peak();
    dir_->record(run_record(x_, trainer_, state_, peak_, libraries_, total_steps_));
    write_status(x_.run_dir, "running", state_.step, 0, "");
}

void TrainingRun::announce_peak() {
    const auto text = [](std::optional<double> flops) {
        return flops ? fmt::format("{:.4g} TFLOP/s", *flops / 1e12) : "unknown";
    };
    x_.log.info("peak in {} of {} {}(s), for MFU: measured {}, by the vendor {}", word_of(x_.config.device.dtype),
                peak_.devices, x_.device.bus_id.empty() ? "rank" : "GPU", text(peak_.measured_flops),
                text(peak_.vendor_flops));
}

uint64_t TrainingRun::tokens_per_step() const {
    return uint64_t(x_.config.train.global_batch_size) * uint64_t(x_.config.model.context_length);
}

void TrainingRun::step(const Trainer::NextMicroBatch& next) {
    const Config& c = x_.config;
    const Stopwatch clock;
    const double lr = learning_rate_at(schedule_, state_.step);
    const Traffic before = x_.comm.traffic();
    const StepResult r = trainer_.step(state_.step, lr, next, state_.step + 1 < total_steps_);
    state_.step++;
    state_.tokens += tokens_per_step();
    state_.sequences += uint64_t(c.train.global_batch_size);
    state_.updates = trainer_.updates();
    x_.progress.step = state_.step;
    const double ms = clock.ms();
    const bool last = state_.step == total_steps_;
    if (x_.comm.rank() == 0 && (last || state_.step % c.log.interval == 0))
        record_step(r, lr,
                    {.ms = ms, .tokens_per_s = double(tokens_per_step()) / ms * 1e3, .traffic = traffic_since(before)},
                    last);
    if (state_.step == first_step_ + kMemorySteps || (last && state_.step < first_step_ + kMemorySteps)) check_memory();
    bad_steps_ = r.updated ? 0 : bad_steps_ + 1;
    if (!r.updated) bad_step(r);
}

// Of this rank.
Traffic TrainingRun::traffic_since(Traffic before) const {
    const Traffic now = x_.comm.traffic();
    return {now.sent - before.sent, now.received - before.received};
}

void TrainingRun::record_step(const StepResult& r, double learning_rate, StepSpeed speed, bool last) {
    const double rate = speed.tokens_per_s;
    const ModelConfig& c = trainer_.config();
    const std::optional<double> mfu = speed.mfu = share_of(peak_, c.architecture->flops_per_token(c) * rate);
    if (!mfu && peak_.flops() && !std::exchange(peak_is_doubted_, true))
        x_.log.warn("step {} is faster than the {} peak allows: {}; the MFU of such steps is left out", state_.step,
                    peak_.used(),
                    peak_.vendor_flops ? "the vendor's figure is not this device's"
                                       : "other programs had the processors when it was measured");
    const std::optional<GpuSample> gpu = gpu_ ? gpu_->latest() : std::nullopt;
    dir_->record(step_record(state_, r, learning_rate, speed, gpu));
    const double seconds_left =
        (run_clock_.ms() / 1e3) / double(state_.step - first_step_) * double(total_steps_ - state_.step);
    x_.log.progress(fmt::format("step {}/{}  loss {:.4f}  lr {:.2e}  norm {:.3f}  {:.0f} tok/s{}  {:.0f}%  ETA {}",
                                state_.step, total_steps_, r.loss, learning_rate, r.grad_norm, rate,
                                mfu ? fmt::format("  {:.1f}% MFU", 100 * *mfu) : "",
                                100.0 * double(state_.step) / double(total_steps_), human_duration(seconds_left)),
                    last);
}

// Compares the memory taken since CUDA's context was created with announce()'s figures; only where each rank has a GPU.
void TrainingRun::check_memory() {
    const RunDevice& d = x_.device;
    const std::string& graph = trainer_.graph_note();
    if (x_.comm.rank() == 0 && !graph.empty()) {
        dir_->record({{"type", "event"}, {"step", state_.step}, {"event", "graph"}, {"message", graph}});
        x_.log.info("{}", graph);
    }
    if (x_.comm.rank() != 0 || d.memory.n_total == 0 || !d.has_own_gpu) return;
    const size_t taken = memory_taken(d), named = trainer_.memory().n_bytes() + d.workspace_bytes + libraries_.all;
    dir_->record({{"type", "event"}, {"step", state_.step}, {"event", "memory"}, {"taken", taken}, {"named", named}});
    x_.log.info("GPU memory: {} taken, {} of it named above", human_bytes(taken), human_bytes(named));
    if (double(taken) > 1.02 * double(named) || double(named) > 1.02 * double(taken))
        x_.log.warn("that differs by more than 2 %: libraries have grown, or other processes use this GPU");
}

void TrainingRun::bad_step(const StepResult& r) {
    const std::string what =
        fmt::format("step {}: loss {} or gradient norm {} is not finite", state_.step, r.loss, r.grad_norm);
    if (x_.comm.rank() == 0)
        dir_->record({{"type", "event"}, {"step", state_.step}, {"event", "bad_step"}, {"message", what}});
    switch (x_.config.run.on_bad_step) {
        case OnBadStep::stop:
            fail(Exit::numeric, "{}; run.on_bad_step: stop", what);
        case OnBadStep::skip:
            break;
    }
    if (bad_steps_ >= kMaxBadSteps)
        fail(Exit::numeric, "{}, the {}th in a row; lower optimizer.learning_rate or resume from an older checkpoint",
             what, bad_steps_);
    if (x_.comm.rank() == 0) x_.log.warn("{}; the update is skipped", what);
}

bool TrainingRun::out_of_time() {
    if (x_.config.run.max_minutes <= 0) return false;
    uint8_t stop = run_clock_.ms() > x_.config.run.max_minutes * 60e3;
    x_.device.world.host().broadcast(&stop, 1, 0);  // rank 0's clock decides for all that step together
    return stop;
}

void TrainingRun::evaluate_and_sample() {
    trainer_.enter_evaluation();
    const EvalResult r = evaluate_on(x_, trainer_.session(), *val_);
    if (x_.comm.rank() == 0) record_evaluation(r);
    if (x_.comm.rank() == 0 || trainer_.session().needs_all_ranks()) sample();
    trainer_.leave_evaluation();
    patient_barrier(x_.device.world.host());  // rank 0 has sampled
}

void TrainingRun::record_evaluation(const EvalResult& r) {
    dir_->record(eval_record(state_.step, r));
    x_.log.info("step {}: val loss {:.4f}, accuracy {:.1f}% over {} tokens", state_.step, r.loss, 100 * r.accuracy,
                r.tokens);
}

void TrainingRun::sample() {
    for (const std::string& prompt : x_.config.eval.sample_prompts) {
        SampleOptions options{.max_tokens = 128, .seed = x_.config.run.seed, .stop_token = tokenizer_->end_of_text()};
        const auto tokens = generate(trainer_.session(), prompt_tokens(*tokenizer_, prompt), options, [](int32_t) {});
        if (x_.comm.rank() > 0) continue;
        const std::string text = as_utf8(tokenizer_->decode(tokens));
        dir_->record({{"type", "sample"}, {"step", state_.step}, {"prompt", prompt}, {"text", text}});
        x_.log.info("sample: {}{}", prompt, text);
    }
}

void TrainingRun::save() {
    // An update can overflow although its loss and norm are finite.  Such weights must not replace good checkpoints.
    if (!trainer_.finite())
        fail(Exit::numeric,
             "step {}: parameters or optimizer state are not finite; no checkpoint was saved, earlier ones "
             "stand; lower optimizer.learning_rate and --resume",
             state_.step);
    trainer_.collect_state();
    if (x_.comm.rank() == 0) {
        if (trainer_.sync().is_scattered()) {  // collected in host memory
            parameters_.emplace(x_.device.k, trainer_.parameters(), Snapshot::Kind::view);
            moments_.emplace(x_.device.k, trainer_.moments(), Snapshot::Kind::view);
        }
        parameters_->take(trainer_.stream());
        moments_->take(trainer_.stream());
        save_checkpoint(dir_->checkpoints(), {trainer_.config(), *parameters_, *moments_, state_},
                        x_.config.checkpoint.keep, [&] { dir_->sync_metrics(); });
    }
    patient_barrier(x_.device.world.host());  // rank 0 has written
}
