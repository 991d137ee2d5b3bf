// The strict YAML that configs are written in: refused structure, hostile files, mutations.
#include <doctest/doctest.h>

#include <cstdlib>
#include <fstream>

#include "common/clock.h"
#include "common/config.h"
#include "common/yaml.h"
#include "test/config_text.h"
#include "test/mutate.h"
#include "test/scratch.h"

namespace {
std::string yaml_refusal(const std::string& text) {
    return refusal_of([&] { parse_yaml(text, "f.yaml", Exit::usage); });
}
double memory_mib(const std::string& field) {
    std::ifstream in("/proc/self/status");
    for (std::string word; in >> word;)
        if (word == field) return in >> word, std::stod(word) / 1024;
    FAIL("no " << field);
    return 0;
}
std::string repeated(const std::string& s, size_t n) {
    std::string out;
    while (n-- > 0) out += s;
    return out;
}
}  // namespace

TEST_CASE("yaml: values, quotes and lines") {
    const YamlNode root =
        parse_yaml("# c\na: 1\nb:\n  - x\n  - 'y'\n  - {c: \"\", d: ~}\ne: |\n  t\n  u\nf:", "f.yaml", Exit::usage);
    REQUIRE(root.items.size() == 4);
    CHECK(root.items[0].key == "a");
    CHECK(root.items[0].line == 2);
    CHECK(root.items[0].text == "1");
    CHECK(!root.items[0].quoted);
    const YamlNode& b = root.items[1];
    REQUIRE(b.items.size() == 3);
    CHECK(b.items[1].text == "y");
    CHECK(b.items[1].quoted);
    CHECK(b.items[1].line == 5);
    CHECK(b.items[2].items[0].kind == YamlNode::Kind::scalar);
    CHECK(b.items[2].items[1].kind == YamlNode::Kind::null);
    CHECK(root.items[2].text == "t\nu\n");
    CHECK(root.items[3].kind == YamlNode::Kind::null);
    CHECK(root.items[3].line == 10);
}

TEST_CASE("yaml: CRLF reads like LF") {
    const YamlNode root = parse_yaml("a: x\r\nb:\r\n  - 1\r\nc: 'p\r\n  q'\r\n", "f.yaml", Exit::usage);
    REQUIRE(root.items.size() == 3);
    CHECK(root.items[0].text == "x");
    CHECK(root.items[1].items[0].text == "1");
    CHECK(root.items[2].text == "p q");
    CHECK(root.items[2].line == 4);
    std::string crlf;
    for (const char c : kSmall) crlf += c == '\n' ? "\r\n" : std::string(1, c);
    CHECK(to_yaml(parse_config(crlf, "f.yaml", {})) == to_yaml(parse_config(kSmall, "f.yaml", {})));
    CHECK(yaml_refusal("a: 1\rb: 2") ==
          "f.yaml:1: a carriage return without a line feed; save the file with LF line ends");
}

TEST_CASE("yaml: what is not plain text has its own message (row 5)") {
    CHECK(yaml_refusal("") == "f.yaml: is empty");
    CHECK(yaml_refusal(" \n\n") == "f.yaml: is empty");
    CHECK(yaml_refusal("# only a comment\n") == "f.yaml: is empty");
    CHECK(yaml_refusal("---\n") == "f.yaml: is empty");
    CHECK(yaml_refusal("\xEF\xBB\xBF"
                       "a: 1") == "f.yaml: begins with a byte-order mark; save it without");
    CHECK(yaml_refusal("a:\n\tb: 1") == "f.yaml:2: a tab in the indentation; use spaces");
    CHECK(yaml_refusal("a:\n  \tb: 1") == "f.yaml:2: a tab in the indentation; use spaces");
    CHECK(yaml_refusal("a: 1\t# c") == "");
    CHECK(yaml_refusal("a: 1\nb: \xff") == "f.yaml:2: not text: byte 8 (0xff) is not UTF-8");
    for (const char* bad : {"\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82", "\x80", "\xf8\x88\x80\x80\x80"})
        CHECK(yaml_refusal(std::string("a: ") + bad).find("is not UTF-8") != std::string::npos);
    CHECK(yaml_refusal("a: \xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80") == "");
    CHECK(yaml_refusal(std::string("a: \0", 4)) == "f.yaml:1: not text: byte 3 is the control character 0x00");
    CHECK(yaml_refusal("a: 1\x04\nb: [") == "f.yaml:1: not text: byte 4 is the control character 0x04");
    CHECK(yaml_refusal("\x7f"
                       "ELF\x02") == "f.yaml:1: not text: byte 0 is the control character 0x7f");
}

