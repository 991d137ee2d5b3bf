// The config: accepted values, refused values, and the words of each refusal (exit code 2 every time).
#include <doctest/doctest.h>

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "common/config.h"
#include "common/config_keys.h"
#include "common/yaml.h"
#include "test/config_text.h"
#include "test/scratch.h"

TEST_CASE("config: the smallest file, and the defaults") {
    const Config c = parse_config(kSmall, "f.yaml", {});
    CHECK(c.run.name == "tiny");
    CHECK(c.run.out_dir == "runs");
    CHECK(c.run.seed == 1337);
    CHECK(c.device.threads == 0);
    CHECK(c.device.attention == UseAttention::automatic);
    CHECK(c.model.n_embd == 64);
    CHECK(c.model.bias);
    CHECK(c.data.train == std::vector<std::string>{"a*.bin", "b.bin"});
    CHECK(c.train.max_steps == 100);
    CHECK(c.train.max_epochs == 0);
    CHECK(c.optimizer.learning_rate == 3e-4);
    CHECK(c.optimizer.eps == 1e-8);
    CHECK(c.schedule.decay_steps == 0);
    CHECK(c.parallel.allreduce == UseAllReduce::automatic);
    CHECK(differing_keys(c, parse_config(to_yaml(c), "g.yaml", {})) == std::vector<std::string>{});
}

TEST_CASE("config: a value as a message names it") {
    const Config c = parse_config(kSmall, "f.yaml", {});
    CHECK(value_of(c, "data.train") == "[a*.bin, b.bin]");
    CHECK(value_of(c, "model.n_embd") == "64");
    CHECK(value_of(c, "device.threads") == "auto");
    CHECK(value_of(c, "device.attention") == "auto");
}

TEST_CASE("config: every key survives to_yaml, and differing_keys names it") {
    const Config small = parse_config(kSmall, "f.yaml", {});
    const Config c = parse_config(kLarge, "f.yaml", {}), again = parse_config(to_yaml(c), "g.yaml", {});
    CHECK(differing_keys(c, again) == std::vector<std::string>{});
    CHECK(to_yaml(again) == to_yaml(c));
    CHECK(again.optimizer.learning_rate == 0.00030000000000000003);
    CHECK(again.run.seed == 9007199254740991);
    CHECK(again.run.name == "a \"b\" \\ \xc3\xa9: #1");
    CHECK(again.eval.sample_prompts ==
          std::vector<std::string>{"def f(x):\n\treturn", "", std::string("\0\x7f", 2), "true", "- 'a'"});
    CHECK(again.device.threads == 3);
    CHECK(again.device.attention == UseAttention::portable);
    CHECK(again.schedule.decay_steps == 50);
    CHECK(again.train.max_epochs == 2.5);
    const std::vector<std::string> differ = differing_keys(c, small);
    for (const char* key :
         {"run.seed", "model.bias", "data.val", "train.max_steps", "train.max_epochs", "optimizer.eps"})
        CHECK_MESSAGE(std::count(differ.begin(), differ.end(), key) == 1, key);
    for (const char* key :
         {"train.max_steps", "run.max_minutes", "eval.interval", "checkpoint.interval", "checkpoint.keep",
          "log.interval", "device.threads", "device.attention", "parallel.allreduce", "train.micro_batch_size"})
        CHECK_MESSAGE(may_change_on_resume(key), key);
    for (const char* key : {"run.seed", "model.n_embd", "data.train", "train.global_batch_size",
                            "optimizer.learning_rate", "schedule.name", "model.dropout", "no.such", "eval.tokens"})
        CHECK_MESSAGE(!may_change_on_resume(key), key);
}

namespace {
// In YAML: all words of a key that is a word; else values of which one differs from the present one and is allowed.
std::vector<std::string> values_to_try(const Key& key, const Config& now) {
    if (const std::vector<std::string> words = words_of(key); !words.empty()) return words;
    const std::string value = value_of(now, key.name), allowed = allowed_values(key);
    if (allowed.starts_with("a list")) return {"[x]"};
    if (allowed == "true or false") return {value == "true" ? "false" : "true"};
    if (!allowed.starts_with("a number") && !allowed.starts_with("an integer")) return {"x"};
    const double number = value == key.zero_word ? 0 : std::stod(value);
    return {"1", fmt::format("{}", 2 * number), fmt::format("{}", key.range.low), fmt::format("{}", key.range.high)};
}
}  // namespace

