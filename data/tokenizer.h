// Text <-> tokens for generate and samples, described by a tokenizer.json that the data prep script writes beside the
// shards.  Other keys are not read.  "end_of_text": null says that there is none.
//   bytes   {"type": "bytes", "vocab_size": 257, "end_of_text": 256}      0..255, and end-of-text
//   chars   {"type": "chars", "vocab_size": 65, "end_of_text": null, "characters": "\n !..."}      the place in that
//           list
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "common/file.h"

class Tokenizer {
  public:
    static Tokenizer load(const fs::path& file);  // Error(Exit::data)
    int vocab_size() const { return vocab_size_; }
    int end_of_text() const { return end_of_text_; }               // -1: none
    std::vector<int32_t> encode(std::string_view text) const;      // Error(Exit::usage): a character that is no token
    std::string decode(const std::vector<int32_t>& tokens) const;  // end-of-text and unknown ids become nothing

  private:
    int vocab_size_ = 0, end_of_text_ = -1;
    std::string characters_;  // token -> byte; empty: the token is the byte
};
