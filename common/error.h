// Errors: where, got, expected, what to do.  One exception type; it carries the exit code of the whole job.
#pragma once
#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

// The codes that every command ends with; main() is the only place that exits.
enum class Exit : int {
    complete = 0,
    usage = 2,       // command line or config
    data = 3,        // token shards, tokenizer
    checkpoint = 4,  // checkpoint or weights
    io = 5,          // the system refused a read or write
    numeric = 6,     // NaN or infinity in loss or gradient
    memory = 7,      // out of memory
    internal = 70,   // a broken invariant of kiln itself
    peer_lost = 75,  // another rank is gone; a restart continues
    stopped = 85,    // stopped on request after a clean save; a restart continues
};

struct Error : std::runtime_error {
    Exit code;
    Error(Exit c, const std::string& message) : std::runtime_error(message), code(c) {}
};

// A user's mistake or the system's refusal.  The message names the file and line (or key) itself.
template <class... A>
[[noreturn]] void fail(Exit code, fmt::format_string<A...> message, A&&... args) {
    throw Error(code, fmt::format(message, std::forward<A>(args)...));
}

// A broken invariant: exit 70, with the place in the source.
[[noreturn]] void fail_check(const char* condition, const std::string& message, const char* file, int line);

#define CHECK_THAT(condition, ...)                                                \
    do {                                                                          \
        if (!(condition)) [[unlikely]]                                            \
            fail_check(#condition, fmt::format(__VA_ARGS__), __FILE__, __LINE__); \
    } while (0)

// The text of an errno value: "No space left on device".
std::string errno_text(int error_number);
