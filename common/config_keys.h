// The one table of config keys: parsing, overrides, to_yaml, comparison and messages all read it.
#pragma once
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "common/config.h"

// An enum of common/config_words.h: where the config has it, as the number of its word.
struct WordMember {
    uint8_t* value;
    const std::vector<std::string>* words;
    template <class E, class = std::enable_if_t<std::is_enum_v<E>>>
    WordMember(E* e) : value(reinterpret_cast<uint8_t*>(e)), words(&words_of<E>()) {
        static_assert(sizeof(E) == 1);
    }
    uint8_t& operator*() const { return *value; }
};
using Member =
    std::variant<std::string*, bool*, int*, int64_t*, uint64_t*, double*, std::vector<std::string>*, WordMember>;
enum class Form { any, path, component };  // of text: anything, without control characters, also one path component

struct Key {
    struct Range {
        double low, high;
        bool exclusive_low;  // `low` itself is out of range
    };

    const char* name;                     // "section.key"
    Member (*member)(Config&) = nullptr;  // null: known, but not available in this build
    bool required = false;
    bool may_change = false;  // on resume

    Range range = {};                      // of a number
    const char* zero_word = "";            // what 0 is called in the file: "auto", "all"
    bool one_of_two = false;               // 0: not given, another key stands for it
    std::vector<std::string> values = {};  // text from a list
    std::vector<std::string> later = {};   // words that are known, but not in this build
    Form form = Form::path;
    const char* meaning = "";  // for README.md, with the unit and the words that do not explain themselves

    std::string section() const { return std::string(name).substr(0, std::string(name).find('.')); }
    std::string key() const { return std::string(name).substr(std::string(name).find('.') + 1); }
};

const std::vector<Key>& config_keys();
std::vector<std::string> section_names();           // in the table's order
std::vector<std::string> words_of(const Key& key);  // empty: its value is not a word
std::string allowed_values(const Key& key);         // "an integer from 1 to 4096, or auto"