// The table of keys says what to try, so that a new key needs no line here.
TEST_CASE("config: every word, and another value of every key, survives to_yaml and is named by differing_keys") {
    const std::vector<std::string> given = {"data.val=[v.bin]", "data.tokenizer=t.json",
                                            "optimizer.learning_rate=1000"};
    const Config base = parse_config(kSmall, "f.yaml", given);
    for (const Key& key : config_keys()) {
        if (!key.member || key.one_of_two) continue;  // kLarge has the other of the two
        CAPTURE(key.name);
        const std::vector<std::string> values = values_to_try(key, base), words = words_of(key);
        size_t n_accepted = 0;
        for (const std::string& value : values) {
            std::vector<std::string> overrides = given;
            overrides.push_back(std::string(key.name) + "=" + value);
            if (!refusal(kSmall, overrides).empty()) continue;
            const Config c = parse_config(kSmall, "f.yaml", overrides);
            if (words.empty() && differing_keys(base, c).empty()) continue;
            CAPTURE(value);
            n_accepted++;
            const Config again = parse_config(to_yaml(c), "g.yaml", {});
            CHECK(differing_keys(c, again).empty());
            CHECK(to_yaml(again) == to_yaml(c));
            CHECK(value_of(again, key.name) == value_of(c, key.name));
            if (!words.empty()) CHECK(value_of(c, key.name) == value);
            if (value_of(c, key.name) != value_of(base, key.name))
                CHECK(differing_keys(base, c) == std::vector<std::string>{key.name});
        }
        CHECK(n_accepted >= (words.empty() ? 1 : words.size()));
    }
}

TEST_CASE("config: overrides come after the file and are named in messages") {
    const Config c = parse_config(kSmall, "f.yaml",
                                  {"train.max_steps=7", "data.val=[v.bin, \"w x.bin\"]", "run.name='a=b'",
                                   "device.threads=2", "device.threads=auto", "model.init_from=\"\""});
    CHECK(c.train.max_steps == 7);
    CHECK(c.data.val == std::vector<std::string>{"v.bin", "w x.bin"});
    CHECK(c.run.name == "a=b");
    CHECK(c.device.threads == 0);
    const auto with = [](const std::string& o) { return refusal(kSmall, {o}); };
    CHECK(with("train.global_batch_size=30") ==
          "--set train.global_batch_size=30: train.global_batch_size = 30 is not divisible by train.micro_batch_size = "
          "8; "
          "use train.global_batch_size = 24 or 32");
    CHECK(with("train.max_steps=8x") ==
          "--set train.max_steps=8x: train.max_steps = 8x is not an integer; expected an integer from 1 to 1000000000");
    CHECK(with("max_steps=8") == "--set max_steps=8: expected section.key=value");
    CHECK(with("train.max_steps") == "--set train.max_steps: expected section.key=value");
    CHECK(with("train=a.b") == "--set train=a.b: expected section.key=value");
    CHECK(with("run.name=") == "--set run.name=: run.name has no value; for empty text write run.name=\"\"");
    CHECK(with("run.name=~") ==
          "--set run.name=~: run.name = nothing has no value; expected one path component without /, not . or ..");
    CHECK(with("trian.max_steps=1") == "--set trian.max_steps=1: unknown section trian; did you mean train?");
    CHECK(with("train.max_step=1") == "--set train.max_step=1: unknown key train.max_step; did you mean max_steps?");
    CHECK(
        with("train.a.b=1").starts_with("--set train.a.b=1: unknown key train.a.b; train has max_steps, max_epochs,"));
    CHECK(with("data.val=[a") ==
          "--set data.val=[a: expected a key (a name, then a colon); is a bracket or quote left open?");
    CHECK(with("data.val=*.bin").ends_with("put text that begins with * in quotes"));
    CHECK(with("parallel.schedule=2") == "--set parallel.schedule=2: parallel.schedule is not available in this build");
}

