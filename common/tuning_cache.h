// Choices made by timing (which algorithm computes a kind of matrix product), as text that a checkpoint and a per-user
// cache keep:
//
//   kiln choices 1
//   NVIDIA H200, compute capability 9.0, 132 multiprocessors, cuBLASLt 130100 with 256 MiB
//   65536 x 768 x 3072, bf16 x bf16 -> bf16, BIAS, aligned 16 16 0 16 16 0 = 0a1b...
//   hash 0123456789abcdef
//
// Line 2 is what they were made for, and they are valid for nothing else.  The hash is of all lines before it.
#pragma once
#include <map>
#include <string>

#include "common/file.h"
#include "common/log.h"

struct Choices {
    std::string made_for;
    std::map<std::string, std::string> by_kind;  // kind -> choice; neither has a line break, a kind has no " = "
    bool operator==(const Choices&) const = default;
};
std::string to_text(const Choices& c);
// Error(Exit::data) that begins with `name` when the text is not such a text, or is damaged.
Choices parse_choices(const std::string& text, const std::string& name);

// Choices that fresh runs of a user share: a file for each thing that they were made for.  What goes wrong with a cache
// never ends a run: it is logged, and the cache is as if it were empty.
class ChoiceCache {
  public:
    // In $XDG_CACHE_HOME/kiln or ~/.cache/kiln.  Empty: neither variable is set, and nothing is read or kept.
    static fs::path directory();
    ChoiceCache(const fs::path& directory, const std::string& made_for, Log& log);
    const fs::path& path() const { return path_; }
    Choices read() const;
    // Adds these to what is there now.  Several runs may do so at once: a file is always whole, and the last one's.
    void add(const Choices& c) const;

  private:
    fs::path path_;  // empty: no cache
    std::string made_for_;
    Log& log_;
};
