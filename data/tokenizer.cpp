#include "data/tokenizer.h"

#include "common/json.h"
#include "common/text.h"

Tokenizer Tokenizer::load(const fs::path& file) {
    const std::string name = file.string();
    const auto refuse = [&](const std::string& what) { fail(Exit::data, "{}: {}", name, what); };
    const nlohmann::json j = parse_json(read_text(file, 1 << 20, Exit::data), name, Exit::data);
    const auto shown = [&](const char* key) { return j.contains(key) ? excerpt(j[key].dump()) : "missing"; };
    if (!j.is_object()) refuse("expected an object {\"type\": \"bytes\", \"vocab_size\": 257, \"end_of_text\": 256}");
    if (!j.contains("type") || j["type"] != "bytes")
        refuse(fmt::format("type is {}; available in this build: \"bytes\"", shown("type")));
    const auto integer = [&](const char* key, int64_t low, int64_t high) {
        const bool fits = j.contains(key) && j[key].is_number_integer() && j[key] >= low && j[key] <= high;
        if (!fits) refuse(fmt::format("{} is {}; expected an integer in [{}, {}]", key, shown(key), low, high));
        return j[key].get<int>();
    };
    Tokenizer t;
    t.vocab_size_ = integer("vocab_size", 256, INT32_MAX);
    if (j.contains("end_of_text") && j["end_of_text"].is_null()) return t;  // said to have none
    if (t.vocab_size_ == 256)
        refuse(fmt::format("end_of_text is {}; expected null, as a vocab_size of 256 has only the bytes",
                           shown("end_of_text")));
    t.end_of_text_ = integer("end_of_text", 256, t.vocab_size_ - 1);
    return t;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
    std::vector<int32_t> tokens;
    tokens.reserve(text.size());
    for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
    return tokens;
}

std::string Tokenizer::decode(const std::vector<int32_t>& tokens) const {
    std::string text;
    for (const int32_t t : tokens)
        if (t >= 0 && t < 256) text += char(t);
    return text;
}
