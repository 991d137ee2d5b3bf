// `./train bench`: time, rate and share of the device's limit for each op of a training step (bench/op_table.h).
#pragma once
#include <string>
#include <vector>

#include "bench/op_table.h"

struct OpBench {
    TrainerOptions step;
    std::string device, attention;  // names, for the table
    std::string commit;             // of the source that this binary was built from
    std::vector<std::string> only;  // ops whose name contains one of these; empty: all
    bench::Settings settings;
};
// Prints the table and writes the file that settings.json names, one object per line: `run`, `peak`, `op` for each op
// and, where all ops were measured, `step`.  Ops that fail or do not fit into memory are named, and the others still
// count; failures end as Error(Exit::internal).
void run_op_bench(const Backend& k, const OpBench& o);
