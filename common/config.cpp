#include "common/config.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <variant>

#include "common/config_keys.h"
#include "common/file.h"
#include "common/text.h"
#include "common/yaml.h"

namespace {
using Kind = YamlNode::Kind;

// Where a value was set, for messages: "file:line" or "--set key=value".
using Places = std::map<std::string, std::string>;

std::string shown(const YamlNode& v) {
    switch (v.kind) {
        case Kind::null:
            return "nothing";
        case Kind::scalar:
            return v.quoted ? '"' + excerpt(v.text) + '"' : excerpt(v.text);
        case Kind::list:
            return "a list";
        case Kind::mapping:
            return "a mapping";
    }
    return "";
}

[[noreturn]] void refuse_value(const std::string& at, const Key& key, const YamlNode& v, const std::string& why) {
    fail(Exit::usage, "{}: {} = {} {}", at, key.name, shown(v), why);
}

// Reads the whole of a plain scalar as a T; refuses any other value, and says what is expected.
template <class T>
T number(const std::string& at, const Key& key, const YamlNode& v) {
    const std::string expected = allowed_values(key);
    if (v.kind != Kind::scalar) refuse_value(at, key, v, "is not a number; expected " + expected);
    T value{};
    const char* end = v.text.data() + v.text.size();
    const auto [stop, error] = std::from_chars(v.text.data(), end, value);
    if (v.quoted || stop != end || error == std::errc::invalid_argument) {
        const bool is_whole = std::is_integral_v<T>;
        refuse_value(at, key, v, fmt::format("is not {}; expected {}", is_whole ? "an integer" : "a number", expected));
    }
    const double d = double(value);
    const Key::Range& range = key.range;
    if (error != std::errc() || !std::isfinite(d) || d < range.low || d > range.high ||
        (range.exclusive_low && d == range.low))
        refuse_value(at, key, v, "is out of range; expected " + expected);
    return value;
}

bool boolean(const std::string& at, const Key& key, const YamlNode& v) {
    const bool known = v.kind == Kind::scalar && !v.quoted && (v.text == "true" || v.text == "false");
    if (!known) refuse_value(at, key, v, "is not true or false");
    return v.text == "true";
}

const std::string& scalar(const std::string& at, const Key& key, const YamlNode& v) {
    if (v.kind != Kind::scalar) refuse_value(at, key, v, "is not text; expected " + allowed_values(key));
    return v.text;
}

// The place of a word among words_of(key).
size_t word(const std::string& at, const Key& key, const YamlNode& v) {
    const std::string& s = scalar(at, key, v);
    const std::vector<std::string> words = words_of(key);
    if (const auto found = std::ranges::find(words, s); found != words.end()) return size_t(found - words.begin());
    if (contains(key.later, s))
        refuse_value(at, key, v, "is not available in this build; available: " + allowed_values(key));
    const std::string near = nearest(s, words);
    refuse_value(at, key, v,
                 "is unknown; expected " + allowed_values(key) + (near.empty() ? "" : "; did you mean " + near + "?"));
}

std::string text(const std::string& at, const Key& key, const YamlNode& v) {
    if (!key.values.empty()) return key.values[word(at, key, v)];
    const std::string& s = scalar(at, key, v);
    const auto is_control = [](char c) { return (c >= 0 && c < ' ') || c == 0x7f; };
    if (key.form != Form::any && std::any_of(s.begin(), s.end(), is_control))
        refuse_value(at, key, v, "holds a control character; expected " + allowed_values(key));
    if (key.form == Form::component && (s.empty() || s == "." || s == ".." || s.size() > 255 || s.find('/') != s.npos))
        refuse_value(at, key, v, "is not a name; expected " + allowed_values(key));
    return s;
}

std::vector<std::string> texts(const std::string& at, const Key& key, const YamlNode& v) {
    if (v.kind != Kind::list) refuse_value(at, key, v, "is not a list; expected " + allowed_values(key));
    std::vector<std::string> list;
    for (const YamlNode& item : v.items) {
        list.push_back(text(at, key, item));
        if (list.back().empty() && key.form != Form::any) refuse_value(at, key, item, "is an empty path");
    }
    if (list.empty() && key.required) refuse_value(at, key, v, "is empty; expected " + allowed_values(key));
    return list;
}

void set(Config& c, const std::string& at, const Key& key, const YamlNode& v) {
    if (!key.member) fail(Exit::usage, "{}: {} is not available in this build", at, key.name);
    if (v.kind == Kind::null) refuse_value(at, key, v, "has no value; expected " + allowed_values(key));
    const bool is_word = *key.zero_word && v.kind == Kind::scalar && !v.quoted && v.text == key.zero_word;
    std::visit(
        [&](auto member) {
            using T = std::remove_reference_t<decltype(*member)>;
            if constexpr (std::is_same_v<decltype(member), WordMember>)
                *member = uint8_t(word(at, key, v));
            else if constexpr (std::is_same_v<T, bool>)
                *member = boolean(at, key, v);
            else if constexpr (std::is_arithmetic_v<T>)
                *member = is_word ? T(0) : T(number<T>(at, key, v) + T(0));  // + 0: -0.0 becomes 0.0
            else if constexpr (std::is_same_v<T, std::string>)
                *member = text(at, key, v);
            else
                *member = texts(at, key, v);
        },
        key.member(c));
}

[[noreturn]] void refuse_section(const std::string& at, const std::string& section) {
    const std::vector<std::string> known = section_names();
    const std::string near = nearest(section, known);
    fail(Exit::usage, "{}: unknown section {}; {}", at, excerpt(section),
         near.empty() ? "sections are " + joined(known, "and") : "did you mean " + near + "?");
}

// The row of section.name; a name that is not in the table is refused with the likeliest one that is.
const Key& find_key(const std::string& at, const std::string& section, const std::string& name) {
    std::vector<std::string> names;
    std::string elsewhere;
    for (const Key& key : config_keys()) {
        if (key.section() == section && key.key() == name) return key;
        if (key.section() == section) names.push_back(key.key());
        if (key.key() == name) elsewhere = key.name;
    }
    if (names.empty()) refuse_section(at, section);
    const std::string near = nearest(name, names);
    const std::string hint = !near.empty()       ? "did you mean " + near + "?"
                             : elsewhere.empty() ? section + " has " + joined(names, "and")
                                                 : "did you mean " + elsewhere + "?";
    fail(Exit::usage, "{}: unknown key {}.{}; {}", at, section, excerpt(name), hint);
}

void read_file(Config& c, Places& places, const std::string& yaml, const std::string& name) {
    const YamlNode root = parse_yaml(yaml, name, Exit::usage);
    if (root.kind != Kind::mapping)
        fail(Exit::usage, "{}: holds {}; expected sections (run:, model:, ...) with keys", place(name, root.line),
             shown(root));
    for (const YamlNode& section : root.items) {
        const std::string at = place(name, section.line);
        if (!contains(section_names(), section.key)) refuse_section(at, section.key);
        if (section.kind == Kind::null) continue;  // a section whose keys are all commented out
        if (section.kind != Kind::mapping)
            fail(Exit::usage, "{}: section {} is {}; expected keys with values", at, section.key, shown(section));
        for (const YamlNode& v : section.items) {
            const std::string here = place(name, v.line);
            const Key& key = find_key(here, section.key, v.key);
            set(c, here, key, v);
            places[key.name] = here;
        }
    }
}

void apply_override(Config& c, Places& places, const std::string& text) {
    const std::string at = "--set " + excerpt(text, 120);
    const size_t equals = text.find('='), dot = text.find('.');
    if (equals == text.npos || dot > equals) fail(Exit::usage, "{}: expected section.key=value", at);
    const Key& key = find_key(at, text.substr(0, dot), text.substr(dot + 1, equals - dot - 1));
    if (equals + 1 == text.size())
        fail(Exit::usage, "{}: {} has no value; for empty text write {}=\"\"", at, key.name, key.name);
    set(c, at, key, parse_yaml(text.substr(equals + 1), at, Exit::usage, false));
    places[key.name] = at;
}

// The checks that concern several keys.  `at` tells where a key was set.
class Checks {
  public:
    Checks(const Config& c, const Places& places, const std::string& name) : c_(c), places_(places), name_(name) {}
    void all() const {
        required();
        length();
        schedule();
        divisible("model.n_embd", c_.model.n_embd, "model.n_head", c_.model.n_head);
        divisible("train.global_batch_size", c_.train.global_batch_size, "train.micro_batch_size",
                  c_.train.micro_batch_size);
        const int64_t BT = int64_t(c_.train.micro_batch_size) * c_.model.context_length;
        if (BT > std::numeric_limits<int>::max())
            refuse("train.micro_batch_size",
                   "train.micro_batch_size = {} * model.context_length = {} is {} tokens; expected at most {}",
                   c_.train.micro_batch_size, c_.model.context_length, BT, std::numeric_limits<int>::max());
        if (c_.eval.interval > 0 && c_.data.val.empty())
            refuse("eval.interval", "eval.interval = {} needs data.val; give it or set eval.interval: 0",
                   c_.eval.interval);
        if (!c_.eval.sample_prompts.empty() && c_.data.tokenizer.empty())
            refuse("eval.sample_prompts",
                   "eval.sample_prompts needs data.tokenizer: the file that turns text into tokens");
    }