TEST_CASE("yaml: duplicate keys name both lines (row 4)") {
    CHECK(yaml_refusal("a: 1\nb: 2\na: 3") == "f.yaml:3: duplicate key a, first on line 1");
    CHECK(yaml_refusal("a:\n  x: 1\n  'x': 2") == "f.yaml:3: duplicate key x, first on line 2");
    CHECK(yaml_refusal("a: {x: 1}\nb: {x: 1}") == "");
    CHECK(refusal(with("run:\n  seed: 1")) == "f.yaml:17: duplicate key run, first on line 1");
}

TEST_CASE("yaml: anchors, aliases, tags, merge keys and second documents are refused") {
    CHECK(yaml_refusal("a: &x 1\nb: *x") ==
          "f.yaml:1: an anchor (&name) is not allowed; put text that begins with & in quotes");
    CHECK(yaml_refusal("a: 1\nb: [*.bin]") ==
          "f.yaml:2: an alias (*name) is not allowed; put text that begins with * in quotes");
    for (const char* anchored : {"&x a: 1", "&x {a: 1}", "a: &x [1]", "a: &x ~", "a: &x", "&x a"})
        CHECK_MESSAGE(yaml_refusal(anchored).find("an anchor (&name)") != std::string::npos, anchored);
    CHECK(yaml_refusal("a: !!int 1") == "f.yaml:1: a tag (tag:yaml.org,2002:int) is not allowed");
    for (const char* tagged : {"a: ! x", "a: !t [1]", "a: !<t> x", "!t a: 1", "a: ! {}", "a: !t ~", "a: ! 'x'"})
        CHECK_MESSAGE(yaml_refusal(tagged).find("a tag (") != std::string::npos, tagged);
    CHECK(yaml_refusal("a: 1\n<<: {b: 1}") == "f.yaml:2: a merge key (<<) is not allowed");
    CHECK(yaml_refusal("a: 1\n---\nb: 2") == "f.yaml:2: a second document (---) begins here; expected one");
    CHECK(yaml_refusal("---\na: 1\n...\n") == "");
    CHECK(yaml_refusal("a: 1\n...\nb: 1").find("second document") != std::string::npos);
    for (const char* key : {"? [a]\n: 1", "{a: 1}: 1", "~: 1", ": 1", "'': 1"})
        CHECK_MESSAGE(yaml_refusal(key).find("key") != std::string::npos, key);
    for (const char* broken : {"a: 'x", "a: [1", "a: {b", "a: b: c", "a: [1] b", "a: @x", "a: 1\n  b: 2"})
        CHECK_MESSAGE(yaml_refusal(broken) != "", broken);
    CHECK(yaml_refusal("a: 'x") == "f.yaml:1: not valid YAML: illegal EOF in scalar");
}

