// Checkpoints: a directory step_N that is complete and verified, or not there at all.
//
//   model.safetensors, config.json    weights in Hugging Face GPT-2 names and layout
//   optimizer.safetensors             moments: m.<name>, v.<name>
//   state.json                        step, tokens seen, updates, position in the data, what the data was, the config
//   manifest.json                     format version, size and XXH3 of each file, XXH3 of itself; written last
//
// Saving: all into step_N.tmp-<nonce>, every write and fsync checked; manifest; fsync of the directory; rename; fsync
// of the parent; only then are older ones pruned and `latest` moved.  Loading never trusts `latest`.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/file.h"
#include "common/log.h"
#include "model/gpt2.h"
#include "model/trainer.h"

struct DataPart {  // a shard as it was: name without folders, tokens, fingerprint
    std::string file;
    uint64_t tokens = 0, fingerprint = 0;
    bool operator==(const DataPart&) const = default;
};

struct RunState {
    int64_t step = 0;        // global batches taken
    uint64_t tokens = 0;     // cumulative
    uint64_t updates = 0;    // optimizer updates: step minus the skipped ones
    uint64_t sequences = 0;  // position in the endless stream of sequences
    std::string config;      // config.yaml as resolved
    std::vector<DataPart> train, val;
};

// Saves under root/step_N and keeps the newest `keep` good ones.  Rank 0 only.  `before_rename` runs when all is on
// disk but the name: the place to make the logs durable.
void save_checkpoint(const fs::path& root, const Backend& k, Trainer& trainer, const RunState& state, int keep,
                     const std::function<void()>& before_rename);

// The newest directory whose manifest verifies, or none; damaged ones that are newer are named in the log.
// Error(Exit::checkpoint) when there are some but none is valid, or when the newest was written by a newer format: then
// nothing is changed, and asking again gives the same answer.  `tidy` is for the run that holds the directory's lock:
// damaged ones are renamed to step_N.damaged-<nonce>, as step_N will be saved again, and leftovers of interrupted saves
// are removed.  Others only look.
std::optional<fs::path> find_checkpoint(const fs::path& root, Log& log, bool tidy);

RunState read_state(const fs::path& checkpoint);
void load_weights(const fs::path& directory, const Backend& k, Trainer& trainer);    // model.safetensors
void load_optimizer(const fs::path& directory, const Backend& k, Trainer& trainer);  // optimizer.safetensors
// The shape that a directory's config.json describes (kiln's or Hugging Face's).
GPT2Config read_model_config(const fs::path& directory);
