#include "common/log.h"

#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <iterator>

#include "common/clock.h"
#include "common/error.h"
#include "common/file.h"

namespace {
const Stopwatch process_clock;

bool is_terminal(const std::string& fd_link) {
    std::error_code error;
    const std::string target = fs::read_symlink(fd_link, error).string();
    return !error && (target.starts_with("/dev/pts/") || target.starts_with("/dev/tty"));
}

// Parent of a process on this host, 0 if unknown: the fourth field of its stat, after the name in parentheses.
int parent_of(int pid) {
    std::ifstream in(fmt::format("/proc/{}/stat", pid));
    const std::string stat((std::istreambuf_iterator<char>(in)), {});
    const size_t name_end = stat.rfind(')');
    int parent = 0;
    if (name_end != std::string::npos) std::sscanf(stat.c_str() + name_end + 1, " %*c %d", &parent);
    return parent;
}

// True when a person sees stdout.  Under mpirun stdout is a pipe to the launcher: then the launcher's stdout decides.
bool on_terminal() {
    static const bool tty = [] {
        if (isatty(STDOUT_FILENO)) return true;
        if (!std::getenv("PMI_RANK")) return false;
        const int proxy = getppid(), launcher = parent_of(proxy);
        return launcher > 1 && is_terminal(fmt::format("/proc/{}/fd/1", launcher));
    }();
    return tty;
}
}  // namespace

Log::~Log() {
    if (line_open_) std::fputc('\n', stdout);
    if (file_) std::fclose(file_);
}

void Log::open(const std::string& path) {
    const std::lock_guard lock(mutex_);
    file_ = std::fopen(path.c_str(), "ae");
    if (!file_) fail(Exit::io, "{}: cannot open for appending: {}", path, errno_text(errno));
    std::setvbuf(file_, nullptr, _IOLBF, 0);
    std::fputs(before_file_.c_str(), file_);
    before_file_.clear();
}

void Log::to_file(const std::string& line) {
    const std::string stamped = fmt::format("{} {}\n", utc_now(), line);
    if (file_)
        std::fputs(stamped.c_str(), file_);
    else
        before_file_ += stamped;
}

void Log::write(const char* prefix, const std::string& message) {
    if (rank_ != 0) return;
    const std::lock_guard lock(mutex_);
    FILE* out = *prefix != 0 ? stderr : stdout;
    if (line_open_) std::fputc('\n', stdout), line_open_ = false;
    std::fprintf(out, "%s%s\n", prefix, message.c_str());
    std::fflush(out);
    to_file(prefix + message);
}

void Log::detail(const std::string& message) {
    if (rank_ != 0) return;
    const std::lock_guard lock(mutex_);
    to_file(message);
}

void Log::failure(const std::string& message) { detail("error: " + message); }

void Log::progress(const std::string& line, bool always) {
    if (rank_ != 0) return;
    const std::lock_guard lock(mutex_);
    const double now_ms = process_clock.ms();
    const bool due = always || now_ms - last_progress_ms_ > 10e3;
    const bool live = on_terminal() && (due || now_ms - last_live_ms_ > 100);
    if (due) to_file(line);
    if (live) {
        std::fprintf(stdout, "\r\033[K%s", line.c_str());
        line_open_ = true;
        last_live_ms_ = now_ms;
    } else if (due && !on_terminal()) {
        std::fprintf(stdout, "%s\n", line.c_str());
    }
    std::fflush(stdout);
    if (due) last_progress_ms_ = now_ms;
}
