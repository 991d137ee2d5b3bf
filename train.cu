// kiln's main(): command line -> command.  This file holds no device code: the host compiler compiles it.
//
//   ./train --config F              train (under mpirun -np N: on N ranks)
//   ./train generate --config F     sample text from a trained model
//   ./train eval --config F         loss on the val shards
//   ./train bench --config F        time of each op of this model's step; needs no data
//   ./train --keys                  the table of config keys that README.md shows
#include <CLI/CLI.hpp>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <new>
#include <optional>
#include <thread>

#include "run/commands.h"
#include "run/run_dir.h"

namespace {
// Adds the options that every command takes.
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
    // Only CLI11's version flag prints a text of ours and ends the program.
    app.set_version_flag("--keys", config_table, "print the table of the config's keys, as README.md has it, and exit");

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
    ops->add_option("--only", line.only, "ops whose name contains this (repeatable)");
    ops->add_option("--samples", line.bench.samples, "of each op; the median counts")->check(CLI::Range(1, 1 << 20));
    ops->add_option("--flush-mib", line.bench.flush_mib, "overwritten before each; more than the caches hold")
        ->check(CLI::Range(0, 1 << 20));
    ops->add_option("--json", line.bench.json, "also write this file, one JSON object per line");
    generate->callback([&line] { line.command = Command::generate; });
    eval->callback([&line] { line.command = Command::eval; });
    ops->callback([&line] { line.command = Command::bench; });
    for (const char* later : {"export", "import", "verify", "replay", "plan", "doctor"})
        app.add_subcommand(later, "")->group("")->callback(
            [later] { fail(Exit::usage, "./train {}: not available in this build", later); });
}

// Prints the error, once where all ranks fail alike, and returns the exit code.
int report(const Comm& comm, const Progress& progress, Exit code, const char* message) {
    // Ranks mostly fail alike: rank 0 speaks for all, and its abort ends the other ranks while they wait here.
    if (comm.rank() != 0) std::this_thread::sleep_for(std::chrono::milliseconds(400));
    // A rank that lost a peer gives the peer time to report its own error.
    if (code == Exit::peer_lost && comm.size() > 1) std::this_thread::sleep_for(std::chrono::seconds(1));
    const std::string from = comm.size() > 1 ? fmt::format("[rank {}] ", comm.rank()) : "";
    std::fprintf(stderr, "\n%serror: %s\n", from.c_str(), message);
    std::fflush(stderr);
    try {
        if (!progress.run_dir.empty()) write_status(progress.run_dir, "failed", progress.step, int(code), message);
    } catch (const std::exception&) {  // the message and the exit code already report the failure
    }
    return int(code);
}
}  // namespace

int main(int argc, char** argv) {
    std::signal(SIGPIPE, SIG_IGN);  // a closed terminal does not end a run
    std::optional<MpiSession> mpi;
    std::optional<Log> log;
    Progress progress;
    const auto failed = [&](Exit code, const char* message) {
        if (log) log->failure(message);
        const int status = mpi ? report(mpi->world(), progress, code, message)
                               : (std::fprintf(stderr, "error: %s\n", message), int(code));
        if (mpi && mpi->world().size() > 1) {
            // An abort loses output that mpirun has not read yet.
            std::this_thread::sleep_for(std::chrono::milliseconds(200));
            mpi->world().abort(code);
        }
        return mpi ? mpi->end(status) : status;
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
            return mpi->end(0);
        }
        return mpi->end(int(run_command(line, mpi->world(), *log, progress, KILN_COMMIT)));
    } catch (const Error& e) { return failed(e.code, e.what()); } catch (const std::bad_alloc&) {
        return failed(Exit::memory, "out of memory; lower train.micro_batch_size or the model's size");
    } catch (const std::exception& e) { return failed(Exit::internal, e.what()); }
}