  private:
    template <class... A>
    [[noreturn]] void refuse(const char* key, fmt::format_string<A...> f, A&&... a) const {
        const auto at = places_.find(key);
        fail(Exit::usage, "{}: {}", at == places_.end() ? name_ : at->second, fmt::format(f, std::forward<A>(a)...));
    }
    bool given(const char* key) const { return places_.contains(key); }

    void required() const {
        std::vector<std::string> missing;
        for (const Key& key : config_keys())
            if (key.required && !given(key.name)) missing.push_back(key.name);
        if (!given("train.max_steps") && !given("train.max_epochs"))
            missing.push_back("train.max_steps (or train.max_epochs)");
        if (!missing.empty())
            fail(Exit::usage, "{}: {} {} required but not given", name_, joined(missing, "and"),
                 missing.size() > 1 ? "are" : "is");
    }
    void length() const {
        if (given("train.max_steps") && given("train.max_epochs"))
            refuse("train.max_epochs",
                   "train.max_epochs = {} and train.max_steps = {} are both given; give one of them",
                   c_.train.max_epochs, c_.train.max_steps);
    }
    void divisible(const char* key, int value, const char* by_key, int by) const {
        if (value % by == 0) return;
        const int64_t below = int64_t(value) / by * by, above = below + by;
        const std::string use = below > 0 ? fmt::format("{} or {}", below, above) : fmt::format("{}", above);
        refuse(key, "{} = {} is not divisible by {} = {}; use {} = {}", key, value, by_key, by, key, use);
    }
    void schedule() const {
        const Config::Schedule& s = c_.schedule;
        const int64_t steps = c_.train.max_steps;  // 0: max_epochs is given, and the steps are known only with the data
        if (s.min_learning_rate > c_.optimizer.learning_rate)
            refuse("schedule.min_learning_rate",
                   "schedule.min_learning_rate = {} is above optimizer.learning_rate = {}", s.min_learning_rate,
                   c_.optimizer.learning_rate);
        switch (s.name) {
            case ScheduleKind::constant:
                return;
            case ScheduleKind::cosine:
            case ScheduleKind::linear:
                return falls_after_warmup(s, steps);
            case ScheduleKind::wsd:
                return fits_after_warmup(s, steps);
        }
    }
    void fits_after_warmup(const Config::Schedule& s, int64_t steps) const {
        const int64_t decay = s.decay_steps > 0 ? s.decay_steps : steps / 5;
        if (steps > 0 && s.warmup_steps + decay > steps)
            refuse("schedule.decay_steps",
                   "schedule.warmup_steps + schedule.decay_steps = {} + {} = {} is more than train.max_steps = {}",
                   s.warmup_steps, decay, s.warmup_steps + decay, steps);
    }
    void falls_after_warmup(const Config::Schedule& s, int64_t steps) const {
        if (s.decay_steps > 0 && s.decay_steps <= s.warmup_steps)
            refuse("schedule.decay_steps",
                   "schedule.decay_steps = {} is not after schedule.warmup_steps = {}; both count from the first step",
                   s.decay_steps, s.warmup_steps);
        if (s.decay_steps == 0 && steps > 0 && s.warmup_steps >= steps)
            refuse("schedule.warmup_steps",
                   "schedule.warmup_steps = {} leaves no step of train.max_steps = {} to decay in", s.warmup_steps,
                   steps);
    }

