// Seeded mutations of a valid input, for parser tests: bytes flipped, cut, repeated, and texts that parsers trip over.
#pragma once
#include <algorithm>
#include <random>
#include <string>

class Mutator {
  public:
    explicit Mutator(unsigned seed) : gen_(seed) {}
    // 1 to 4 mutations of `text`; the result is at most twice as long plus a few bytes each time.
    std::string operator()(std::string text) {
        for (size_t n = 1 + below(4); n > 0; n--) once(text);
        return text;
    }
    size_t below(size_t n) { return n == 0 ? 0 : gen_() % n; }

  private:
    void once(std::string& s) {
        // clang-format off
        static const std::string tokens[] = {
            "{", "}", "[", "]", ":", ": ", ",", "\n", "\n  ", "- ", "\"", "'", "\\", "&a ", "*a", "!!x ", "<<: ",
            "---\n", "...\n", "# ", "|\n", ">-\n", "\t", "\r\n", "\xEF\xBB\xBF",
            "\xff", "0", "-1", "1e999", "nan", ".inf", "null", "~",
            "true", "99999999999999999999", "0x10", "1_000", "? ", "%YAML 1.2\n", "@", "`", std::string(1, '\0')};
        // clang-format on
        const size_t at = below(s.size() + 1), len = below(std::min<size_t>(s.size() - at, 24) + 1);
        switch (below(6)) {
            case 0:
                if (at < s.size()) s[at] = char(gen_());
                break;
            case 1:
                if (at < s.size()) s[at] = char(s[at] ^ (1 << below(8)));
                break;
            case 2:
                s.erase(at, len);
                break;
            case 3:
                s.insert(below(s.size() + 1), s.substr(at, len));
                break;
            case 4:
                s.insert(at, tokens[below(std::size(tokens))]);
                break;
            case 5:
                if (below(8) == 0) s.resize(at);
                break;
        }
    }
    std::mt19937_64 gen_;
};
