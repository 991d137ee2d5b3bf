#include "common/tuning_cache.h"

#include <cctype>
#include <cstdlib>
#include <random>
#include <vector>

#include "common/hash.h"

namespace {
constexpr const char* kFormat = "kiln choices 1";
constexpr std::string_view kHash = "hash ", kIs = " = ";
constexpr size_t kMaxText = size_t(16) << 20;  // bytes

// The name of the file for `made_for`: letters, digits and dots stay.
std::string file_name(const std::string& made_for) {
    std::string name;
    for (const char c : made_for) {
        if (std::isalnum(static_cast<unsigned char>(c)) || c == '.')
            name += c;
        else if (!name.empty() && name.back() != '-')
            name += '-';
    }
    return name + ".txt";
}
}  // namespace

std::string to_text(const Choices& c) {
    std::string text = fmt::format("{}\n{}\n", kFormat, c.made_for);
    for (const auto& [kind, choice] : c.by_kind) text += fmt::format("{}{}{}\n", kind, kIs, choice);
    return text + fmt::format("{}{}\n", kHash, hash_text(hash64(text)));
}

Choices parse_choices(const std::string& text, const std::string& name) {
    const auto bad = [&](const std::string& what) { fail(Exit::data, "{}: not kiln's choices: {}", name, what); };
    std::vector<std::string> lines;
    for (size_t at = 0; at < text.size();) {
        const size_t end = text.find('\n', at);
        if (end == std::string::npos) bad("the last line is cut off");
        lines.push_back(text.substr(at, end - at));
        at = end + 1;
    }
    if (lines.empty() || lines[0] != kFormat) bad(fmt::format("the first line is not \"{}\"", kFormat));
    if (lines.size() < 3 || !lines.back().starts_with(kHash)) bad("the last line is not a hash");
    const std::string_view hashed = std::string_view(text).substr(0, text.size() - lines.back().size() - 1);
    if (lines.back().substr(kHash.size()) != hash_text(hash64(hashed))) bad("the text does not have its hash");
    Choices c{.made_for = lines[1]};
    for (size_t i = 2; i + 1 < lines.size(); i++) {
        const size_t is = lines[i].find(kIs);
        if (is == std::string::npos) bad(fmt::format("line {} has no \"{}\"", i + 1, kIs));
        c.by_kind[lines[i].substr(0, is)] = lines[i].substr(is + kIs.size());
    }
    return c;
}

fs::path ChoiceCache::directory() {
    // The XDG Base Directory Specification says to ignore a path that is not absolute.
    if (const char* cache = std::getenv("XDG_CACHE_HOME"); cache && *cache == '/') return fs::path(cache) / "kiln";
    if (const char* home = std::getenv("HOME"); home && *home == '/') return fs::path(home) / ".cache" / "kiln";
    return {};
}

ChoiceCache::ChoiceCache(const fs::path& directory, const std::string& made_for, Log& log)
    : path_(directory.empty() ? fs::path() : directory / file_name(made_for)), made_for_(made_for), log_(log) {}

Choices ChoiceCache::read() const {
    const Choices none{.made_for = made_for_};
    std::error_code unreadable;
    if (path_.empty() || !fs::exists(path_, unreadable)) return none;
    try {
        const std::string name = path_.string();
        Choices c = parse_choices(read_text(path_, kMaxText, Exit::data), name);
        if (c.made_for == made_for_) return c;
        log_.warn("{}: made for {}, not for {}; it is not used", name, c.made_for, made_for_);
    } catch (const Error& e) { log_.warn("{}; it is not used", e.what()); }
    return none;
}

void ChoiceCache::add(const Choices& c) const {
    if (path_.empty()) return log_.info("neither XDG_CACHE_HOME nor HOME is set: choices are not kept for later runs");
    Log silent(1);  // errors of the file were reported when it was read
    Choices all = ChoiceCache(path_.parent_path(), made_for_, silent).read();
    for (const auto& [kind, choice] : c.by_kind) all.by_kind[kind] = choice;
    // A temporary name that no other run has: replace_file() allows one writer only.
    const fs::path temporary = fmt::format("{}.tmp-{:08x}", path_.string(), std::random_device()());
    try {
        make_directories(path_.parent_path());
        OutFile out(temporary);
        out.write(to_text(all));
        out.close();
        rename_path(temporary, path_);
    } catch (const Error& e) {
        std::error_code gone;
        fs::remove(temporary, gone);
        log_.info("choices are not kept for later runs: {}", e.what());
    }
}