    const Config& c_;
    const Places& places_;
    const std::string& name_;
};

// Overrides and escapes may make the resolved config larger than a resume could read: then the run does not start.
void check_reads_back(const Config& c, const std::string& name) {
    try {
        parse_yaml(to_yaml(c), "config.yaml", Exit::usage);
    } catch (const Error& e) { fail(Exit::usage, "{}: too large to be written as one file: {}", name, e.what()); }
}

// The key's value as to_yaml writes it; empty: the key is not written.
std::string yaml_value(Config& c, const Key& key) {
    const auto block = [](const std::vector<std::string>& list) {  // an item a line: the reader bounds the line
        std::string items;
        for (const std::string& s : list) items += "\n    - " + yaml_quoted(s);
        return items.empty() ? "[]" : items;
    };
    return std::visit(
        [&](auto member) {
            using T = std::remove_reference_t<decltype(*member)>;
            if constexpr (std::is_same_v<decltype(member), WordMember>) {
                return (*member.words)[*member];
            } else if constexpr (std::is_same_v<T, std::vector<std::string>>) {
                return block(*member);
            } else if constexpr (std::is_same_v<T, std::string>) {
                return key.values.empty() ? yaml_quoted(*member) : *member;
            } else {
                if (key.one_of_two && *member == T(0)) return std::string();
                return *key.zero_word && *member == T(0) ? key.zero_word : fmt::format("{}", *member);
            }
        },
        key.member(c));
}
}  // namespace

