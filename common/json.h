// Strict JSON for files that others may have written: tokenizers, manifests, safetensors headers.
#pragma once
#include <nlohmann/json.hpp>

#include <string>
#include <string_view>

#include "common/error.h"

// Exactly one JSON value (RFC 8259) and nothing after it but blanks.  Refused, as Error(code) that names the file and
// the byte: duplicate keys, more than 64 nested arrays and objects, text that is not UTF-8, a BOM, NaN and infinity
// (also 1e999), integers that do not fit 64 bits, NUL bytes, more than max_bytes.  `name` stands for the file in
// messages.
nlohmann::json parse_json(std::string_view text, const std::string& name, Exit code, size_t max_bytes = 100'000'000);

// The text with every byte that is not UTF-8 replaced by U+FFFD: a model of bytes may write any bytes.
std::string as_utf8(const std::string& text);
