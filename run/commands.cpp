#include "run/commands.h"

#include <omp.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <thread>

#include "common/hash.h"
#include "run/inputs.h"
#include "run/options.h"
#include "run/rank_table.h"
#include "run/roles.h"
#include "run/training_run.h"
#include "trainer/broadcast.h"
#include "trainer/parameter_server.h"

namespace {
// Sets this rank's number of threads: the config's, else the rank's share of the cores in its affinity mask.  Ranks of
// one host with equal masks share the cores; a launcher that binds ranks to cores gives each rank a mask of its own.
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

Exit run_generate(const Context& x, const CommandLine& line) {
    if (x.comm.size() > 1)
        fail(Exit::usage, "generate runs on one rank; start it without mpirun -np {}", x.comm.size());
    const Tokenizer tokenizer = open_tokenizer(x.config);
    Session model(x.device.k, model_config(x.config), forward_shape(x.config, 1));
    load_weights(checkpoint_to_use(x, line), x.device.k, model.config(), model.memory().parameters());
    model.parameters_changed();
    if (!x.device.note.empty()) std::fprintf(stderr, "%s\n", x.device.note.c_str());  // stdout holds only text
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
    Session model(x.device.k, model_config(x.config), forward_shape(x.config, x.config.train.micro_batch_size));
    if (x.comm.rank() == 0)
        load_weights(checkpoint_to_use(x, line), x.device.k, model.config(), model.memory().parameters());
    patient_barrier(x.comm);
    broadcast_parameters(x.device.k, x.comm, model.memory(), model.stream());
    if (!x.device.note.empty()) x.log.info("{}", x.device.note);
    const EvalResult r = evaluate_on(x, model, val);
    x.log.info("val loss {:.6f}  perplexity {:.4f}  accuracy {:.4f}  tokens {}", r.loss, std::exp(r.loss), r.accuracy,
               r.tokens);
    return Exit::complete;
}

// Until the workers end the run.
Exit run_server(const Context& x) {
    ParameterServer server(x.device.world, training_options(x));
    const Exit code = server.serve([&](int64_t step) {
        x.progress.run_dir = x.run_dir;  // from here on a failure shows in status.json
        x.progress.step = step;
    });
    if (server.has_lost()) {
        // MPI's end would wait for the lost worker.  All others are at theirs, and what they printed needs a moment.
        std::this_thread::sleep_for(std::chrono::seconds(1));
        x.comm.abort(code);
    }
    return code;
}

Exit run_bench(const Context& x, const CommandLine& line) {
    if (x.comm.size() > 1) fail(Exit::usage, "bench runs on one rank; start it without mpirun -np {}", x.comm.size());
    if (!x.device.note.empty()) x.log.info("{}", x.device.note);
    run_op_bench(x.device.k, {.step = training_options(x),
                              .device = x.device.name,
                              .attention = x.device.attention,
                              .commit = x.commit,
                              .only = line.only,
                              .settings = line.bench});
    return Exit::complete;
}
}  // namespace

Exit run_command(const CommandLine& line, Comm& comm, Log& log, Progress& progress, const std::string& commit) {
    if (line.command != Command::train && (line.resume || line.overwrite))
        fail(Exit::usage, "--resume and --overwrite are for training");
    const Config config = load_config(line.config, line.set);
    comm.set_timeout(config.run.timeout_seconds);
    // Every rank reads the config file itself; a rank with another config would train another model.
    require_same(comm, hash64(to_yaml(config)), Exit::usage,
                 "another config than rank 0; give every host the same file and --set options");
    if (line.command == Command::train) grid_of(config, comm.size());  // refused before anything is opened
    const fs::path dir = fs::path(config.run.out_dir) / config.run.name;
    const int threads = set_threads(config, comm);
    // bench times the ops of a training step.
    const bool training = line.command == Command::train || line.command == Command::bench;
    const Roles roles(comm, config, line.command == Command::train);
    const Context x{choose_device(config, comm, roles.together(), log, training),
                    roles.group(),
                    log,
                    config,
                    dir,
                    threads,
                    commit,
                    progress,
                    roles.link()};
    if (roles.serves()) return run_server(x);
    switch (line.command) {
        case Command::generate:
            return run_generate(x, line);
        case Command::eval:
            return run_eval(x, line);
        case Command::bench:
            return run_bench(x, line);
        case Command::train:
            break;
    }
    const OpenMode mode = line.resume ? OpenMode::resume : line.overwrite ? OpenMode::overwrite : OpenMode::fresh;
    const Exit end = TrainingRun(x, mode).run();
    if (const Traffic t = comm.traffic(); comm.size() > 1)
        log.info("messages of rank 0: {} bytes sent, {} bytes received", t.sent, t.received);
    return end;
}
