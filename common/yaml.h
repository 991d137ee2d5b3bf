// The strict part of YAML that a config needs: mappings, lists and scalars, each with its line.  Refused as Error(code)
// that names file and line: anchors, aliases, tags, merge keys, several documents, duplicate keys, keys that are not
// scalars, more than 16 levels, 10,000 values, 10,000 brackets and commas, 16 KiB in a line or 256 KiB, tabs in the
// indentation, a byte-order mark, bytes that are not text.  CRLF line ends are read like LF.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "common/error.h"

struct YamlNode {
    enum class Kind { null, scalar, list, mapping };
    Kind kind = Kind::null;
    std::string key;              // its key, in a mapping
    int line = 1;                 // of the key in a mapping, else of the value
    std::string text;             // scalar
    bool quoted = false;          // scalar in quotes or in block style: text, whatever it looks like
    std::vector<YamlNode> items;  // list, mapping
};

constexpr size_t kMaxYamlBytes = 1 << 18;  // so that the worst input costs about 0.1 s and 20 MiB

// `name` stands for the file in messages; with has_lines false (an override, say) they leave the line out.
YamlNode parse_yaml(std::string_view text, const std::string& name, Exit code, bool has_lines = true);

// "file:line", or "file" when the line is not positive.
std::string place(const std::string& name, int line);
// A scalar in double quotes that parse_yaml reads back to the same bytes.
std::string yaml_quoted(std::string_view text);
