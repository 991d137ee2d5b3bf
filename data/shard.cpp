#include "data/shard.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <set>

#include "common/hash.h"

namespace {
constexpr size_t kHeaderInts = 256, kHeaderBytes = kHeaderInts * 4;
constexpr int32_t kMagic16 = 20240520, kVersion16 = 1;  // llm.c, uint16 tokens
constexpr int32_t kMagic32 = 20240801, kVersion32 = 7;  // llm.c, uint32 tokens

int32_t header_int(const MappedFile& f, size_t i) {
    int32_t v;
    f.read(i * 4, &v, 4);
    return v;
}

// Reads the header of a file that is not empty: returns the bytes per token; `count` becomes the stated count, which is
// checked against the file's size.
size_t check_header(const MappedFile& f, uint64_t& count) {
    const std::string path = f.path().string();
    const size_t size = f.bytes().size();
    const int32_t magic = size >= 4 ? header_int(f, 0) : 0;
    if (magic != kMagic16 && magic != kMagic32)
        fail(Exit::data,
             "{}: not a token shard: magic {}, expected {} (uint16) or {} (uint32); for headerless uint16 tokens set "
             "data.format: nanogpt",
             path, magic, kMagic16, kMagic32);
    if (size < kHeaderBytes)
        fail(Exit::data, "{}: truncated: {} bytes, expected a header of {} bytes; restore or rewrite the file", path,
             size, kHeaderBytes);
    const int32_t version = header_int(f, 1), expected = magic == kMagic16 ? kVersion16 : kVersion32;
    if (version != expected)
        fail(Exit::data, "{}: version {} of the shard format, expected {} for magic {}", path, version, expected,
             magic);
    const int32_t stated = header_int(f, 2);
    if (stated < 0)
        fail(Exit::data, "{}: the header states {} tokens; a shard holds 0 to {}, write more as several shards", path,
             stated, INT32_MAX);
    const size_t token_bytes = magic == kMagic16 ? 2 : 4, want = kHeaderBytes + size_t(stated) * token_bytes;
    if (size != want)
        fail(Exit::data, "{}: {}: {} bytes, expected {} + {} tokens * {} = {}; restore or rewrite the file", path,
             size < want ? "truncated" : "longer than its header states", size, kHeaderBytes, stated, token_bytes,
             want);
    count = uint64_t(stated);
    return token_bytes;
}

template <class T>
void read_tokens(const MappedFile& f, size_t header_bytes, uint64_t first, std::span<int32_t> out, int vocab_size) {
    std::array<T, 2048> part;
    for (size_t done = 0; done < out.size();) {
        const size_t n = std::min(out.size() - done, part.size());
        f.read(header_bytes + (first + done) * sizeof(T), part.data(), n * sizeof(T));
        for (size_t i = 0; i < n; i++) {
            if (part[i] >= uint32_t(vocab_size))
                fail(Exit::data, "{}: token {} is {}, expected below model.vocab_size = {}", f.path().string(),
                     first + done + i, part[i], vocab_size);
            out[done + i] = int32_t(part[i]);
        }
        done += n;
    }
}
}  // namespace

Shard::Shard(const fs::path& path, ShardFormat format) : file_(path, Exit::data) {
    const size_t size = file_.bytes().size();
    if (size == 0) return;  // no tokens: TokenStream warns
    if (format == ShardFormat::automatic) {
        token_bytes_ = check_header(file_, count_);
        header_bytes_ = kHeaderBytes;
        return;
    }
    if (const int32_t magic = size >= kHeaderBytes ? header_int(file_, 0) : 0; magic == kMagic16 || magic == kMagic32)
        fail(Exit::data, "{}: begins with a shard header (magic {}); remove data.format: nanogpt", path.string(),
             magic);
    if (size % 2 != 0)
        fail(Exit::data, "{}: {} bytes is not a whole number of uint16 tokens; truncated?", path.string(), size);
    count_ = size / 2;
}

void Shard::read(uint64_t first, std::span<int32_t> out, int vocab_size) const {
    CHECK_THAT(first <= count_ && out.size() <= count_ - first, "{}: tokens [{}, {}+{}) of {}", path().string(), first,
               first, out.size(), count_);
    if (token_bytes_ == 2)
        read_tokens<uint16_t>(file_, header_bytes_, first, out, vocab_size);
    else
        read_tokens<uint32_t>(file_, header_bytes_, first, out, vocab_size);
}

