// The directory of a run's checkpoints: which are complete and verified, and how one becomes so.
//
// Saving: all into step_N.tmp-<nonce>, every write and fsync checked; manifest; fsync of the directory; rename; fsync
// of the parent; only then are older ones pruned and `latest` moved.  Loading never trusts `latest`.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "common/file.h"
#include "common/log.h"

struct FileRecord {  // one line of the manifest
    std::string name;
    uint64_t n_bytes, hash;
};

// Makes root/step_N: `write_files` fills the temporary directory it is given and says what is in it; `before_rename`
// runs when all is on disk but the name.  Keeps the newest `keep`.  A failure deletes the temporary
// directory and throws.
void store_checkpoint(const fs::path& root, int64_t step, int keep,
                      const std::function<std::vector<FileRecord>(const fs::path&)>& write_files,
                      const std::function<void()>& before_rename);

// The newest directory whose manifest verifies, or none if there are no checkpoints at all.  Damaged ones are named in
// the log.  Error(Exit::checkpoint) when none is valid, or when a newer one is of a newer format.  With `tidy` - the
// run that holds the lock - leftovers of interrupted saves are removed and damaged ones renamed to
// step_N.damaged-<nonce> (only when a valid one was found).
std::optional<fs::path> find_checkpoint(const fs::path& root, Log& log, bool tidy);

// Every file of the manifest is there, with its size and hash; Error(Exit::checkpoint) otherwise, Error(Exit::io) when
// the system refuses to read.  A directory without a manifest (another program's weights) passes.
void verify_checkpoint(const fs::path& directory);