TEST_CASE("config: unknown keys get a suggestion (row 1)") {
    CHECK(refusal(replaced("learning_rate:", "learing_rate:")) ==
          "f.yaml:16: unknown key optimizer.learing_rate; did you mean learning_rate?");
    CHECK(refusal(replaced("learning_rate:", "learnign_rate:")).ends_with("did you mean learning_rate?"));
    CHECK(refusal(replaced("max_steps: 100", "learning_rate: 1")) ==
          "f.yaml:12: unknown key train.learning_rate; did you mean optimizer.learning_rate?");
    CHECK(refusal(replaced("learning_rate: 0.0003", "zzz: 1")) ==
          "f.yaml:16: unknown key optimizer.zzz; optimizer has name, learning_rate, beta1, beta2, eps, weight_decay "
          "and momentum");
    CHECK(refusal(replaced("model:", "modle:")) == "f.yaml:3: unknown section modle; did you mean model?");
    CHECK(refusal(replaced("model:", "zzz:")) ==
          "f.yaml:3: unknown section zzz; sections are run, device, model, data, train, optimizer, schedule, eval, "
          "checkpoint, log and parallel");
    CHECK(refusal(replaced("learning_rate:", "\"\\e[31m\":")).find("\\x1b[31m") != std::string::npos);  // not raw
}

TEST_CASE("config: what is not built yet is refused by name, never ignored") {
    for (const char* key : {"run.spike_factor", "run.replica_check_interval", "checkpoint.async", "checkpoint.on_error",
                            "parallel.schedule"}) {
        const std::string override = std::string(key) + "=1";
        CHECK(refusal(kSmall, {override}) == "--set " + override + ": " + key + " is not available in this build");
    }
    CHECK(refusal(with("checkpoint: {async: false}")) == "f.yaml:17: checkpoint.async is not available in this build");
    CHECK(
        refusal(kSmall, {"run.on_bad_step=rewind"}).ends_with("not available in this build; available: skip or stop"));
    CHECK(refusal(kSmall, {"parallel.method=gossip"}).ends_with("expected allreduce, parameter_server or diloco"));
}

TEST_CASE("config: wrong types (row 2)") {
    const auto micro = [](const char* v) {
        return refusal(replaced("micro_batch_size: 8", std::string("micro_batch_size: ") + v));
    };
    const std::string expected = "expected an integer from 1 to 16777216";
    CHECK(micro("\"8x\"") == "f.yaml:14: train.micro_batch_size = \"8x\" is not an integer; " + expected);
    CHECK(micro("8x") == "f.yaml:14: train.micro_batch_size = 8x is not an integer; " + expected);
    CHECK(micro("\"8\"") == "f.yaml:14: train.micro_batch_size = \"8\" is not an integer; " + expected);
    for (const char* v : {"8.0", "1e1", "+8", "0x8", "8_0", "true", "8 8", "eight"})
        CHECK(micro(v) == std::string("f.yaml:14: train.micro_batch_size = ") + v + " is not an integer; " + expected);
    CHECK(micro("[8]") == "f.yaml:14: train.micro_batch_size = a list is not a number; " + expected);
    CHECK(micro("") == "f.yaml:14: train.micro_batch_size = nothing has no value; " + expected);
    CHECK(micro("~") == "f.yaml:14: train.micro_batch_size = nothing has no value; " + expected);
    for (const char* v : {"yes", "1", "True", "\"true\"", "[]"})
        CHECK(refusal(kSmall, {std::string("model.bias=") + v}).find(" is not true or false") != std::string::npos);
    CHECK(refusal(replaced("[a*.bin, b.bin]", "a*.bin")) ==
          "f.yaml:10: data.train = a*.bin is not a list; expected a list of file patterns, as in [\"a*.bin\", "
          "\"b.bin\"]");
    CHECK(refusal(replaced("[a*.bin, b.bin]", "[[a]]")).find("data.train = a list is not text") != std::string::npos);
    CHECK(refusal(replaced("[a*.bin, b.bin]", "[]")).find("data.train = a list is empty") != std::string::npos);
    CHECK(refusal(replaced("[a*.bin, b.bin]", "[a, '']")).find("data.train = \"\" is an empty path") !=
          std::string::npos);
    CHECK(refusal(replaced("name: tiny", "name: {a: 1}")).starts_with("f.yaml:2: run.name = a mapping is not text"));
    CHECK(refusal("run: 5") == "f.yaml:1: section run is 5; expected keys with values");
    CHECK(refusal("- run") == "f.yaml:1: holds a list; expected sections (run:, model:, ...) with keys");
    CHECK(refusal(kSmall, {"schedule.name=cosin"}) ==
          "--set schedule.name=cosin: schedule.name = cosin is unknown; expected constant, cosine, linear or wsd; did "
          "you mean cosine?");
    CHECK(
        refusal(kSmall, {"device.attention=sm80"}) ==
        "--set device.attention=sm80: device.attention = sm80 is unknown; expected auto, portable, sm90 or cudnn; did "
        "you mean sm90?");
    CHECK(refusal(kSmall, {"device.threads=all"}).ends_with("expected an integer from 1 to 4096, or auto"));
    CHECK(refusal(kSmall, {"schedule.decay_steps=0"})
              .ends_with("is out of range; expected an integer from 1 to 1000000000, or all"));
    CHECK(refusal(kSmall, {"eval.tokens=none"}).ends_with("expected an integer from 1 to 1000000000000000, or all"));
    CHECK(refusal(with("eval:")) == "");  // a section whose keys are commented out
}

