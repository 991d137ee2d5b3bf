// Strict JSON: errors and their places, the values read, and mutations of valid files.
#include <doctest/doctest.h>

#include <random>

#include "common/json.h"
#include "test/mutate.h"

namespace {
// The message of the refusal, or "" when the text is accepted.  Any other exception than Error ends the test.
std::string refusal(std::string_view text, size_t max_bytes = 1 << 20) {
    try {
        parse_json(text, "f.json", Exit::checkpoint, max_bytes);
    } catch (const Error& e) {
        CHECK(e.code == Exit::checkpoint);
        return e.what();
    }
    return "";
}
bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }
std::string nested(size_t n) { return std::string(n, '[') + std::string(n, ']'); }
}  // namespace

TEST_CASE("json: values survive") {
    const auto j =
        parse_json(R"( {"a": [1, -2, 2.5, 18446744073709551615], "b": {"": null, "c": true}, "u": "\u00e9\n"} )",
                   "f.json", Exit::data);
    CHECK(j["a"][0] == 1);
    CHECK(j["a"][1] == -2);
    CHECK(j["a"][2] == 2.5);
    CHECK(j["a"][3] == 18446744073709551615ull);
    CHECK(j["b"][""].is_null());
    CHECK(j["b"]["c"] == true);
    CHECK(j["u"] == "\u00e9\n");
    CHECK(parse_json("7", "f.json", Exit::data) == 7);
    CHECK(parse_json("[[], {}, [{}]]", "f.json", Exit::data).dump() == "[[],{},[{}]]");
}

TEST_CASE("json: as_utf8 keeps text and replaces what is none") {
    CHECK(as_utf8("plain \"\\ \u00e9\n") == "plain \"\\ \u00e9\n");
    CHECK(as_utf8("a\xff"
                  "b\xc3") == "a\ufffdb\ufffd");
    CHECK(as_utf8("") == "");
}

TEST_CASE("json: refusals name the file and the byte") {
    CHECK(refusal(R"({"a": 1, "a": 2})") == "f.json: byte 12: duplicate key \"a\"");
    CHECK(refusal(R"({"x": {"a": 1}, "y": {"a": 1}})") == "");  // the same key in two objects is no duplicate
    CHECK(has(refusal(R"({"x": {"a": 1, "\u0061": 1}})"), "duplicate key \"a\""));
    CHECK(refusal(nested(64)) == "");
    CHECK(refusal(nested(65)) == "f.json: byte 65: nested deeper than 64 levels");
    CHECK(has(refusal(std::string(1 << 19, '[')), "nested deeper"));
    CHECK(has(refusal("{} x"), "f.json: byte 3: not valid JSON"));
    CHECK(has(refusal("{}{}"), "f.json: byte 2: "));
    CHECK(has(refusal(""), "f.json: byte 0: not valid JSON"));
    CHECK(has(refusal("{\"a\": "), "unexpected end of input"));
    CHECK(refusal(std::string_view("{}\0{", 4)) == "f.json: byte 2: a NUL byte");
    CHECK(has(refusal("\xEF\xBB\xBF{}"), "byte-order mark"));
    CHECK(has(refusal("[\"\xff\"]"), "f.json: byte 2: not valid JSON"));
    CHECK(has(refusal("[\"\xc0\xaf\"]"), "UTF-8"));      // overlong
    CHECK(has(refusal("[\"\xed\xa0\x80\"]"), "UTF-8"));  // a lone surrogate
    CHECK(has(refusal(R"(["\ud800"])"), "surrogate"));
    for (const char* text :
         {"NaN", "[Infinity]", "[-Infinity]", "[nan]", "[1e999]", "[01]", "[+1]", "[.5]", "[1.]", "[1,]", "{\"a\":1,}",
          "{a: 1}", "['a']", "// c\n1", "/**/1", "[0x10]", "{1: 2}", "[\"\t\"]", "tru"})
        CHECK_MESSAGE(has(refusal(text), "not valid JSON"), text);
    CHECK(has(refusal("[18446744073709551616]"), "does not fit 64 bits"));
    CHECK(has(refusal("[-9223372036854775809]"), "does not fit 64 bits"));
    CHECK(refusal("[1, 2]", 5) == "f.json: 6 bytes of JSON; expected at most 5");
}

TEST_CASE("json: a long or binary token does not flood the message") {
    CHECK(refusal("{\"" + std::string(100000, 'k') + "\": nope}").size() < 300);
    const std::string m = refusal("[\"\x1b[31m\"]");
    CHECK(m.find('\x1b') == std::string::npos);
}

TEST_CASE("json: a mutated file is refused or means what it says") {
    const std::string seeds[] = {
        R"({"__metadata__":{"format":"pt"},"wte.weight":{"dtype":"F32","shape":[257,64],"data_offsets":[0,65792]}})",
        R"({"type": "bytes", "vocab_size": 257, "end_of_text": 256})",
        R"([null, true, false, 0, -1, 1.5e-3, 1e308, "\u00e9\ud83d\ude00\\", [], {}, {"a": [{"b": ""}]}])"};
    Mutator mutate(1);
    int accepted = 0;
    for (int i = 0; i < 4000; i++) {
        const std::string text = mutate(seeds[size_t(i) % 3]);
        CAPTURE(text);
        try {
            const auto value = parse_json(text, "f.json", Exit::checkpoint, 1 << 20);
            accepted++;
            CHECK(parse_json(value.dump(), "f.json", Exit::checkpoint, 1 << 20) == value);
        } catch (const Error& e) { CHECK(e.code == Exit::checkpoint); }
    }
    CHECK(accepted > 100);  // or the mutations are too wild to test anything
}
