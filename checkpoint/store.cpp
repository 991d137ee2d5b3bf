#include "checkpoint/store.h"

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <random>

#include "common/hash.h"
#include "common/json.h"

namespace {
using nlohmann::ordered_json;
constexpr int kFormatVersion = 1;
constexpr size_t kMaxJson = 64 << 20;
constexpr const char* kManifest = "manifest.json";

std::string nonce() { return fmt::format("{:08x}", std::random_device{}()); }

// The rule that every format keeps: xxh3 is over the compact text of the object without it, keys as written.
std::string manifest_checksum(ordered_json j) {
    j.erase("xxh3");
    return hash_text(hash64(j.dump(-1, ' ', false, ordered_json::error_handler_t::replace)));
}

void write_manifest(const fs::path& dir, int64_t step, const std::vector<FileRecord>& files) {
    ordered_json list;
    for (const FileRecord& f : files) list[f.name] = {{"bytes", f.n_bytes}, {"xxh3", hash_text(f.hash)}};
    ordered_json j = {{"format_version", kFormatVersion}, {"manifest", {{"step", step}, {"files", list}}}};
    j["xxh3"] = manifest_checksum(j);
    OutFile out(dir / kManifest);
    out.write(j.dump(2) + "\n");
    out.close();
}

// N of "step_N" (or "step_N<suffix>..."), -1 for another name.
int64_t step_of(const std::string& name, std::string& suffix) {
    int64_t n = -1;
    if (!name.starts_with("step_")) return -1;
    const auto [end, error] = std::from_chars(name.data() + 5, name.data() + name.size(), n);
    if (error != std::errc{} || n < 0) return -1;
    suffix.assign(end, name.data() + name.size());
    return n;
}

struct Found {
    int64_t step;
    fs::path path;
};
// Complete-looking checkpoints, newest first; and the leftovers of saves that were interrupted.
void list_checkpoints(const fs::path& root, std::vector<Found>& complete, std::vector<fs::path>& leftovers) {
    std::error_code error;
    if (!fs::is_directory(root, error)) return;
    for (fs::directory_iterator e(root, error), end; !error && e != end; e.increment(error)) {
        const fs::path path = e->path();
        const std::string name = path.filename().string();
        std::string suffix;
        const int64_t step = step_of(name, suffix);
        if (step < 0 && name.starts_with("latest.tmp-")) leftovers.push_back(path);
        if (step < 0) continue;
        if (suffix.empty()) complete.push_back({step, path});
        if (suffix.starts_with(".tmp-")) leftovers.push_back(path);
    }
    if (error) fail(Exit::io, "{}: cannot list the checkpoints: {}", root.string(), error.message());
    std::sort(complete.begin(), complete.end(), [](const Found& a, const Found& b) { return a.step > b.step; });
}

void prune(const fs::path& root, int keep) {
    std::vector<Found> complete;
    std::vector<fs::path> leftovers;
    list_checkpoints(root, complete, leftovers);
    for (size_t i = size_t(keep); i < complete.size(); i++) leftovers.push_back(complete[i].path);
    std::error_code ignored;  // an old checkpoint too many is no reason to stop
    for (const fs::path& p : leftovers) {
        // Renamed first: a deletion that is interrupted must not leave a half checkpoint under a good name.
        std::string suffix;
        const fs::path doomed = root / fmt::format("step_{}.tmp-{}", step_of(p.filename().string(), suffix), nonce());
        fs::rename(p, doomed, ignored);
        fs::remove_all(doomed, ignored);
    }
}

void point_latest(const fs::path& root, const std::string& name) {
    const fs::path temporary = root / ("latest.tmp-" + nonce());
    std::error_code error;
    fs::create_symlink(name, temporary, error);
    if (error) fail(Exit::io, "{}: cannot create the link: {}", temporary.string(), error.message());
    rename_path(temporary, root / "latest");
}

// A file that is there but may not be read is no damage: nothing is decided about it.
void require_readable(const fs::path& path) {
    if (::access(path.c_str(), R_OK) != 0 && errno != ENOENT)
        fail(Exit::io, "{}: cannot read: {}", path.string(), errno_text(errno));
}

// The manifest with its own checksum verified; Error(Exit::checkpoint) otherwise.
ordered_json read_manifest(const fs::path& dir) {
    const std::string name = (dir / kManifest).string();
    require_readable(name);
    const std::string text = read_text(name, kMaxJson, Exit::checkpoint);
    parse_json(text, name, Exit::checkpoint);  // refuses what is not strict JSON
    const ordered_json j = ordered_json::parse(text);
    if (!j.is_object() || !j.contains("xxh3") || j["xxh3"] != manifest_checksum(j))
        fail(Exit::checkpoint, "{}: its own checksum does not match", name);
    return j;
}

void verify_file(const fs::path& path, uint64_t n_bytes, const std::string& hash) {
    require_readable(path);
    const MappedFile data(path, Exit::checkpoint);
    if (data.bytes().size() != n_bytes)
        fail(Exit::checkpoint, "{}: {} bytes, the manifest says {}", path.string(), data.bytes().size(), n_bytes);
    Hasher hasher;
    std::vector<char> piece(std::min(n_bytes, uint64_t(4) << 20));
    for (uint64_t i = 0; i < n_bytes; i += piece.size()) {
        const size_t n = std::min<uint64_t>(piece.size(), n_bytes - i);
        data.read(i, piece.data(), n);
        hasher.update(piece.data(), n);
    }
    if (hash_text(hasher.digest()) != hash)
        fail(Exit::checkpoint, "{}: its content does not match the manifest's checksum", path.string());
}

void verify_manifest(const fs::path& dir, const ordered_json& j) {
    const std::string name = (dir / kManifest).string();
    try {
        const ordered_json& files = j.at("manifest").at("files");
        for (const char* needed : {"model.safetensors", "config.json", "state.json"})
            if (!files.contains(needed)) fail(Exit::checkpoint, "{}: does not list {}", name, needed);
        for (const auto& [file, record] : files.items()) {
            if (file.find('/') != std::string::npos || file == "..") fail(Exit::checkpoint, "{}: lists {}", name, file);
            verify_file(dir / file, record.at("bytes").get<uint64_t>(), record.at("xxh3").get<std::string>());
        }
    } catch (const nlohmann::json::exception& e) { fail(Exit::checkpoint, "{}: not a manifest: {}", name, e.what()); }
}

// A format from the future, its checksum right, is no damage: nothing older is silently used instead.
struct NewerFormat : Error {
    using Error::Error;
};
void verify(const fs::path& dir) {
    const ordered_json j = read_manifest(dir);
    const std::string name = (dir / kManifest).string();
    const ordered_json version = j.value("format_version", ordered_json());
    if (version.is_number_unsigned() && version.get<uint64_t>() > kFormatVersion)
        throw NewerFormat(Exit::checkpoint,
                          fmt::format("{}: format version {}; this build reads up to {}: use the kiln "
                                      "that wrote it",
                                      name, version.dump(), kFormatVersion));
    if (version != kFormatVersion)
        fail(Exit::checkpoint, "{}: format version {}, expected {}", name, version.dump(), kFormatVersion);
    verify_manifest(dir, j);
}
}  // namespace

