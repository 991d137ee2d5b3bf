// `./train bench`: time, rate and share of the device's own limit of each op of a training step (bench/op_table.h).
#pragma once
#include <string>

#include "bench/op_table.h"

struct OpBench {
    TrainerOptions step;
    std::string device, attention;  // names, for the table
    std::string commit;             // of the source that this binary was built from
    std::string only;               // ops whose name contains this
    bench::Settings settings;
};
// Prints the table and writes settings.json, an object per line: `run`, `peak`, an `op` each and, where all ops were
// measured, `step`.  An op that fails, or does not fit into memory, is named and the others still count; failures are
// Error(Exit::internal) at the end.
// `comm` is that of a single rank.
void run_op_bench(const Backend& k, Comm& comm, const OpBench& o);
