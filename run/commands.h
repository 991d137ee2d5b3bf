// The commands of ./train, from the parsed command line to the exit code.
#pragma once
#include <string>
#include <vector>

#include "bench/op_bench.h"
#include "run/context.h"
#include "model/generate.h"

enum class Command : uint8_t { train, generate, eval, bench };

struct CommandLine {
    Command command = Command::train;
    std::string config, checkpoint, prompt;
    std::vector<std::string> only;  // of bench
    std::vector<std::string> set;
    bool resume = false, overwrite = false;
    SampleOptions sample;
    bench::Settings bench;
};

// Reads the config, chooses the device and runs the command.  `commit`: the source of this binary.
Exit run_command(const CommandLine& line, Comm& comm, Log& log, Progress& progress, const std::string& commit);
