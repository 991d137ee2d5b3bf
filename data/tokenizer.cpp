#include "data/tokenizer.h"

#include "common/json.h"
#include "common/text.h"

#include <algorithm>
#include <functional>

Tokenizer Tokenizer::load(const fs::path& file) {
    const std::string name = file.string();
    const auto refuse = [&](const std::string& what) { fail(Exit::data, "{}: {}", name, what); };
    const nlohmann::json j = parse_json(read_text(file, 1 << 20, Exit::data), name, Exit::data);
    const auto shown = [&](const char* key) { return j.contains(key) ? excerpt(j[key].dump()) : "missing"; };
    if (!j.is_object()) refuse("expected an object {\"type\": \"bytes\", \"vocab_size\": 257, \"end_of_text\": 256}");
    const bool chars = j.contains("type") && j["type"] == "chars";
    if (!chars && (!j.contains("type") || j["type"] != "bytes"))
        refuse(fmt::format("type is {}; available in this build: \"bytes\", \"chars\"", shown("type")));
    const auto integer = [&](const char* key, int64_t low, int64_t high) {
        const bool fits = j.contains(key) && j[key].is_number_integer() && j[key] >= low && j[key] <= high;
        if (!fits) refuse(fmt::format("{} is {}; expected an integer in [{}, {}]", key, shown(key), low, high));
        return j[key].get<int>();
    };
    Tokenizer t;
    if (chars) {
        t.vocab_size_ = integer("vocab_size", 1, 128);
        if (j.contains("characters") && j["characters"].is_string()) t.characters_ = j["characters"].get<std::string>();
        const std::string& c = t.characters_;
        const bool ascending = std::ranges::adjacent_find(c, std::greater_equal{}) == c.end();
        if (c.size() != size_t(t.vocab_size_) || !ascending || c.front() < 0)
            refuse(
                fmt::format("characters is {}; expected vocab_size = {} different ASCII characters in ascending order",
                            shown("characters"), t.vocab_size_));
        if (!j.contains("end_of_text") || !j["end_of_text"].is_null())
            refuse(fmt::format("end_of_text is {}; expected null, as chars have none", shown("end_of_text")));
        return t;
    }
    t.vocab_size_ = integer("vocab_size", 256, INT32_MAX);
    if (j.contains("end_of_text") && j["end_of_text"].is_null()) return t;  // the file says that there is none
    if (t.vocab_size_ == 256)
        refuse(fmt::format("end_of_text is {}; expected null, as a vocab_size of 256 has only the bytes",
                           shown("end_of_text")));
    t.end_of_text_ = integer("end_of_text", 256, t.vocab_size_ - 1);
    return t;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
    std::vector<int32_t> tokens;
    tokens.reserve(text.size());
    for (const char c : text) {
        const size_t place = characters_.empty() ? static_cast<unsigned char>(c) : characters_.find(c);
        if (place == std::string::npos)
            fail(Exit::usage, "the text \"{}\" holds a character that the data did not; the tokens are \"{}\"",
                 excerpt(text), excerpt(characters_, 200));
        tokens.push_back(int32_t(place));
    }
    return tokens;
}

std::string Tokenizer::decode(const std::vector<int32_t>& tokens) const {
    std::string text;
    const int32_t n = characters_.empty() ? 256 : vocab_size_;
    for (const int32_t t : tokens)
        if (t >= 0 && t < n) text += characters_.empty() ? char(t) : characters_[size_t(t)];
    return text;
}
