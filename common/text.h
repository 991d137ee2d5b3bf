// Small helpers for messages about text that others wrote.
#pragma once
#include <string>
#include <string_view>
#include <vector>

// At most max_bytes of it on one line: bytes that are not printable ASCII become \xNN, a cut is shown as "...".
std::string excerpt(std::string_view text, size_t max_bytes = 60);
// The candidate nearest to `word` by edit distance (a swap of neighbours counts once), or "" when none is near.
std::string nearest(std::string_view word, const std::vector<std::string>& candidates);
bool contains(const std::vector<std::string>& list, std::string_view s);
// "a, b or c", with the word given.
std::string joined(const std::vector<std::string>& names, const char* word);
