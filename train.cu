// kiln's main(): command line -> config -> context -> command.  No device code here: always compiled by the host
// compiler.
//
//   ./train --config F              train (under mpirun -np N: on N ranks)
//   ./train generate --config F     sample text from a trained model
//   ./train eval --config F         loss on the val shards
//   ./train bench --config F        time of each op of this model's step; needs no data
#include <CLI/CLI.hpp>
#include <omp.h>
#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <new>
#include <thread>

#include "common/hash.h"
#include "model/generate.h"
#include "model/op_bench.h"
#include "training_run.h"

namespace {
struct CommandLine {
    std::string config, checkpoint, prompt, only;
    std::vector<std::string> set;
    bool resume = false, overwrite = false;
    SampleOptions sample;
    bench::Settings bench;
};

// Adds what every command takes.
void add_config_options(CLI::App& app, CommandLine& line) {
    app.add_option("--config", line.config, "YAML file; README.md lists its keys")->required();
    app.add_option("--set", line.set, "override a key: --set train.max_steps=100 (repeatable)")
        ->allow_extra_args(false);
}

void describe(CLI::App& app, CommandLine& line) {
    app.require_subcommand(0, 1);
    app.option_defaults()->always_capture_default();
    add_config_options(app, line);
    CLI::Option* resume = app.add_flag("--resume", line.resume, "continue from the newest valid checkpoint of the run");
    app.add_flag("--overwrite", line.overwrite, "start afresh: removes the files of an earlier run")->excludes(resume);
    app.fallthrough();

    CLI::App* generate = app.add_subcommand("generate", "sample text from a trained model");
    CLI::App* eval = app.add_subcommand("eval", "loss and accuracy on the val shards");
    for (CLI::App* sub : {generate, eval})
        sub->add_option("--checkpoint", line.checkpoint,
                        "a checkpoint or a GPT-2 directory; default: the run's newest");
    generate->add_option("--prompt", line.prompt, "text to continue; default: the start of a document");
    generate->add_option("--max-tokens", line.sample.max_tokens)->check(CLI::Range(1, 1 << 20));
    generate->add_option("--temperature", line.sample.temperature, "0: always the most likely token")
        ->check(CLI::Range(0.0, 100.0));
    generate->add_option("--top-k", line.sample.top_k, "0: all")->check(CLI::Range(0, 1 << 30));
    generate->add_option("--top-p", line.sample.top_p)->check(CLI::Range(1e-6, 1.0));
    generate->add_option("--seed", line.sample.seed);
    CLI::App* ops = app.add_subcommand("bench", "time each op of this model's step, beside the device's own limits");
    ops->add_option("--only", line.only, "ops whose name contains this");
    ops->add_option("--samples", line.bench.samples, "of each op; the median counts")->check(CLI::Range(1, 1 << 20));
    ops->add_option("--flush-mib", line.bench.flush_mib, "overwritten before each; more than the caches hold")
        ->check(CLI::Range(0, 1 << 20));
    ops->add_option("--json", line.bench.json, "also write this file, one JSON object per line");
    for (const char* later : {"export", "import", "verify", "replay", "plan", "doctor"})
        app.add_subcommand(later, "")->group("")->callback(
            [later] { fail(Exit::usage, "./train {}: not available in this build", later); });
}

// This rank's share of the cores it may use, unless the config says how many.  Ranks of one host with the same affinity
// mask share it; a launcher that binds each rank has shared the cores out already.
int set_threads(const Config& c, Comm& comm) {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    sched_getaffinity(0, sizeof mask, &mask);
    char host[256] = "";
    gethostname(host, sizeof host - 1);
    const std::string text = std::string(host) + '\0' + std::string(reinterpret_cast<const char*>(&mask), sizeof mask);
    const uint64_t mine = hash64(text);
    std::vector<uint64_t> all(size_t(comm.size()));
    comm.all_gather(&mine, all.data(), sizeof mine);
    const auto sharing = int(std::count(all.begin(), all.end(), mine));
    const auto place = int(std::count(all.begin(), all.begin() + comm.rank(), mine));
    const int threads = c.device.threads > 0 ? c.device.threads : core_share(omp_get_num_procs(), place, sharing);
    omp_set_num_threads(threads);
    return threads;
}

fs::path checkpoint_to_use(const Context& x, const CommandLine& line) {
    if (!line.checkpoint.empty()) {
        verify_checkpoint(line.checkpoint);
        return line.checkpoint;
    }
    const fs::path root = x.run_dir / "checkpoints";
    const auto found = find_checkpoint(root, x.log, false);
    if (!found) fail(Exit::checkpoint, "{}: no checkpoint; train first, or give --checkpoint", root.string());
    return *found;
}

TrainerOptions inference_options(const Context& x, int micro_batch_size) {
    TrainerOptions o = model_options(x);
    o.inference = true;
    o.micro_batch_size = micro_batch_size;
    const int64_t global = int64_t(micro_batch_size) * x.comm.size();
    if (global > INT32_MAX)
        fail(Exit::usage, "train.micro_batch_size = {} on {} ranks", micro_batch_size, x.comm.size());
    o.global_batch_size = int(global);
    return o;
}

Exit run_generate(const Context& x, const CommandLine& line) {
    if (x.comm.size() > 1)
        fail(Exit::usage, "generate runs on one rank; start it without mpirun -np {}", x.comm.size());
    const Tokenizer tokenizer = open_tokenizer(x.config);
    Trainer model(x.device.k, x.comm, inference_options(x, 1));
    load_weights(checkpoint_to_use(x, line), x.device.k, model);
    if (!x.device.note.empty()) std::fprintf(stderr, "%s\n", x.device.note.c_str());  // stdout is the text
    SampleOptions options = line.sample;
    options.stop_token = tokenizer.end_of_text();
    std::fputs(line.prompt.c_str(), stdout);
    generate(model, prompt_tokens(tokenizer, line.prompt), options, [&](int32_t token) {
        const std::string text = tokenizer.decode({token});
        std::fwrite(text.data(), 1, text.size(), stdout);
        if (std::fflush(stdout) != 0) fail(Exit::io, "standard output: cannot write the text");
    });
    std::fputc('\n', stdout);
    return Exit::complete;
}

Exit run_eval(const Context& x, const CommandLine& line) {
    if (x.config.data.val.empty()) fail(Exit::usage, "eval needs data.val");
    const TokenStream val = open_data(x, "data.val", x.config.data.val);
    require_same(x.comm, val.fingerprint(), Exit::data, kOtherData);
    Trainer model(x.device.k, x.comm, inference_options(x, x.config.train.micro_batch_size));
    if (x.comm.rank() == 0) load_weights(checkpoint_to_use(x, line), x.device.k, model);
    model.broadcast_state();
    if (!x.device.note.empty()) x.log.info("{}", x.device.note);
    const EvalResult r = evaluate_on(x, model, val);
    x.log.info("val loss {:.6f}  perplexity {:.4f}  accuracy {:.4f}  tokens {}", r.loss, std::exp(r.loss), r.accuracy,
               r.tokens);
    return Exit::complete;
}

Exit run_bench(const Context& x, const CommandLine& line) {
    if (x.comm.size() > 1) fail(Exit::usage, "bench runs on one rank; start it without mpirun -np {}", x.comm.size());
    const TrainerOptions o = training_options(x);
    check_model(o.model, o.real);
    if (o.recompute != Recompute::none)
        fail(Exit::usage, "bench times the ops of a step that keeps everything; use --set train.recompute=none");
    const BatchShare share =
        batch_share(o.global_batch_size, o.micro_batch_size, 0, 1, o.reduction == Reduction::ordered);
    if (!x.device.note.empty()) x.log.info("{}", x.device.note);
    run_op_bench(x.device.k, {.step = {.model = o.model,
                                       .B = o.micro_batch_size,
                                       .n_micro = share.n_micro,
                                       .n_accumulating = share.n_micro - share.n_runs,
                                       .n_folds = share.n_runs - 1,
                                       .optimizer = o.optimizer.kind},
                              .device = x.device.name,
                              .attention = x.device.attention,
                              .commit = x.commit,
                              .real = o.real,
                              .only = line.only,
                              .settings = line.bench});
    return Exit::complete;
}

Exit run_command(const CLI::App& app, const CommandLine& line, Comm& comm, Log& log, Place& place) {
    const bool benching = app.got_subcommand("bench");
    const bool training = !app.got_subcommand("generate") && !app.got_subcommand("eval");  // bench times what it takes
    if ((!training || benching) && (line.resume || line.overwrite))
        fail(Exit::usage, "--resume and --overwrite are for training");
    const Config config = load_config(line.config, line.set);
    // Ranks read the file each for itself; a rank with another one would train another model.
    require_same(comm, hash64(to_yaml(config)), Exit::usage,
                 "another config than rank 0; give every host the same file and --set options");
    const fs::path dir = fs::path(config.run.out_dir) / config.run.name;
    const int threads = set_threads(config, comm);
    const Context x{choose_device(config, comm, log, training), comm, log, config, dir, threads, KILN_COMMIT, place};
    if (app.got_subcommand("generate")) return run_generate(x, line);
    if (app.got_subcommand("eval")) return run_eval(x, line);
    if (benching) return run_bench(x, line);
    return TrainingRun(x, line.resume      ? OpenMode::resume
                          : line.overwrite ? OpenMode::overwrite
                                           : OpenMode::fresh)
        .run();
}

// Says what went wrong once and ends every rank with the code.
int report(const Comm& comm, const Place& place, Exit code, const char* message) {
    // Ranks mostly fail alike: rank 0 speaks for all, and its abort ends the others while they wait here.
    if (comm.rank() != 0) std::this_thread::sleep_for(std::chrono::milliseconds(400));
    // Whoever lost a peer lets that one tell what happened to it.
    if (code == Exit::peer_lost && comm.size() > 1) std::this_thread::sleep_for(std::chrono::seconds(1));
    const std::string from = comm.size() > 1 ? fmt::format("[rank {}] ", comm.rank()) : "";
    std::fprintf(stderr, "\n%serror: %s\n", from.c_str(), message);
    std::fflush(stderr);
    try {
        if (!place.run_dir.empty()) write_status(place.run_dir, "failed", place.step, int(code), message);
    } catch (const std::exception&) {  // the message and the exit code already tell
    }
    return int(code);
}
}  // namespace