TEST_CASE("yaml: files made to hurt are refused in little time and memory (row 7)") {
    std::string bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n";
    for (char c = 'b'; c < 'k'; c++)
        bomb += fmt::format("{0}: &{0} [{1}]\n", c, repeated(std::string("*") + char(c - 1) + ",", 9));
    std::string keys, flow = "{";
    for (int i = 0; i < 1000000; i++) keys += fmt::format("k{}:\n", i);
    for (int i = 0; i < 20000; i++) flow += fmt::format("k{}: 1,{}", i, i % 500 == 499 ? "\n" : "");
    struct Case {
        const char *what, *message;
        std::string text;
    } const cases[] = {
        {"alias bomb", "an anchor", bomb},
        {"10k nested lists", "nested deeper than 16 levels", repeated("[", 5000) + repeated("]", 5000)},
        {"10k nested lists in lines", "nested deeper than 16 levels", repeated("[\n", 9000) + repeated("]\n", 9000)},
        {"10k open lists", "f.yaml:", repeated("[", 10000)},
        {"10k open mappings", "f.yaml:", repeated("{", 10000)},
        {"10k block entries", "nested deeper than 16 levels", repeated("- ", 8000)},
        {"10k complex keys", "expected a key", repeated("? ", 8000)},
        {"100k open lists", "brackets", repeated("[\n", 100000)},
        {"100 MB scalar", "expected at most 262144", "a: " + std::string(100000000, 'x')},
        {"long line", "a line of more than 16384 bytes", "a: " + std::string(100000, 'x')},
        {"1M keys", "expected at most 262144", keys},
        {"30k keys", "more than 10000 values", keys.substr(0, 250000)},
        {"20k keys in braces", "brackets and commas", flow},
        {"100k entries", "more than 10000 values", repeated("-\n", 100000)},
    };
    for (const Case& c : cases) {
        CAPTURE(c.what);
        const double before_mib = memory_mib("VmRSS:");
        OutFile("/proc/self/clear_refs").write("5");  // the peak starts again from here
        const Stopwatch watch;
        const std::string message = yaml_refusal(c.text);
        [[maybe_unused]] const double ms = watch.ms(), mib = memory_mib("VmHWM:") - before_mib;
        CHECK(message.find(c.message) != std::string::npos);
        CHECK(message.size() < 200);
#if !defined(__SANITIZE_ADDRESS__) && defined(__OPTIMIZE__)
        CHECK(ms < 100);
        CHECK(mib < 64);
#endif
        if (std::getenv("KILN_TEST_VERBOSE")) MESSAGE(std::string(c.what), ": ", ms, " ms, ", mib, " MiB");
    }
    const Scratch dir;  // from a file, the size is refused before anything is read
    const std::string path = dir.write("big.yaml", "");
    fs::resize_file(path, 100000000);
    CHECK(refusal_of([&] { load_config(path, {}); }) == path + ": 100000000 bytes; expected at most 262144");
}

TEST_CASE("yaml: quoted text reads back to the same bytes") {
    std::string all;
    for (int c = 0; c < 128; c++) all += char(c);
    all += "\xc2\x85\xe2\x80\xa8\xe2\x80\xa9\xef\xbb\xbf\xef\xbf\xbd\xf4\x8f\xbf\xbf";  // NEL, LS, PS, BOM, the last
    for (const std::string& s : {all, std::string(" a "), std::string(""), std::string("'\"\\n"), repeated(" \n", 5)}) {
        const YamlNode root = parse_yaml("k: " + yaml_quoted(s), "f.yaml", Exit::usage);
        CHECK(root.items[0].text == s);
        CHECK(root.items[0].quoted);
    }
}

TEST_CASE("config: a mutated file is refused or means what it says") {
    const std::string seeds[] = {kSmall, kLarge};
    Mutator mutate(3);
    int accepted = 0;
    for (size_t i = 0; i < 4000; i++) {
        const std::string text = mutate(seeds[i % 2]);
        CAPTURE(text);
        try {
            const Config c = parse_config(text, "f.yaml", {});
            accepted++;
            const std::string yaml = to_yaml(c);
            const Config again = parse_config(yaml, "g.yaml", {});
            CHECK(differing_keys(c, again) == std::vector<std::string>{});
            CHECK(to_yaml(again) == yaml);
        } catch (const Error& e) {
            CHECK(e.code == Exit::usage);
            CHECK(std::string(e.what()).starts_with("f.yaml"));
        }
    }
    CHECK(accepted > 100);  // or the mutations are too wild to test anything
    for (size_t i = 0; i < 1000; i++) {
        const std::string override = mutate("schedule.warmup_steps=[1, {a: 'b'}]");
        CAPTURE(override);
        const std::string m = refusal(kSmall, {override});
        CHECK((m == "" || m.starts_with("--set ")));
    }
}
