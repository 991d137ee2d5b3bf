// Files whose failures are seen: checked writes with fsync, read-only maps, directories.  All throw Error.
#pragma once
#include <sys/types.h>

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/error.h"

namespace fs = std::filesystem;

// Read-only map of a regular file.  An empty file maps to no bytes.  Errors carry `code`.
class MappedFile {
  public:
    MappedFile(const fs::path& path, Exit code);
    ~MappedFile();
    MappedFile(MappedFile&& o) noexcept;
    MappedFile& operator=(MappedFile&&) = delete;
    std::span<const std::byte> bytes() const { return {data_, size_}; }
    const fs::path& path() const { return path_; }

    // Copies n bytes at `offset` out of the map.  A file that another process has truncated below that meanwhile is
    // Error(code) that names it (the SIGBUS of this thread is caught).  [offset, offset + n) must lie in bytes().
    void read(size_t offset, void* to, size_t n) const;

  private:
    [[noreturn]] void fail_shrunk(size_t offset) const;
    fs::path path_;
    Exit code_;
    const std::byte* data_ = nullptr;
    size_t size_ = 0;
    dev_t device_ = 0;
    ino_t inode_ = 0;
};

// A new file written front to back.  Every write is checked; close() is only good after fsync.  Without close() the
// destructor leaves an incomplete file, which the caller's protocol must treat as absent.
class OutFile {
  public:
    explicit OutFile(const fs::path& path, bool append = false);
    ~OutFile();
    OutFile(const OutFile&) = delete;
    OutFile& operator=(const OutFile&) = delete;
    void write(const void* data, size_t n_bytes);
    void write(std::string_view text) { write(text.data(), text.size()); }
    void sync();   // fsync
    void close();  // fsync and close; throws if either fails

  private:
    fs::path path_;
    int fd_ = -1;
};

// Whole file as text; refuses anything that is not a regular file or is larger than max_bytes.
std::string read_text(const fs::path& path, size_t max_bytes, Exit code);
// Temporary file, fsync, rename, fsync of the directory: readers see the old text or the new, never a part.
void replace_file(const fs::path& path, std::string_view text);
void sync_directory(const fs::path& path);
void make_directories(const fs::path& path);
void rename_path(const fs::path& from, const fs::path& to);  // atomic; `to` must not exist as a non-empty directory
// Paths that match a shell pattern, sorted bytewise.
std::vector<std::string> glob_paths(const std::string& pattern);
