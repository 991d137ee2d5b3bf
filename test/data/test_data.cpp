// Shards, the stream of sequences over shards, and the tokenizer: the values read, and the words of each refusal.
#include <doctest/doctest.h>

#include "data/shard.h"
#include "data/tokenizer.h"
#include "test/mutate.h"
#include "test/scratch.h"

namespace {
constexpr auto automatic = ShardFormat::automatic, nanogpt = ShardFormat::nanogpt;

template <class F>
std::string refusal(const F& f, Exit code = Exit::data) {
    try {
        f();
    } catch (const Error& e) {
        CHECK(e.code == code);
        return e.what();
    }
    return "accepted";
}
std::string refusal_of(const std::string& bytes, ShardFormat format = automatic) {
    const Scratch dir;
    const std::string path = dir.write("x.bin", bytes), message = refusal([&] { Shard(path, format); });
    if (message != "accepted") REQUIRE(message.starts_with(path + ": "));
    return message == "accepted" ? message : message.substr(path.size() + 2);
}
bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// A stream over the patterns, with what it warned of.
struct Stream {
    Log log;
    TokenStream data;
    std::string warnings;
    Stream(const Scratch& dir, const std::vector<std::string>& patterns, int T, int V = 65536,
           ShardFormat f = automatic)
        : data((log.open(dir.path("log")), "data.train"), patterns, f, T, V, log),
          warnings(read_text(dir.path("log"), 1 << 20, Exit::io)) {}
    std::vector<int32_t> inputs(uint64_t i, size_t T) const {
        std::vector<int32_t> x(T), y(T);
        data.read(i, x, y);
        for (size_t t = 0; t + 1 < T; t++) CHECK(y[t] == x[t + 1]);
        x.push_back(y.back());
        return x;
    }
};
}  // namespace

TEST_CASE("shard: the three layouts hold the same tokens") {
    const Scratch dir;
    std::vector<uint16_t> tokens = counting(5000);
    tokens[4999] = 65535;
    const std::string raw(reinterpret_cast<const char*>(tokens.data()), 10000);
    const Shard s16(dir.write("a", shard_bytes(tokens)), automatic);
    const Shard s32(dir.write("b", shard_bytes(std::vector<uint32_t>(tokens.begin(), tokens.end()))), automatic);
    const Shard bare(dir.write("c", raw), nanogpt);
    for (const Shard* s : {&s16, &s32, &bare}) {
        REQUIRE(s->count() == 5000);
        std::vector<int32_t> got(4999);  // more than one chunk of the reader
        s->read(1, got, 65536);
        CHECK(std::equal(got.begin(), got.end(), tokens.begin() + 1));
        CHECK_THROWS_AS(s->read(2, got, 65536), Error);
    }
    const Shard big(dir.write("d", shard_bytes(std::vector<uint32_t>{7, 2147483646})), automatic);
    std::vector<int32_t> got(2);
    big.read(0, got, INT32_MAX);
    CHECK(got[1] == 2147483646);
}

