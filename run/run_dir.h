// The directory of a run, <out_dir>/<name>/: config.yaml, metrics.jsonl, train.log, status.json, checkpoints/, lock.
#pragma once
#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>

#include "common/file.h"
#include "common/log.h"

enum class OpenMode { fresh, resume, overwrite };

// Rank 0 owns a RunDirectory; other ranks only need the path.
class RunDirectory {
  public:
    // fresh: the directory must be empty or absent.  overwrite: removes the files that a run writes, nothing else.
    // resume: leaves everything as it is.  Takes the lock: a second run on the same directory is Error(Exit::usage).
    RunDirectory(const fs::path& path, OpenMode mode);
    ~RunDirectory();
    RunDirectory(const RunDirectory&) = delete;
    RunDirectory& operator=(const RunDirectory&) = delete;

    const fs::path& path() const { return path_; }
    fs::path checkpoints() const { return path_ / "checkpoints"; }
    void write_config(const std::string& yaml) { replace_file(path_ / "config.yaml", yaml); }

    // metrics.jsonl.  start_metrics() drops a torn last line and every record of a step after `step`, but keeps `run`
    // and `event` records; record() appends a line.
    void start_metrics(int64_t step);
    void record(const nlohmann::ordered_json& line);
    void sync_metrics();

  private:
    fs::path path_;
    int lock_ = -1;
    std::unique_ptr<OutFile> metrics_;
};

// {"state": "running|complete|stopped|failed", "step", "exit_code", "message"}, replaced atomically.
void write_status(const fs::path& run, const std::string& state, int64_t step, int exit_code,
                  const std::string& message);
