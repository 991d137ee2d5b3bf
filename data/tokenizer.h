// Text <-> tokens for generate and samples.  Built: bytes (0..255, end-of-text 256), described by a tokenizer.json
// {"type": "bytes", "vocab_size": 257, "end_of_text": 256} that the data prep script writes beside the shards.
// "end_of_text": null says that there is none; other keys are not read.
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
    int end_of_text() const { return end_of_text_; }  // -1: none
    std::vector<int32_t> encode(std::string_view text) const;
    std::string decode(const std::vector<int32_t>& tokens) const;  // end-of-text and unknown ids become nothing

  private:
    int vocab_size_ = 0, end_of_text_ = -1;
};
