#include "run/run_dir.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <memory>

namespace {
constexpr const char* kOwnFiles[] = {"config.yaml", "config.yaml.tmp", "metrics.jsonl", "metrics.jsonl.tmp",
                                     "status.json", "status.json.tmp", "train.log"};
constexpr size_t kMaxMetrics = size_t(16) << 30;

// The records of steps up to `step`, and all `run` and `event` records.
std::string kept_metrics(const std::string& text, int64_t step) {
    std::string kept;
    for (size_t at = 0; at < text.size();) {
        const size_t end = text.find('\n', at);
        if (end == std::string::npos) break;  // torn: the process died while it wrote this line
        const std::string line = text.substr(at, end - at);
        at = end + 1;
        const nlohmann::json j = nlohmann::json::parse(line, nullptr, false);
        if (!j.is_object() || !j.contains("type") || !j.contains("step") || !j["step"].is_number_integer()) continue;
        if (j["type"] == "run" || j["type"] == "event" || j["step"].get<int64_t>() <= step) kept += line + '\n';
    }
    return kept;
}

// The text of a record.  Bytes that are not UTF-8 (a model of bytes may generate any) become U+FFFD.
std::string one_line(const nlohmann::ordered_json& j) {
    return j.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + '\n';
}

void remove_path(const fs::path& path) {
    std::error_code error;
    fs::remove_all(path, error);
    if (error) fail(Exit::io, "{}: cannot remove: {}", path.string(), error.message());
}

// Removes the files of an earlier run, and nothing else.
void remove_run(const fs::path& run) {
    for (const char* name : kOwnFiles) remove_path(run / name);
    const fs::path checkpoints = run / "checkpoints";
    std::vector<fs::path> own;
    std::error_code error;
    for (fs::directory_iterator e(checkpoints, error), end; !error && e != end; e.increment(error)) {
        const std::string name = e->path().filename().string();
        if (name.starts_with("step_") || name == "latest" || name.starts_with("latest.tmp-")) own.push_back(e->path());
    }
    for (const fs::path& p : own) remove_path(p);
    fs::remove(checkpoints, error);  // keeps a directory that still holds other files
}

// True when the directory is absent, empty, or holds only the lock of a run that never began.
bool is_unused(const fs::path& path) {
    std::error_code error;
    if (!fs::exists(path, error) && !error) return true;
    bool unused = true;
    for (fs::directory_iterator e(path, error), end; !error && e != end; e.increment(error))
        unused = unused && e->path().filename() == "lock";
    if (error) fail(Exit::io, "{}: cannot list the directory: {}", path.string(), error.message());
    return unused;
}
}  // namespace

RunDirectory::RunDirectory(const fs::path& path, OpenMode mode) : path_(path) {
    if (mode == OpenMode::fresh && !is_unused(path_))
        fail(Exit::usage, "{}: is not empty; use --resume to go on, --overwrite to start afresh, or another run.name",
             path_.string());
    make_directories(path_);
    const fs::path lock = path_ / "lock";
    lock_ = ::open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (lock_ < 0) fail(Exit::io, "{}: cannot create: {}", lock.string(), errno_text(errno));
    if (::flock(lock_, LOCK_EX | LOCK_NB) != 0) {
        std::string owner(256, '\0');
        owner.resize(size_t(std::max<ssize_t>(0, ::pread(lock_, owner.data(), owner.size(), 0))));
        ::close(lock_);
        fail(Exit::usage, "{}: another run is using this directory ({}); wait for it or choose another run.name",
             path_.string(), owner);
    }
    char host[256] = "";
    ::gethostname(host, sizeof host - 1);
    const std::string owner = fmt::format("host {}, process {}", host, ::getpid());
    if (::ftruncate(lock_, 0) != 0 || ::pwrite(lock_, owner.data(), owner.size(), 0) < 0)
        fail(Exit::io, "{}: cannot write: {}", lock.string(), errno_text(errno));
    if (mode == OpenMode::overwrite) remove_run(path_);
}

RunDirectory::~RunDirectory() {
    if (lock_ >= 0) ::close(lock_);  // releases the lock; the file stays, and still names this process
}

void RunDirectory::start_metrics(int64_t step) {
    const fs::path path = path_ / "metrics.jsonl";
    if (fs::exists(path)) {
        const std::string before = read_text(path, kMaxMetrics, Exit::io), kept = kept_metrics(before, step);
        if (kept != before) replace_file(path, kept);
    }
    metrics_ = std::make_unique<OutFile>(path, true);
}

void RunDirectory::record(const nlohmann::ordered_json& line) { metrics_->write(one_line(line)); }
void RunDirectory::sync_metrics() { metrics_->sync(); }

void write_status(const fs::path& run, const std::string& state, int64_t step, int exit_code,
                  const std::string& message) {
    const nlohmann::ordered_json j = {{"state", state}, {"step", step}, {"exit_code", exit_code}, {"message", message}};
    replace_file(run / "status.json", one_line(j));
}
