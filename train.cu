// kiln's main(): command line -> config -> context -> command.  No device code here: always compiled by the host
// compiler.
//
//   ./train --config F              train (under mpirun -np N: on N ranks)
//   ./train generate --config F     sample text from a trained model
//   ./train eval --config F         loss on the val shards
#include <CLI/CLI.hpp>
#include <omp.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <new>
#include <thread>

#include "common/hash.h"
#include "model/generate.h"
#include "training_run.h"

namespace {
struct CommandLine {
    std::string config, checkpoint, prompt;
    std::vector<std::string> set;
    bool resume = false, overwrite = false;
    SampleOptions sample;
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
    for (const char* later : {"export", "import", "verify", "replay", "plan", "doctor", "bench"})
        app.add_subcommand(later, "")->group("")->callback(
            [later] { fail(Exit::usage, "./train {}: not available in this build", later); });
}

const Backend& choose_backend(const Config&) { return cpu_backend(); }  // config.cpp refuses every other kind

// This rank's share of the host's cores, unless the config says how many.
int set_threads(const Config& c, const Comm& comm) {
    const int threads =
        c.device.threads > 0 ? c.device.threads : core_share(omp_get_num_procs(), comm.local_rank(), comm.local_size());
    omp_set_num_threads(threads);
    return threads;
}

// Ranks read the config file each for itself; a rank with another one would train another model.
void require_same_config(Comm& comm, const Config& config) {
    const uint64_t mine = hash64(to_yaml(config));
    std::vector<uint64_t> all(size_t(comm.size()));
    comm.all_gather(&mine, all.data(), sizeof mine);
    std::string others;
    for (int r = 0; r < comm.size(); r++)
        if (all[size_t(r)] != all[0]) others += (others.empty() ? "" : ", ") + std::to_string(r);
    if (!others.empty())
        fail(Exit::usage, "rank(s) {} read another config than rank 0; give every host the same file and --set options",
             others);
}

fs::path checkpoint_to_use(const Context& x, const CommandLine& line) {
    if (!line.checkpoint.empty()) return line.checkpoint;
    const fs::path root = x.run_dir / "checkpoints";
    const auto found = find_checkpoint(root, x.log, false);
    if (!found) fail(Exit::checkpoint, "{}: no checkpoint; train first, or give --checkpoint", root.string());
    return *found;
}

TrainerOptions inference_options(const Context& x, int micro_batch_size) {
    TrainerOptions o = trainer_options(x);
    o.inference = true;
    o.micro_batch_size = micro_batch_size;
    o.global_batch_size = micro_batch_size * x.comm.size();
    o.reduction = Reduction::mpi;
    return o;
}

Exit run_generate(const Context& x, const CommandLine& line) {
    if (x.comm.size() > 1)
        fail(Exit::usage, "generate runs on one rank; start it without mpirun -np {}", x.comm.size());
    const Tokenizer tokenizer = Tokenizer::load(x.config.data.tokenizer);
    Trainer model(x.k, x.comm, inference_options(x, 1));
    load_weights(checkpoint_to_use(x, line), x.k, model);
    std::vector<int32_t> prompt = tokenizer.encode(line.prompt);
    SampleOptions options = line.sample;
    options.stop_token = tokenizer.end_of_text();
    if (prompt.empty() && tokenizer.end_of_text() < 0)
        fail(Exit::usage, "--prompt is empty and the tokenizer has no end-of-text to start from");
    if (prompt.empty()) prompt.push_back(tokenizer.end_of_text());
    std::fputs(line.prompt.c_str(), stdout);
    generate(model, prompt, options, [&](int32_t token) {
        std::fputs(tokenizer.decode({token}).c_str(), stdout);
        std::fflush(stdout);
    });
    std::fputc('\n', stdout);
    return Exit::complete;
}

Exit run_eval(const Context& x, const CommandLine& line) {
    if (x.config.data.val.empty()) fail(Exit::usage, "eval needs data.val");
    const TokenStream val = open_data(x, "data.val", x.config.data.val);
    Trainer model(x.k, x.comm, inference_options(x, x.config.train.micro_batch_size));
    if (x.comm.rank() == 0) load_weights(checkpoint_to_use(x, line), x.k, model);
    model.broadcast_state();
    const EvalResult r = evaluate_on(x, model, val);
    x.log.info("val loss {:.6f}  perplexity {:.4f}  accuracy {:.4f}  tokens {}", r.loss, std::exp(r.loss), r.accuracy,
               r.tokens);
    return Exit::complete;
}

Exit run_command(const CLI::App& app, const CommandLine& line, Comm& comm, Log& log, Place& place) {
    const Config config = load_config(line.config, line.set);
    require_same_config(comm, config);
    const fs::path dir = fs::path(config.run.out_dir) / config.run.name;
    const Context x{choose_backend(config), comm, log, config, dir, set_threads(config, comm), KILN_COMMIT, place};
    if (app.got_subcommand("generate")) return run_generate(x, line);
    if (app.got_subcommand("eval")) return run_eval(x, line);
    return TrainingRun(x, line.resume      ? OpenMode::resume
                          : line.overwrite ? OpenMode::overwrite
                                           : OpenMode::fresh)
        .run();
}

// Says what went wrong once and ends every rank with the code.
int report(const Comm& comm, const Place& place, Exit code, const char* message) {
    // Ranks mostly fail alike: rank 0 speaks for all, and its abort ends the others while they wait here.
    if (comm.rank() != 0) std::this_thread::sleep_for(std::chrono::milliseconds(400));
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
    Place place;
    const auto failed = [&](Exit code, const char* message) {
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
        Log log(mpi->world().rank());
        CommandLine line;
        CLI::App app("kiln: GPT training in C++.  Train: ./train --config F");
        describe(app, line);
        try {
            app.parse(argc, argv);
        } catch (const CLI::ParseError& e) {
            const bool help = e.get_exit_code() == 0;
            if (mpi->world().rank() == 0) app.exit(e);
            mpi->world().barrier();
            return help ? 0 : int(Exit::usage);
        }
        return int(run_command(app, line, mpi->world(), log, place));
    } catch (const Error& e) { return failed(e.code, e.what()); } catch (const std::bad_alloc&) {
        return failed(Exit::memory, "out of memory; lower train.micro_batch_size or the model's size");
    } catch (const std::exception& e) { return failed(Exit::internal, e.what()); }
}
