#include "common/config_words.h"

#include <sstream>

std::vector<std::string> split_words(const char* names) {
    std::vector<std::string> words;
    std::istringstream in(names);
    for (std::string name; std::getline(in >> std::ws, name, ',');)
        words.push_back(name == "automatic" ? "auto" : name);
    return words;
}
