// A directory for one test, and the files that it puts there.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include "common/file.h"

class Scratch {
  public:
    Scratch() {
        std::string name = (fs::temp_directory_path() / "kiln-test-XXXXXX").string();
        if (!::mkdtemp(name.data())) fail(Exit::io, "{}: cannot create: {}", name, errno_text(errno));
        dir_ = name;
    }
    ~Scratch() {
        std::error_code ignored;
        fs::remove_all(dir_, ignored);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    std::string path(const std::string& name) const { return (dir_ / name).string(); }
    // Without fsync, which OutFile has: tests of parsers write thousands of files.
    std::string write(const std::string& name, std::string_view content) const {
        std::ofstream f(path(name), std::ios::binary);
        f << content;
        f.close();
        if (!f) fail(Exit::io, "{}: cannot write: {}", path(name), errno_text(errno));
        return path(name);
    }

  private:
    fs::path dir_;
};

// The bytes of a shard in llm.c's layout; `count` -1: the header states the number of tokens.
template <class T = uint16_t>
std::string shard_bytes(const std::vector<T>& tokens, int32_t magic = sizeof(T) == 2 ? 20240520 : 20240801,
                        int32_t version = sizeof(T) == 2 ? 1 : 7, int64_t count = -1) {
    std::vector<int32_t> header(256);
    header[0] = magic;
    header[1] = version;
    header[2] = int32_t(uint32_t(count == -1 ? int64_t(tokens.size()) : count));
    std::string s(reinterpret_cast<const char*>(header.data()), 1024);
    return s.append(reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(T));
}
template <class T = uint16_t>
std::vector<T> counting(size_t n, size_t first = 0) {
    std::vector<T> tokens(n);
    for (size_t i = 0; i < n; i++) tokens[i] = T(first + i);
    return tokens;
}