uint64_t Shard::fingerprint() const {
    constexpr size_t kSamples = 256, kSampleBytes = 64;
    const uint64_t size = file_.bytes().size();
    Hasher hasher;
    hasher.update(&size, sizeof size);
    std::array<char, std::max(kHeaderBytes, kSampleBytes)> part;
    const auto sample = [&](size_t at, size_t n) {
        file_.read(at, part.data(), n);
        hasher.update(part.data(), n);
    };
    if (size <= kSamples * kSampleBytes) {
        for (size_t at = 0; at < size; at += part.size()) sample(at, std::min(part.size(), size - at));
    } else {
        sample(0, header_bytes_);
        for (size_t i = 0; i < kSamples;
             i++)  // the first at the start, the last at the end, without a product that overflows
            sample(i == kSamples - 1 ? size - kSampleBytes : size / kSamples * i, kSampleBytes);
    }
    return hasher.digest();
}

TokenStream::TokenStream(const std::string& key, const std::vector<std::string>& patterns, ShardFormat format,
                         int context_length, int vocab_size, Log& log)
    : context_length_(context_length), vocab_size_(vocab_size) {
    CHECK_THAT(context_length > 0 && vocab_size > 0, "context_length {}, vocab_size {}", context_length, vocab_size);
    std::set<std::string> seen;
    for (const std::string& pattern : patterns) {
        const std::vector<std::string> paths = glob_paths(pattern);
        if (paths.empty()) {
            const bool relative = !fs::path(pattern).is_absolute();
            fail(Exit::data, "{}: no file matches \"{}\"{}", key, pattern,
                 relative ? fmt::format(" in {}", fs::current_path().string()) : "");
        }
        for (const std::string& path : paths) {
            if (!seen.insert(path).second) log.warn("{}: {} is matched twice and counts twice", key, path);
            const Shard& shard = shards_.emplace_back(path, format);
            const uint64_t n = shard.count() == 0 ? 0 : (shard.count() - 1) / uint64_t(context_length);
            if (shard.count() == 0)
                log.warn("{}: {} holds no tokens; going on without it", key, path);
            else if (n == 0)
                log.warn(
                    "{}: {} holds {} tokens, too few for one sequence of context_length + 1 = {}; going on without it",
                    key, path, shard.count(), int64_t(context_length) + 1);
            first_sequence_.push_back(n_sequences_);
            n_sequences_ += n;
        }
    }
    first_sequence_.push_back(n_sequences_);
    if (n_sequences_ == 0)
        fail(Exit::data, "{}: {} tokens in {} files, too few for one sequence of context_length + 1 = {}", key,
             n_tokens(), shards_.size(), int64_t(context_length) + 1);
}

uint64_t TokenStream::n_tokens() const {
    uint64_t n = 0;
    for (const Shard& s : shards_) n += s.count();
    return n;
}

void TokenStream::read(uint64_t i, std::span<int32_t> inputs, std::span<int32_t> targets) const {
    const size_t T = size_t(context_length_);
    CHECK_THAT(i < n_sequences_ && inputs.size() == T && targets.size() == T, "sequence {} of {} into {} and {} tokens",
               i, n_sequences_, inputs.size(), targets.size());
    const auto after = std::upper_bound(first_sequence_.begin(), first_sequence_.end(), i);
    const size_t s = size_t(after - first_sequence_.begin()) - 1;
    const uint64_t first = (i - first_sequence_[s]) * T;
    shards_[s].read(first, inputs, vocab_size_);
    std::copy(inputs.begin() + 1, inputs.end(), targets.begin());
    shards_[s].read(first + T, targets.last(1), vocab_size_);
}

uint64_t TokenStream::fingerprint() const {
    Hasher hasher;
    for (const Part& p : parts()) {
        hasher.update(p.file.data(), p.file.size());
        hasher.update(&p.tokens, sizeof p.tokens);
        hasher.update(&p.fingerprint, sizeof p.fingerprint);
    }
    return hasher.digest();
}

std::vector<TokenStream::Part> TokenStream::parts() const {
    std::vector<Part> parts;
    for (const Shard& s : shards_) parts.push_back({s.path().filename().string(), s.count(), s.fingerprint()});
    return parts;
}
