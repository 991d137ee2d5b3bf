// The objects that every command works with.
#pragma once
#include <cstdint>
#include <string>

#include "comm/comm.h"
#include "common/config.h"
#include "common/file.h"
#include "common/log.h"
#include "run/device.h"

// How far a run has come; reported in status.json when the run fails.
struct Progress {
    fs::path run_dir;  // empty until the directory is open
    int64_t step = 0;
};

struct Context {
    RunDevice device;
    Comm& comm;  // the ranks of this rank's role
    Log& log;
    Config config;
    fs::path run_dir;
    int threads;         // of this rank
    std::string commit;  // of the source this binary was built from
    Progress& progress;
    Comm* link = nullptr;  // workers, then servers; null where nobody serves
};
