// Token shards on disk: llm.c's layout (256 int32 header [20240520, 1, count, 0...] then uint16 tokens), its uint32
// variant [20240801, 7, count], and headerless uint16 (nanoGPT) by explicit choice.  Read through a bounds-checked map.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "common/config_words.h"
#include "common/file.h"
#include "common/log.h"

class Shard {
  public:
    Shard(const fs::path& path, ShardFormat format);  // Error(Exit::data) names what is wrong with the file
    uint64_t count() const { return count_; }         // tokens
    const fs::path& path() const { return file_.path(); }
    // Tokens [first, first + out.size()) as i32; a token outside [0, vocab_size) is Error(Exit::data) with its
    // position.  Safe from several threads.
    void read(uint64_t first, std::span<int32_t> out, int vocab_size) const;
    // Cheap identity of the content: size, header and evenly spaced samples (not every byte).
    uint64_t fingerprint() const;

  private:
    MappedFile file_;
    uint64_t count_ = 0;
    size_t header_bytes_ = 0, token_bytes_ = 2;
};

// All shards that the patterns match, as one stream of sequences of T tokens plus one (the target of the last).
// Sequences never cross shards: n tokens give floor((n-1)/T).  Order: patterns as given, paths of each sorted bytewise.
// Error(Exit::data): a pattern that matches nothing, a bad shard, no sequence at all.  A shard too short for one is a
// warning that names it.  `key` ("data.train") stands in messages.
class TokenStream {
  public:
    TokenStream(const std::string& key, const std::vector<std::string>& patterns, ShardFormat format,
                int context_length, int vocab_size, Log& log);
    uint64_t n_sequences() const { return n_sequences_; }
    uint64_t n_tokens() const;  // of all shards, those too short for a sequence included
    // Sequence i: inputs[t] = token t, targets[t] = token t+1.  Both of context_length.  Safe from several threads.
    void read(uint64_t i, std::span<int32_t> inputs, std::span<int32_t> targets) const;

    struct Part {          // identifies a shard in the checkpoint, so that a resume notices other data
        std::string file;  // name without folders: data may move between machines
        uint64_t tokens, fingerprint;
    };
    std::vector<Part> parts() const;
    uint64_t fingerprint() const;  // of all parts, names included

  private:
    std::vector<Shard> shards_;
    std::vector<uint64_t> first_sequence_;  // of each shard, and the total
    uint64_t n_sequences_ = 0;
    int context_length_, vocab_size_;
};
