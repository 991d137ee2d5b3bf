// Messages for people, from rank 0: to the terminal and to the run's train.log.  Other ranks say nothing here; their
// failures are told by main().  A full disk or a closed terminal never stops a run: text that cannot be written is
// dropped.
#pragma once
#include <fmt/format.h>

#include <cstdio>
#include <mutex>
#include <string>
#include <utility>

class Log {
  public:
    explicit Log(int rank = 0) : rank_(rank) {}
    ~Log();
    Log(const Log&) = delete;
    Log& operator=(const Log&) = delete;

    // From now on also append to this file, beginning with what was said before.  Rank 0 only; failure is
    // Error(Exit::io).
    void open(const std::string& path);

    template <class... A>
    void info(fmt::format_string<A...> f, A&&... a) {
        write("", fmt::format(f, std::forward<A>(a)...));
    }
    template <class... A>
    void warn(fmt::format_string<A...> f, A&&... a) {
        write("warning: ", fmt::format(f, std::forward<A>(a)...));
    }
    // For the file alone: text that would fill the terminal.
    void detail(const std::string& message);
    // The error that ends the run, for the file: main() tells the terminal.
    void failure(const std::string& message);
    // A line that replaces itself on a terminal; elsewhere it is printed when `always` or ten seconds after the last.
    void progress(const std::string& line, bool always);

  private:
    void write(const char* prefix, const std::string& message);
    void to_file(const std::string& line);
    int rank_;
    FILE* file_ = nullptr;
    std::string before_file_;  // lines said before open()
    bool line_open_ = false;   // a progress line stands on the terminal without its newline
    double last_progress_ms_ = -1e9, last_live_ms_ = -1e9;
    std::mutex mutex_;  // the loader's thread warns too
};