TEST_CASE("shard: a bad file is refused with what is wrong (rows 15 to 17)") {
    const std::vector<uint16_t> t = counting(10);
    CHECK(refusal_of(shard_bytes(t)) == "accepted");
    CHECK(refusal_of(shard_bytes(t, 20240521)) ==
          "not a token shard: magic 20240521, expected 20240520 (uint16) or 20240801 (uint32); for headerless uint16 "
          "tokens set data.format: nanogpt");
    CHECK(has(refusal_of("ab"), "not a token shard: magic 0,"));
    CHECK(refusal_of(shard_bytes(t, 20240520, 2)) == "version 2 of the shard format, expected 1 for magic 20240520");
    CHECK(refusal_of(shard_bytes(t, 20240801, 1)) == "version 1 of the shard format, expected 7 for magic 20240801");
    CHECK(refusal_of(shard_bytes(t).substr(0, 600)) ==
          "truncated: 600 bytes, expected a header of 1024 bytes; restore or rewrite the file");
    CHECK(refusal_of(shard_bytes(t, 20240520, 1, 11)) ==
          "truncated: 1044 bytes, expected 1024 + 11 tokens * 2 = 1046; restore or rewrite the file");
    CHECK(refusal_of(shard_bytes(t).substr(0, 1043)) ==
          "truncated: 1043 bytes, expected 1024 + 10 tokens * 2 = 1044; restore or rewrite the file");
    CHECK(
        refusal_of(shard_bytes(t, 20240520, 1, 9)) ==
        "longer than its header states: 1044 bytes, expected 1024 + 9 tokens * 2 = 1042; restore or rewrite the file");
    CHECK(
        has(refusal_of(shard_bytes(t, 20240520, 1, INT32_MAX)), "expected 1024 + 2147483647 tokens * 2 = 4294968318"));
    CHECK(has(refusal_of(shard_bytes<uint32_t>({1}, 20240801, 7, INT32_MAX)), "tokens * 4 = 8589935612"));
    CHECK(refusal_of(shard_bytes(t, 20240520, 1, -5)) ==
          "the header states -5 tokens; a shard holds 0 to 2147483647, write more as several shards");
    CHECK(has(refusal_of(shard_bytes(t, 20240520, 1, int64_t(1) << 31)), "the header states -2147483648 tokens"));
    CHECK(refusal_of("abc", nanogpt) == "3 bytes is not a whole number of uint16 tokens; truncated?");
    CHECK(refusal_of(shard_bytes(t), nanogpt) ==
          "begins with a shard header (magic 20240520); remove data.format: nanogpt");
    CHECK(has(refusal([] { Shard("/", automatic); }), "is a directory; expected a regular file"));
    CHECK(has(refusal([] { Shard("/nonexistent", automatic); }), "/nonexistent: cannot open: No such file"));
}

TEST_CASE("shard: a token outside the vocabulary is named with its position (row 18)") {
    const Scratch dir;
    std::vector<uint16_t> tokens(4000, 3);
    tokens[2999] = 257;
    const std::string path = dir.write("a.bin", shard_bytes(tokens));
    const Shard s(path, automatic);
    std::vector<int32_t> got(4000);
    CHECK(refusal([&] { s.read(0, got, 257); }) == path + ": token 2999 is 257, expected below model.vocab_size = 257");
    s.read(0, got, 258);
    s.read(3000, std::span(got).first(1000), 4);
    const Shard wide(dir.write("b.bin", shard_bytes(std::vector<uint32_t>{4294967295u})), automatic);
    CHECK(has(refusal([&] { wide.read(0, std::span(got).first(1), INT32_MAX); }), "token 0 is 4294967295"));
}

TEST_CASE("stream: sequences do not cross shards, paths sort bytewise, patterns keep their order") {
    const Scratch dir;
    dir.write("b.bin", shard_bytes(counting(9, 100)));   // two sequences of 4
    dir.write("B.bin", shard_bytes(counting(12, 200)));  // two, three tokens left over
    dir.write("a.bin", shard_bytes(counting(5, 300)));   // one
    const Stream s(dir, {dir.path("[bB].bin"), dir.path("a.*")}, 4);
    REQUIRE(s.data.n_sequences() == 5);
    CHECK(s.data.n_tokens() == 26);
    CHECK(s.warnings == "");
    CHECK(s.inputs(0, 4) == std::vector<int32_t>{200, 201, 202, 203, 204});
    CHECK(s.inputs(1, 4) == std::vector<int32_t>{204, 205, 206, 207, 208});
    CHECK(s.inputs(2, 4) == std::vector<int32_t>{100, 101, 102, 103, 104});
    CHECK(s.inputs(3, 4) == std::vector<int32_t>{104, 105, 106, 107, 108});
    CHECK(s.inputs(4, 4) == std::vector<int32_t>{300, 301, 302, 303, 304});
    std::vector<int32_t> x(4);
    CHECK(has(refusal([&] { s.data.read(5, x, x); }, Exit::internal), "sequence 5 of 5"));
    const auto parts = s.data.parts();
    REQUIRE(parts.size() == 3);
    CHECK(parts[1].file == "b.bin");
    CHECK(parts[1].tokens == 9);
}

TEST_CASE("stream: a pattern that matches nothing, and too little data (rows 14 and 19)") {
    const Scratch dir;
    dir.write("a.bin", shard_bytes(counting(8)));
    const auto open = [&](const std::string& pattern, int T) { return refusal([&] { Stream(dir, {pattern}, T); }); };
    CHECK(open(dir.path("no*.bin"), 4) == "data.train: no file matches \"" + dir.path("no*.bin") + "\"");
    CHECK(open("no-such-*.bin", 4) ==
          "data.train: no file matches \"no-such-*.bin\" in " + fs::current_path().string());
    CHECK(open(dir.path("a.bin"), 7) == "accepted");
    CHECK(open(dir.path("a.bin"), 8) ==
          "data.train: 8 tokens in 1 files, too few for one sequence of context_length + 1 = 9");
}

