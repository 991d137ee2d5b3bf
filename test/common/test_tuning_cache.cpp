// Choices made by timing: their text and their cache.  test/system/test_choices.py has whole runs.  Broken on purpose
// and seen to fail: the hash not compared, not of the first line, or of the hash line too; a file for another GPU used;
// entries that another process added lost; the temporary file left behind.
#include "common/tuning_cache.h"

#include <doctest/doctest.h>
#include <sys/stat.h>

#include "common/hash.h"
#include "test/scratch.h"

namespace {
const Choices some = {.made_for = "NVIDIA H200, cuBLASLt 130100",
                      .by_kind = {{"64 x 8 x 8, BIAS", "0a1b"}, {"8 x 8 x 8, DEFAULT", "apart"}}};
std::string error_of(const std::string& text) {
    try {
        parse_choices(text, "the file");
    } catch (const Error& e) {
        CHECK(e.code == Exit::data);
        return e.what();
    }
    return "";
}
// A text with the hash that it must then have.
std::string sealed(const std::string& text) { return text + "hash " + hash_text(hash64(text)) + "\n"; }
}  // namespace

TEST_CASE("choices: a text says what they were made for, a line for each kind, and its hash") {
    const std::string text = to_text(some);
    CHECK(
        text ==
        sealed("kiln choices 1\nNVIDIA H200, cuBLASLt 130100\n64 x 8 x 8, BIAS = 0a1b\n8 x 8 x 8, DEFAULT = apart\n"));
    CHECK(parse_choices(text, "") == some);
    const Choices none = {.made_for = "x", .by_kind = {}};
    CHECK(parse_choices(to_text(none), "") == none);
}

TEST_CASE("choices: a damaged text is refused, whatever byte is wrong or wherever it ends") {
    const std::string text = to_text(some);
    for (size_t i = 0; i < text.size(); i++) {
        CAPTURE(i);
        std::string flipped = text;
        flipped[i] ^= 1;
        CHECK(error_of(flipped).starts_with("the file: not kiln's choices: "));
        CHECK(error_of(text.substr(0, i)).starts_with("the file: not kiln's choices: "));
    }
    CHECK(error_of(sealed("kiln choices 2\nx\n")).find("the first line is not \"kiln choices 1\"") !=
          std::string::npos);
    CHECK(error_of(sealed("kiln choices 1\n")).find("the last line is not a hash") != std::string::npos);
    CHECK(error_of(sealed("kiln choices 1\nx\nkind\n")).find("line 3 has no \" = \"") != std::string::npos);
}

TEST_CASE("choices: the cache adds to what is there, a file for each GPU and library") {
    const Scratch scratch;
    Log log(1);
    const fs::path home = scratch.path("not/there/yet");
    const ChoiceCache cache(home, some.made_for, log);
    CHECK(cache.path() == home / "NVIDIA-H200-cuBLASLt-130100.txt");
    CHECK(cache.read() == Choices{.made_for = some.made_for, .by_kind = {}});
    cache.add(some);
    CHECK(cache.read() == some);
    cache.add({.made_for = some.made_for, .by_kind = {{"8 x 8 x 8, DEFAULT", "02"}, {"new", "03"}}});
    Choices all = some;
    all.by_kind["8 x 8 x 8, DEFAULT"] = "02";
    all.by_kind["new"] = "03";
    CHECK(cache.read() == all);
    CHECK(ChoiceCache(home, "another", log).read().by_kind.empty());
    CHECK(std::distance(fs::directory_iterator(home), {}) == 1);

    OutFile(cache.path()).write(to_text({.made_for = "another", .by_kind = {{"k", "c"}}}));
    CHECK(cache.read().by_kind.empty());
    OutFile(cache.path()).write("noise");
    CHECK(cache.read().by_kind.empty());
    cache.add(some);
    CHECK(cache.read() == some);
}

TEST_CASE("choices: a cache that cannot be read or written is as if it were empty") {
    const Scratch scratch;
    Log log(1);
    scratch.write("file", "");
    for (const fs::path& home : {fs::path(), fs::path(scratch.path("file"))}) {
        const ChoiceCache cache(home, some.made_for, log);
        cache.add(some);
        CHECK(cache.read().by_kind.empty());
    }
    const fs::path taken = fs::path(scratch.path("taken")) / "NVIDIA-H200-cuBLASLt-130100.txt";
    make_directories(taken / "a directory in the file's place");
    const ChoiceCache cache(taken.parent_path(), some.made_for, log);
    cache.add(some);
    CHECK(cache.read().by_kind.empty());
    CHECK(std::distance(fs::directory_iterator(taken.parent_path()), {}) == 1);
}

TEST_CASE("choices: the cache is where the XDG specification has it") {
    const auto with = [](const char* xdg, const char* home) {
        const char* names[] = {"XDG_CACHE_HOME", "HOME"};
        const char* values[] = {xdg, home};
        std::string before[2];
        bool had[2];
        for (int i = 0; i < 2; i++) {
            const char* old = std::getenv(names[i]);
            had[i] = old != nullptr;
            before[i] = old ? old : "";
            values[i] ? ::setenv(names[i], values[i], 1) : ::unsetenv(names[i]);
        }
        const fs::path found = ChoiceCache::directory();
        for (int i = 0; i < 2; i++) had[i] ? ::setenv(names[i], before[i].c_str(), 1) : ::unsetenv(names[i]);
        return found;
    };
    CHECK(with("/x", "/home/u") == "/x/kiln");
    CHECK(with("", "/home/u") == "/home/u/.cache/kiln");
    CHECK(with(nullptr, "/home/u") == "/home/u/.cache/kiln");
    CHECK(with("not/absolute", "/home/u") == "/home/u/.cache/kiln");
    CHECK(with(nullptr, nullptr) == "");
    CHECK(with("", "") == "");
}