int main(int argc, char** argv) {
    std::signal(SIGPIPE, SIG_IGN);  // a closed terminal does not end a run
    std::optional<MpiSession> mpi;
    std::optional<Log> log;
    Place place;
    const auto failed = [&](Exit code, const char* message) {
        if (log) log->failure(message);
        const int status = mpi ? report(mpi->world(), place, code, message)
                               : (std::fprintf(stderr, "error: %s\n", message), int(code));
        if (mpi && mpi->world().size() > 1) {
            // mpirun loses what it has not read before an abort.
            std::this_thread::sleep_for(std::chrono::milliseconds(200));
            mpi->world().abort(code);
        }
        return status;
    };
    try {
        mpi.emplace(&argc, &argv);
        log.emplace(mpi->world().rank());
        CommandLine line;
        CLI::App app("kiln: GPT training in C++.  Train: ./train --config F");
        describe(app, line);
        try {
            app.parse(argc, argv);
        } catch (const CLI::ParseError& e) {
            if (e.get_exit_code() != 0) fail(Exit::usage, "{}; ./train --help lists the options", e.what());
            if (mpi->world().rank() == 0) app.exit(e);
            return 0;
        }
        return int(run_command(app, line, mpi->world(), *log, place));
    } catch (const Error& e) { return failed(e.code, e.what()); } catch (const std::bad_alloc&) {
        return failed(Exit::memory, "out of memory; lower train.micro_batch_size or the model's size");
    } catch (const std::exception& e) { return failed(Exit::internal, e.what()); }
}
