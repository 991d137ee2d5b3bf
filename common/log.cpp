#include "common/log.h"

#include <unistd.h>

#include <cerrno>

#include "common/clock.h"
#include "common/error.h"

namespace {
const Stopwatch process_clock;
bool on_terminal() {
    static const bool tty = isatty(STDOUT_FILENO);
    return tty;
}
}  // namespace

Log::~Log() {
    if (line_open_) std::fputc('\n', stdout);
    if (file_) std::fclose(file_);
}

void Log::open(const std::string& path) {
    file_ = std::fopen(path.c_str(), "ae");
    if (!file_) fail(Exit::io, "{}: cannot open for appending: {}", path, errno_text(errno));
    std::setvbuf(file_, nullptr, _IOLBF, 0);
}

void Log::write(const char* prefix, const std::string& message) {
    const std::lock_guard lock(mutex_);
    const bool warning = *prefix != 0;
    if (rank_ == 0 || warning) {
        FILE* out = warning ? stderr : stdout;
        if (line_open_) std::fputc('\n', stdout), line_open_ = false;
        const std::string from = rank_ == 0 ? "" : fmt::format("[rank {}] ", rank_);
        std::fprintf(out, "%s%s%s\n", from.c_str(), prefix, message.c_str());
        std::fflush(out);
    }
    if (file_) std::fprintf(file_, "%s %s%s\n", utc_now().c_str(), prefix, message.c_str());
}

void Log::detail(const std::string& text) {
    const std::lock_guard lock(mutex_);
    if (file_) std::fprintf(file_, "%s\n", text.c_str());
}

void Log::progress(const std::string& line, bool always) {
    const std::lock_guard lock(mutex_);
    if (rank_ != 0) return;
    const double now_ms = process_clock.ms();
    const bool due = always || now_ms - last_progress_ms_ > 10e3;
    if (file_ && due) std::fprintf(file_, "%s %s\n", utc_now().c_str(), line.c_str());
    if (on_terminal()) {
        std::fprintf(stdout, "\r\033[K%s", line.c_str());
        line_open_ = true;
    } else if (due) {
        std::fprintf(stdout, "%s\n", line.c_str());
    }
    std::fflush(stdout);
    if (due) last_progress_ms_ = now_ms;
}
