// The one table of config keys: parsing, overrides, to_yaml, comparison and messages all read it.
#pragma once
#include <limits>
#include <string>
#include <variant>
#include <vector>

#include "common/config.h"

using Member = std::variant<std::string*, bool*, int*, int64_t*, uint64_t*, double*, std::vector<std::string>*>;
enum class Form { any, path, component };  // of text: anything, without control characters, also one path component

struct Key {
    const char* name;                     // "section.key"
    Member (*member)(Config&) = nullptr;  // null: known, but not available in this build
    bool required = false;
    bool may_change = false;  // on resume

    double low = -std::numeric_limits<double>::infinity(), high = std::numeric_limits<double>::infinity();  // numbers
    bool exclusive_low = false;
    const char* zero_word = "";                        // what 0 is called in the file: "auto", "all"
    bool one_of_two = false;                           // 0: not given, another key stands for it
    std::vector<std::string> values = {}, later = {};  // text from a list: available, and known but not in this build
    Form form = Form::path;

    std::string section() const { return std::string(name).substr(0, std::string(name).find('.')); }
    std::string key() const { return std::string(name).substr(std::string(name).find('.') + 1); }
};

const std::vector<Key>& config_keys();
std::vector<std::string> section_names();    // in the table's order
std::string allowed_values(const Key& key);  // "an integer from 1 to 4096, or auto"