TEST_CASE("config: values out of range (row 3)") {
    const auto lr = [](const char* v) { return refusal(replaced("0.0003", v)); };
    const std::string at = "f.yaml:16: optimizer.learning_rate = ",
                      range = "expected a number above 0 and at most 1000";
    for (const char* v : {"-1", "0", "-0.0", "1001", "nan", "inf", "-inf", "1e999", "NaN"})
        CHECK(lr(v) == at + v + " is out of range; " + range);
    for (const char* v : {".nan", ".inf", "1e", "1,5", "--1", ""}) CHECK(lr(v).ends_with(range));
    for (const char* o :
         {"model.dropout=1.5", "model.dropout=1", "model.dropout=-0.1", "optimizer.beta1=1", "train.grad_clip=-1",
          "train.max_steps=0", "train.max_steps=99999999999999999999", "model.n_layer=-1", "run.seed=-1",
          "run.seed=9007199254740992", "checkpoint.keep=0", "log.interval=0", "optimizer.eps=0",
          "model.context_length=2147483648", "optimizer.weight_decay=nan", "run.max_minutes=-1"}) {
        const std::string m = refusal(kSmall, {o});
        const bool named =
            m.find(" is out of range; expected ") != m.npos || m.find("is not an integer; expected ") != m.npos;
        CHECK_MESSAGE(named, m);
    }
    CHECK(parse_config(kSmall, "f.yaml", {"model.dropout=-0"}).model.dropout == 0);
    CHECK(!std::signbit(parse_config(kSmall, "f.yaml", {"model.dropout=-0"}).model.dropout));
    for (const char* v : {".", "..", "a/b", "/", "\"\"", "\"a\\0b\"", "\"a\\nb\""})
        CHECK_MESSAGE(refusal(kSmall, {std::string("run.name=") + v})
                          .ends_with("expected one path component without /, not . or .."),
                      v);
    CHECK(refusal(kSmall, {"run.name=" + std::string(256, 'a')}).find("is not a name") != std::string::npos);
    CHECK(refusal(kSmall, {"data.tokenizer=\"a\\0b\""}).ends_with("holds a control character; expected a path"));
}

TEST_CASE("config: checks across keys show their arithmetic (row 6)") {
    const auto set = [](std::vector<std::string> o) { return refusal(kSmall, o); };
    CHECK(refusal(replaced("global_batch_size: 32", "global_batch_size: 30")) ==
          "f.yaml:13: train.global_batch_size = 30 is not divisible by train.micro_batch_size = 8; use "
          "train.global_batch_size = 24 or 32");
    CHECK(refusal(replaced("global_batch_size: 32", "global_batch_size: 4")) ==
          "f.yaml:13: train.global_batch_size = 4 is not divisible by train.micro_batch_size = 8; use "
          "train.global_batch_size = 8");
    CHECK(refusal(replaced("n_head: 4", "n_head: 3")) ==
          "f.yaml:6: model.n_embd = 64 is not divisible by model.n_head = 3; use model.n_embd = 63 or 66");
    CHECK(set({"train.max_epochs=2"}) ==
          "--set train.max_epochs=2: train.max_epochs = 2 and train.max_steps = 100 are both given; give one of them");
    CHECK(set({"schedule.min_learning_rate=0.1"})
              .ends_with("schedule.min_learning_rate = 0.1 is above optimizer.learning_rate = 0.0003"));
    CHECK(set({"schedule.name=cosine", "schedule.warmup_steps=100"}) ==
          "--set schedule.warmup_steps=100: schedule.warmup_steps = 100 leaves no step of train.max_steps = 100 to "
          "decay in");
    CHECK(set({"schedule.name=cosine", "schedule.warmup_steps=99"}) == "");
    CHECK(set({"schedule.name=linear", "schedule.warmup_steps=20", "schedule.decay_steps=20"})
              .ends_with(
                  "schedule.decay_steps = 20 is not after schedule.warmup_steps = 20; both count from the first step"));
    CHECK(set({"schedule.name=wsd", "schedule.warmup_steps=60", "schedule.decay_steps=41"})
              .ends_with(
                  "schedule.warmup_steps + schedule.decay_steps = 60 + 41 = 101 is more than train.max_steps = 100"));
    CHECK(set({"schedule.name=wsd", "schedule.warmup_steps=81"}).find("= 81 + 20 = 101 is more") != std::string::npos);
    CHECK(set({"schedule.name=wsd", "schedule.warmup_steps=80"}) == "");
    CHECK(set({"schedule.warmup_steps=1000"}) == "");  // constant: never reaches the full rate, as asked
    CHECK(set({"eval.interval=10"}) ==
          "--set eval.interval=10: eval.interval = 10 needs data.val; give it or set eval.interval: 0");
    CHECK(set({"eval.sample_prompts=[a]"})
              .ends_with("eval.sample_prompts needs data.tokenizer: the file that turns text into tokens"));
    CHECK(set({"model.context_length=1048576", "train.micro_batch_size=4096", "train.global_batch_size=4096"})
              .ends_with("train.micro_batch_size = 4096 * model.context_length = 1048576 is 4294967296 tokens; "
                         "expected at most 2147483647"));
}

