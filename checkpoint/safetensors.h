// The safetensors format: 8-byte little-endian header length, JSON header, data.  Written with every tensor's bytes
// streamed; read with every claim of the header checked before a byte of data is used.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "common/file.h"
#include "common/hash.h"

struct SafetensorsEntry {
    std::string dtype;  // "F32", "BF16", ...
    std::vector<size_t> shape;
    size_t begin = 0, end = 0;  // bytes from the start of the data
};

// A file of f32 tensors, front to back: the list is given first, then the data of each in the same order.
class SafetensorsWriter {
  public:
    struct Tensor {
        std::string name;
        std::vector<size_t> shape;
    };
    SafetensorsWriter(const fs::path& path, const std::vector<Tensor>& tensors);
    // The next elements of the current tensor.
    void write(const float* data, size_t count);
    // All data was written; fsync.  Returns the size and hash of the file.
    struct Written {
        uint64_t n_bytes, hash;
    };
    Written close();

  private:
    void put(const void* data, size_t n_bytes);
    OutFile file_;
    uint64_t expected_ = 0, written_ = 0;
    Hasher hasher_;
};

// Refuses, as Error(Exit::checkpoint): a header longer than 100 MB or than the file, anything but a JSON object,
// duplicate names, an unknown dtype, a shape whose byte count overflows or differs from the offsets, holes, overlaps,
// trailing bytes.
class SafetensorsFile {
  public:
    explicit SafetensorsFile(const fs::path& path);
    const std::map<std::string, SafetensorsEntry>& entries() const { return entries_; }
    const fs::path& path() const { return file_.path(); }
    // Elements [first, first + count) of a tensor as f32; from F32, BF16 or F16.
    void read(const SafetensorsEntry& entry, size_t first, size_t count, float* to) const;

  private:
    MappedFile file_;
    size_t data_begin_ = 0;
    std::map<std::string, SafetensorsEntry> entries_;
};