TEST_CASE("stream: short, empty and repeated shards among good ones are named, and reading goes on (rows 19 and 21)") {
    const Scratch dir;
    const std::string good = dir.write("good.bin", shard_bytes(counting(9)));
    dir.write("empty.bin", "");
    dir.write("none.bin", shard_bytes(counting(0)));
    dir.write("short.bin", shard_bytes(counting(4)));
    const Stream s(dir, {dir.path("*.bin"), good}, 4);
    CHECK(s.data.n_sequences() == 4);
    CHECK(s.inputs(3, 4) == std::vector<int32_t>{4, 5, 6, 7, 8});
    CHECK(has(s.warnings, "warning: data.train: " + dir.path("empty.bin") + " holds no tokens; going on without it"));
    CHECK(has(s.warnings, dir.path("none.bin") + " holds no tokens"));
    CHECK(
        has(s.warnings, dir.path("short.bin") + " holds 4 tokens, too few for one sequence of context_length + 1 = 5"));
    CHECK(has(s.warnings, good + " is matched twice and counts twice"));
    CHECK(has(refusal([&] { Stream(dir, {dir.path("[en]*.bin")}, 4); }), "0 tokens in 2 files"));
}

TEST_CASE("stream: the fingerprint follows the content (row 20)") {
    const Scratch dir;
    const auto print = [&](const std::vector<uint16_t>& tokens) {
        return Shard(dir.write("a.bin", shard_bytes(tokens)), automatic).fingerprint();
    };
    for (const size_t n : {0, 1, 7679, 7680, 7681, 100000}) {  // 7680: the last size that is hashed whole
        CAPTURE(n);
        std::vector<uint16_t> tokens = counting(n);
        const uint64_t before = print(tokens);
        CHECK(print(tokens) == before);
        CHECK(print(counting(n + 1)) != before);
        if (n == 0) continue;
        tokens[n - 1] ^= 1;
        CHECK(print(tokens) != before);
        CHECK(print(counting(n, 1)) != before);
    }
}

TEST_CASE("stream: a shard that is truncated or deleted while it is read (row 20)") {
    const Scratch dir;
    const std::string path = dir.write("a.bin", shard_bytes(counting(60000)));
    const Stream s(dir, {path}, 64);
    CHECK(s.inputs(900, 64)[0] == 57600);
    fs::resize_file(path, 1024);
    CHECK(has(refusal([&] { s.inputs(900, 64); }), path + ": shrank while it was in use"));
    // A cut within the last page of the map raises no signal: the bytes read as zeros.
    const std::string small = dir.write("c.bin", shard_bytes(counting(1000)));
    const Stream cut(dir, {small}, 64);
    fs::resize_file(small, 1500);
    CHECK(cut.inputs(0, 64)[0] == 0);
    CHECK(has(refusal([&] { cut.inputs(10, 64); }), small + ": shrank while it was in use"));
    dir.write("b.bin", shard_bytes(counting(60000)));
    const Stream kept(dir, {dir.path("b.bin")}, 64);
    fs::remove(dir.path("b.bin"));
    CHECK(kept.inputs(900, 64)[0] == 57600);
}

TEST_CASE("shard: a mutated file is refused or is read within its bounds") {
    const Scratch dir;
    const std::string seeds[] = {shard_bytes(counting(40)), shard_bytes(counting<uint32_t>(20)),
                                 shard_bytes(counting(0))};
    Mutator mutate(2);
    int accepted = 0;
    for (size_t i = 0; i < 3000; i++) {
        std::string bytes = seeds[i % 3];
        if (i % 2 == 0) {
            bytes[mutate.below(12)] ^= char(1 << mutate.below(8));  // one bit of the fields
        } else {
            bytes = mutate(bytes);
        }
        try {
            const Shard s(dir.write("x.bin", bytes), i % 5 == 0 ? nanogpt : automatic);
            std::vector<int32_t> tokens(s.count());
            s.read(0, tokens, INT32_MAX);
            s.fingerprint();
            accepted++;
        } catch (const Error& e) { CHECK(e.code == Exit::data); }
    }
    CHECK(accepted > 100);
}