TEST_CASE("config: what could not be written and read back is refused") {
    const auto prompts = [](size_t n, const std::string& text) {
        std::string list = "eval.sample_prompts=[";
        for (size_t i = 0; i < n; i++) list += yaml_quoted(text) + (i % 50 == 49 ? ",\n" : ",");
        return list + "]";
    };
    const std::vector<std::string> tokenizer = {"data.tokenizer=t"};
    const Config c = parse_config(kSmall, "f.yaml", {tokenizer[0], prompts(2000, "text, [with] {marks}")});
    CHECK(parse_config(to_yaml(c), "g.yaml", {}).eval.sample_prompts.size() == 2000);
    const std::string both =
        refusal(kSmall, {tokenizer[0], prompts(3000, "t"), "data.val" + prompts(8000, "v").substr(19)});
    CHECK(both.starts_with("f.yaml: too large to be written as one file: config.yaml:"));
    CHECK(both.ends_with(": more than 10000 values"));
    CHECK(refusal(kSmall, {tokenizer[0], "eval.sample_prompts: [a]"}).ends_with("expected section.key=value"));
    CHECK(refusal(with("eval:\n  sample_prompts:\n    - |\n" + std::string(6, ' ') + std::string(9000, 'a') + "\n" +
                       std::string(6, ' ') + std::string(9000, 'a')),
                  tokenizer)
              .ends_with("a line of more than 16384 bytes"));
}

TEST_CASE("config: what is required is named at once") {
    CHECK(refusal("run: {name: a}") ==
          "f.yaml: model.n_layer, model.n_head, model.n_embd, model.context_length, model.vocab_size, data.train, "
          "train.global_batch_size, train.micro_batch_size, optimizer.learning_rate and train.max_steps (or "
          "train.max_epochs) "
          "are required but not given");
    CHECK(refusal(replaced("  name: tiny\n", "")) == "f.yaml: run.name is required but not given");
    CHECK(refusal(replaced("  name: tiny\n", ""), {"run.name=x"}) == "");
    CHECK(refusal(replaced("max_steps: 100", "max_epochs: 0.5")) == "");
}

TEST_CASE("config: files that cannot be read (row 5)") {
    const Scratch dir;
    const auto load = [&](const std::string& path) {
        const std::string m = refusal_of([&] { load_config(path, {}); });
        return m.starts_with(path + ": ") ? m.substr(path.size() + 2) : m;
    };
    CHECK(load(dir.write("ok.yaml", kSmall)) == "");
    CHECK(load(dir.path("none.yaml")) == "cannot open: No such file or directory");
    CHECK(load(dir.path("")) == "is a directory; expected a regular file");
    CHECK(load(dir.write("big.yaml", std::string(1 << 20, '#'))) == "1048576 bytes; expected at most 262144");
    CHECK(load(dir.write("empty.yaml", "")) == "is empty");
    const std::string secret = dir.write("secret.yaml", kSmall);
    CHECK(::chmod(secret.c_str(), 0) == 0);
    CHECK(load(secret) == (::geteuid() == 0 ? "" : "cannot open: Permission denied"));  // root may read anything
}
