// Choices made by timing (which algorithm computes a kind of matrix product), as text that a checkpoint and a per-user
// cache keep:
//
//   kiln choices 1
//   NVIDIA H200, compute capability 9.0, 132 multiprocessors, cuBLASLt 130100 with 256 MiB
//   65536 x 768 x 3072, bf16 x bf16 -> bf16, BIAS, aligned 16 16 0 16 16 0 = 0a1b...
//   hash 0123456789abcdef
//
// Line 2 names the device and library that the choices were made for; the choices are valid for no other.  The hash
// covers all lines before it.
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
// Throws Error(Exit::data) that begins with `name` when the text is not of this format, or is damaged.
Choices parse_choices(const std::string& text, const std::string& name);

// Choices that fresh runs of a user share: one file for each made_for.  A failure of the cache never ends a run: the
// failure is logged, and the cache counts as empty.
class ChoiceCache {
  public:
    // In $XDG_CACHE_HOME/kiln or ~/.cache/kiln.  Empty: neither variable is set, and nothing is read or kept.
    static fs::path directory();
    ChoiceCache(const fs::path& directory, const std::string& made_for, Log& log);
    const fs::path& path() const { return path_; }
    Choices read() const;
    // Adds `c` to the choices in the file.  Several runs may add at once: the file is always whole, and the last
    // writer's.
    void add(const Choices& c) const;

  private:
    fs::path path_;  // empty: no cache
    std::string made_for_;
    Log& log_;
};
