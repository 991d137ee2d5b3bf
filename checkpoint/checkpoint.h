// Checkpoints: a directory step_N that is complete and verified, or not there at all.
//
//   model.safetensors, config.json    weights in Hugging Face names and layout
//   optimizer.safetensors             moments: m.<name>, v.<name>; of local SGD more (trainer/local_sgd.h)
//   state.json                        step, tokens seen, updates, position in the data, what the data was, the config,
//                                     the choices made by timing
//   manifest.json                     format version, size and XXH3 of each file, XXH3 of itself; written last
//
// This header says what a directory holds; checkpoint/store.h has the protocol that makes the directory complete.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "checkpoint/snapshot.h"
#include "checkpoint/store.h"
#include "common/file.h"

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
    std::string attention;   // the kernels, as in device.attention; empty: on the CPU
    std::string choices;     // how matrix products are computed, as common/tuning_cache.h has it; empty: on the CPU
    std::vector<DataPart> train, val;
};

// All that a checkpoint is written from.  The snapshots have been taken.
struct RunSnapshot {
    const ModelConfig& model;
    const Snapshot& parameters;
    const Snapshot& moments;
    const RunState& run;
};

// Saves under root/step_N and keeps the newest `keep` good ones.  Rank 0 only.  `before_rename` runs when all is on
// disk but the name: the place to make the logs durable.
void save_checkpoint(const fs::path& root, const RunSnapshot& snapshot, int keep,
                     const std::function<void()>& before_rename);

RunState read_state(const fs::path& checkpoint);
// From model.safetensors into `parameters` (all of the config's), and from optimizer.safetensors into `moments`.
void load_weights(const fs::path& directory, const Backend& k, const ModelConfig& config,
                  const std::vector<StateTensor>& parameters);
// The names of the tensors in optimizer.safetensors.
std::vector<std::string> optimizer_tensors(const fs::path& checkpoint);
void load_optimizer(const fs::path& directory, const Backend& k, const std::vector<StateTensor>& moments);