TEST_CASE("tokenizer: bytes to tokens and back") {
    const Scratch dir;
    const Tokenizer t = Tokenizer::load(dir.write("t", R"({"type": "bytes", "vocab_size": 257, "end_of_text": 256})"));
    CHECK(t.vocab_size() == 257);
    CHECK(t.end_of_text() == 256);
    CHECK(t.encode(std::string_view("a\0\xff", 3)) == std::vector<int32_t>{97, 0, 255});
    CHECK(t.decode({104, 256, 105, -1, 1000, 195, 169}) == "hi\xc3\xa9");
    CHECK(
        Tokenizer::load(dir.write("t", R"({"type": "bytes", "vocab_size": 256, "end_of_text": null})")).end_of_text() ==
        -1);
}

TEST_CASE("tokenizer: characters to their places and back") {
    const Scratch dir;
    const Tokenizer t = Tokenizer::load(
        dir.write("t", R"({"type": "chars", "vocab_size": 5, "end_of_text": null, "characters": "\n Aab"})"));
    CHECK(t.vocab_size() == 5);
    CHECK(t.end_of_text() == -1);
    CHECK(t.encode("b A\n") == std::vector<int32_t>{4, 1, 2, 0});
    CHECK(t.decode({3, 4, 5, -1, 97, 2}) == "abA");
    CHECK(refusal([&] { t.encode("a\tb"); }, Exit::usage) ==
          R"(the text "a\x09b" holds a character that the data did not; the tokens are "\x0a Aab")");
}

TEST_CASE("tokenizer: a bad file is refused with what is wrong") {
    const Scratch dir;
    const auto load = [&](const char* json) {
        const std::string path = dir.write("t.json", json), m = refusal([&] { Tokenizer::load(path); });
        return m.starts_with(path + ": ") ? m.substr(path.size() + 2) : m;
    };
    CHECK(load("[]") == R"(expected an object {"type": "bytes", "vocab_size": 257, "end_of_text": 256})");
    CHECK(load("{}") == R"(type is missing; available in this build: "bytes", "chars")");
    CHECK(load(R"({"type": "bpe"})") == R"(type is "bpe"; available in this build: "bytes", "chars")");
    CHECK(load(R"({"type": "bytes"})") == "vocab_size is missing; expected an integer in [256, 2147483647]");
    CHECK(load(R"({"type": "bytes", "vocab_size": 18446744073709551615})") ==
          "vocab_size is 18446744073709551615; expected an integer in [256, 2147483647]");
    CHECK(load(R"({"type": "bytes", "vocab_size": 257.0})") ==
          "vocab_size is 257.0; expected an integer in [256, 2147483647]");
    CHECK(load(R"({"type": "bytes", "vocab_size": 257})") ==
          "end_of_text is missing; expected an integer in [256, 256]");
    CHECK(load(R"({"type": "bytes", "vocab_size": 257, "end_of_text": 257})") ==
          "end_of_text is 257; expected an integer in [256, 256]");
    CHECK(has(load(R"({"type": "bytes", "vocab_size": 256})"), "end_of_text is missing; expected null"));
    const auto chars = [&](const char* characters) {
        return load(
            fmt::format(R"({{"type": "chars", "vocab_size": 2, "end_of_text": null, "characters": {}}})", characters)
                .c_str());
    };
    for (const char* bad : {R"("a")", R"("abc")", R"("ba")", R"("aa")", R"("aé")", R"("\u0080b")", "7", "null"}) {
        CAPTURE(bad);
        CHECK(has(chars(bad), "expected vocab_size = 2 different ASCII characters in ascending order"));
    }
    CHECK(has(load(R"({"type": "chars", "vocab_size": 129})"), "expected an integer in [1, 128]"));
    CHECK(has(load(R"({"type": "chars", "vocab_size": 1, "end_of_text": 0, "characters": "a"})"),
              "end_of_text is 0; expected null, as chars have none"));
    CHECK(has(load("{"), "not valid JSON"));
    CHECK(has(refusal([&] { Tokenizer::load(dir.path("none")); }), "cannot open: No such file"));
}