void verify_checkpoint(const fs::path& directory) {
    if (fs::path manifest = directory / kManifest; ::access(manifest.c_str(), F_OK) == 0) return verify(directory);
    std::error_code ignored;
    if (fs::is_directory(directory / "checkpoints", ignored) && !fs::exists(directory / "model.safetensors", ignored))
        fail(Exit::checkpoint, "{}: a run, expected a checkpoint; use {}", directory.string(),
             (directory / "checkpoints" / "latest").string());
}

void store_checkpoint(const fs::path& root, int64_t step, int keep,
                      const std::function<std::vector<FileRecord>(const fs::path&)>& write_files,
                      const std::function<void()>& before_rename) {
    const std::string name = fmt::format("step_{}", step);
    const fs::path temporary = root / fmt::format("{}.tmp-{}", name, nonce());
    make_directories(temporary);
    try {
        write_manifest(temporary, step, write_files(temporary));
        sync_directory(temporary);
        before_rename();
        rename_path(temporary, root / name);
        sync_directory(root);
    } catch (...) {
        std::error_code ignored;
        fs::remove_all(temporary, ignored);
        throw;
    }
    prune(root, keep);
    point_latest(root, name);
}

std::optional<fs::path> find_checkpoint(const fs::path& root, Log& log, bool tidy) {
    std::vector<Found> complete;
    std::vector<fs::path> leftovers;
    list_checkpoints(root, complete, leftovers);
    std::error_code ignored;
    for (const fs::path& p : leftovers) {
        if (!tidy) break;  // it may be a save in progress
        log.info("{}: left by an interrupted save; removed", p.string());
        fs::remove_all(p, ignored);
    }
    if (const fs::path latest = root / "latest"; !complete.empty() && !fs::exists(latest))
        log.warn("{}: points nowhere; looking at the checkpoints themselves", latest.string());
    std::vector<fs::path> damaged;
    for (const Found& f : complete) {
        try {
            verify(f.path);
        } catch (const NewerFormat&) { throw; } catch (const Error& e) {
            if (e.code != Exit::checkpoint) throw;
            log.warn("{}; not used", e.what());
            damaged.push_back(f.path);
            continue;
        }
        for (const fs::path& p : damaged) {
            if (!tidy) break;
            const fs::path aside = p.string() + ".damaged-" + nonce();
            rename_path(p, aside);
            log.warn("{}: kept as {}", p.string(), aside.filename().string());
        }
        return f.path;
    }
    if (!damaged.empty())
        fail(Exit::checkpoint,
             "{}: {} checkpoint(s), none of them valid; restore one, or start afresh with --overwrite", root.string(),
             damaged.size());
    return std::nullopt;
}