Config parse_config(const std::string& text, const std::string& name, const std::vector<std::string>& overrides) {
    Config c;
    Places places;
    read_file(c, places, text, name);
    for (const std::string& o : overrides) apply_override(c, places, o);
    Checks(c, places, name).all();
    check_reads_back(c, name);
    return c;
}

Config load_config(const std::string& path, const std::vector<std::string>& overrides) {
    return parse_config(read_text(path, kMaxYamlBytes, Exit::usage), path, overrides);
}

std::string to_yaml(const Config& config) {
    Config c = config;  // the table's members are not const
    std::string out, section;
    for (const Key& key : config_keys()) {
        if (!key.member) continue;
        const std::string value = yaml_value(c, key);
        if (value.empty()) continue;
        if (key.section() != section) section = key.section(), out += section + ":\n";
        out += fmt::format("  {}:{}{}\n", key.key(), value.starts_with('\n') ? "" : " ", value);
    }
    return out;
}

std::string value_of(const Config& config, const std::string& name) {
    Config c = config;
    for (const Key& key : config_keys())
        if (key.name == name && key.member)
            return std::visit(
                [&](auto member) {
                    if constexpr (std::is_same_v<decltype(member), std::vector<std::string>*>)
                        return fmt::format("[{}]", fmt::join(*member, ", "));
                    else
                        return yaml_value(c, key);
                },
                key.member(c));
    fail(Exit::internal, "value_of: no key {}", name);
}

std::vector<std::string> differing_keys(const Config& a, const Config& b) {
    Config x = a, y = b;  // the table's members are not const
    std::vector<std::string> names;
    for (const Key& key : config_keys()) {
        if (!key.member) continue;
        const auto same = [](auto p, auto q) {
            if constexpr (std::is_same_v<decltype(p), decltype(q)>) return *p == *q;
            return false;
        };
        if (!std::visit(same, key.member(x), key.member(y))) names.push_back(key.name);
    }
    return names;
}

bool may_change_on_resume(const std::string& name) {
    const std::vector<Key>& keys = config_keys();
    return std::any_of(keys.begin(), keys.end(), [&](const Key& k) { return k.name == name && k.may_change; });
}
