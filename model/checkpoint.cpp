#include "model/checkpoint.h"

#include <sys/statvfs.h>

#include <algorithm>
#include <charconv>
#include <random>

#include "common/hash.h"
#include "common/json.h"
#include "model/safetensors.h"

namespace {
using nlohmann::ordered_json;
constexpr int kFormatVersion = 1;
constexpr size_t kMaxJson = 64 << 20;
constexpr const char* kManifest = "manifest.json";

std::string nonce() { return fmt::format("{:08x}", std::random_device{}()); }

struct FileRecord {
    std::string name;
    uint64_t n_bytes, hash;
};

FileRecord write_json(const fs::path& dir, const char* name, const ordered_json& j) {
    const std::string text = j.dump(2) + "\n";
    OutFile out(dir / name);
    out.write(text);
    out.close();
    return {name, text.size(), hash64(text)};
}

size_t n_elements(const StateTensor& t) {
    size_t n = 1;
    for (size_t d : t.shape) n *= d;
    return n;
}

// Hugging Face's GPT-2 has no switch for biases: a model without them is saved with biases of zero.
std::vector<StateTensor> with_all_biases(std::vector<StateTensor> tensors, GPT2Config c) {
    if (c.bias) return tensors;
    c.bias = true;
    GPT2Params unused;
    std::vector<StateTensor> all;
    size_t next = 0;
    visit(unused, c, [&](const ParamInfo& info, Buf&) {
        const bool present = next < tensors.size() && tensors[next].name == info.name;
        all.push_back(present ? tensors[next++] : StateTensor{info.name, info.shape, {}});
    });
    return all;
}

// A tensor without data is written as zeros.
FileRecord write_tensors(const fs::path& dir, const char* name, const Backend& k,
                         const std::vector<StateTensor>& tensors) {
    std::vector<SafetensorsWriter::Tensor> list;
    for (const StateTensor& t : tensors) list.push_back({t.name, t.shape});
    SafetensorsWriter out(dir / name, list);
    std::vector<float> host(size_t(1) << 20);
    for (const StateTensor& t : tensors) {
        if (!t.data) {
            const std::vector<float> zeros(n_elements(t));
            out.write(zeros.data(), zeros.size());
        }
        for (size_t i = 0; i < t.data.count; i += host.size()) {
            const Buf part = t.data.slice(i, std::min(host.size(), t.data.count - i));
            k.download(host.data(), part.data, part.n_bytes(), nullptr);
            k.synchronize(nullptr);
            out.write(host.data(), part.count);
        }
    }
    const auto written = out.close();
    return {name, written.n_bytes, written.hash};
}

// Hugging Face's GPT2Config, plus kiln_bias.
ordered_json model_json(const GPT2Config& c) {
    return {{"model_type", "gpt2"},
            {"architectures", {"GPT2LMHeadModel"}},
            {"vocab_size", c.V},
            {"n_positions", c.T},
            {"n_ctx", c.T},
            {"n_embd", c.C},
            {"n_layer", c.L},
            {"n_head", c.NH},
            {"activation_function", "gelu_new"},
            {"layer_norm_epsilon", 1e-5},
            {"resid_pdrop", c.dropout},
            {"embd_pdrop", c.dropout},
            {"attn_pdrop", c.dropout},
            {"tie_word_embeddings", true},
            {"kiln_bias", c.bias}};
}

ordered_json parts_json(const std::vector<DataPart>& parts) {
    ordered_json list = ordered_json::array();
    for (const DataPart& p : parts)
        list.push_back({{"file", p.file}, {"tokens", p.tokens}, {"fingerprint", hash_text(p.fingerprint)}});
    return list;
}

ordered_json state_json(const RunState& s) {
    return {{"step", s.step},           {"tokens", s.tokens},           {"updates", s.updates},
            {"sequences", s.sequences}, {"train", parts_json(s.train)}, {"val", parts_json(s.val)},
            {"config", s.config}};
}

void write_manifest(const fs::path& dir, int64_t step, const std::vector<FileRecord>& files) {
    ordered_json list;
    for (const FileRecord& f : files) list[f.name] = {{"bytes", f.n_bytes}, {"xxh3", hash_text(f.hash)}};
    const ordered_json body = {{"step", step}, {"files", list}};
    // The version stands outside, so that a later format can change everything else and still be recognised.
    write_json(dir, kManifest,
               {{"format_version", kFormatVersion}, {"manifest", body}, {"xxh3", hash_text(hash64(body.dump()))}});
}

void require_space(const fs::path& root, uint64_t n_bytes) {
    struct statvfs vfs {};
    if (::statvfs(root.c_str(), &vfs) != 0) return;  // not every file system tells
    const uint64_t available = uint64_t(vfs.f_bavail) * vfs.f_frsize;
    if (available < n_bytes)
        fail(Exit::io, "{}: a checkpoint needs {}, the disk has {} left", root.string(), human_bytes(n_bytes),
             human_bytes(available));
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

// Every file is there, with the size and hash that the manifest gives.  Throws Error(Exit::checkpoint) otherwise.
void verify(const fs::path& dir) {
    const std::string name = (dir / kManifest).string();
    const std::string text = read_text(name, kMaxJson, Exit::checkpoint);
    parse_json(text, name, Exit::checkpoint);  // refuses what is not strict JSON
    try {
        const ordered_json j = ordered_json::parse(text),
                           body = j.at("manifest");  // ordered: the hash is over the body as written
        if (j.at("format_version") != kFormatVersion)
            fail(Exit::checkpoint, "{}: format version {}, expected {}", name, j.at("format_version").dump(),
                 kFormatVersion);
        if (hash_text(hash64(body.dump())) != j.at("xxh3").get<std::string>())
            fail(Exit::checkpoint, "{}: its own checksum does not match", name);
        for (const char* needed : {"model.safetensors", "config.json", "state.json"})
            if (!body.at("files").contains(needed)) fail(Exit::checkpoint, "{}: does not list {}", name, needed);
        for (const auto& [file, record] : body.at("files").items()) {
            if (file.find('/') != std::string::npos || file == "..") fail(Exit::checkpoint, "{}: lists {}", name, file);
            const MappedFile data(dir / file, Exit::checkpoint);
            const uint64_t expected = record.at("bytes").get<uint64_t>();
            if (data.bytes().size() != expected)
                fail(Exit::checkpoint, "{}: {} bytes, the manifest says {}", (dir / file).string(), data.bytes().size(),
                     expected);
            if (hash_text(hash64(data.bytes().data(), expected)) != record.at("xxh3").get<std::string>())
                fail(Exit::checkpoint, "{}: its content does not match the manifest's checksum", (dir / file).string());
        }
    } catch (const nlohmann::json::exception& e) { fail(Exit::checkpoint, "{}: not a manifest: {}", name, e.what()); }
}

// A checkpoint of a format from the future is not damaged: it is kept, and nothing older is silently used instead.
void refuse_newer_format(const fs::path& dir) {
    const fs::path path = dir / kManifest;
    if (!fs::is_regular_file(path)) return;
    nlohmann::json j;
    try {
        j = parse_json(read_text(path, kMaxJson, Exit::checkpoint), path.string(), Exit::checkpoint);
    } catch (const Error&) {
        return;  // damaged: verify() says how
    }
    if (!j.is_object() || !j.contains("format_version") || !j["format_version"].is_number_unsigned()) return;
    const auto version = j["format_version"].get<uint64_t>();
    if (version > kFormatVersion && j.contains("manifest"))
        fail(Exit::checkpoint, "{}: format version {}; this build reads up to {}: resume with the kiln that wrote it",
             path.string(), version, kFormatVersion);
}

std::vector<DataPart> parts_of(const nlohmann::json& list) {
    std::vector<DataPart> parts;
    for (const auto& p : list)
        parts.push_back(
            {p.at("file"), p.at("tokens"), std::stoull(p.at("fingerprint").get<std::string>(), nullptr, 16)});
    return parts;
}

std::string shape_text(const std::vector<size_t>& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

void read_tensor(const SafetensorsFile& file, const SafetensorsEntry& e, const Backend& k, const StateTensor& t) {
    std::vector<float> host(std::min(t.data.count, size_t(1) << 20));
    for (size_t i = 0; i < t.data.count; i += host.size()) {
        const Buf part = t.data.slice(i, std::min(host.size(), t.data.count - i));
        file.read(e, i, part.count, host.data());
        k.upload(part.data, host.data(), part.n_bytes(), nullptr);
        k.synchronize(nullptr);
    }
}
bool all_zero(const SafetensorsFile& file, const SafetensorsEntry& e) {
    size_t n = 1;
    for (size_t d : e.shape) n *= d;
    std::vector<float> host(n);
    file.read(e, 0, n, host.data());
    return std::all_of(host.begin(), host.end(), [](float v) { return v == 0; });
}
}  // namespace

void save_checkpoint(const fs::path& root, const Backend& k, Trainer& trainer, const RunState& state, int keep,
                     const std::function<void()>& before_rename) {
    const std::string name = fmt::format("step_{}", state.step);
    const fs::path final_path = root / name, temporary = root / fmt::format("{}.tmp-{}", name, nonce());
    make_directories(root);
    const std::vector<StateTensor> weights = with_all_biases(trainer.parameters(), trainer.config());
    const std::vector<StateTensor> moments = trainer.moments();
    uint64_t n_bytes = 1 << 20;  // headers and JSON
    for (const auto* list : {&weights, &moments})
        for (const StateTensor& t : *list) n_bytes += n_elements(t) * sizeof(float);
    require_space(root, n_bytes);
    make_directories(temporary);
    try {
        std::vector<FileRecord> files;
        files.push_back(write_tensors(temporary, "model.safetensors", k, weights));
        files.push_back(write_json(temporary, "config.json", model_json(trainer.config())));
        files.push_back(write_tensors(temporary, "optimizer.safetensors", k, moments));
        files.push_back(write_json(temporary, "state.json", state_json(state)));
        write_manifest(temporary, state.step, files);
        sync_directory(temporary);
        before_rename();
        rename_path(temporary, final_path);
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
        refuse_newer_format(f.path);
        try {
            verify(f.path);
        } catch (const Error& e) {
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

RunState read_state(const fs::path& checkpoint) {
    const std::string name = (checkpoint / "state.json").string();
    const nlohmann::json j = parse_json(read_text(name, kMaxJson, Exit::checkpoint), name, Exit::checkpoint);
    try {
        return {.step = j.at("step"),
                .tokens = j.at("tokens"),
                .updates = j.at("updates"),
                .sequences = j.at("sequences"),
                .config = j.at("config"),
                .train = parts_of(j.at("train")),
                .val = parts_of(j.at("val"))};
    } catch (const std::exception& e) { fail(Exit::checkpoint, "{}: not a kiln state: {}", name, e.what()); }
}

GPT2Config read_model_config(const fs::path& directory) {
    const std::string name = (directory / "config.json").string();
    const nlohmann::json j = parse_json(read_text(name, kMaxJson, Exit::checkpoint), name, Exit::checkpoint);
    try {
        if (j.value("model_type", "gpt2") != "gpt2")
            fail(Exit::checkpoint, "{}: model_type {}, expected gpt2", name, j["model_type"].dump());
        if (const std::string act = j.value("activation_function", "gelu_new");
            act != "gelu_new" && act != "gelu_pytorch_tanh")
            fail(Exit::checkpoint, "{}: activation_function {}, expected gelu_new", name, act);
        GPT2Config c{.L = j.at("n_layer"), .NH = j.at("n_head"), .C = j.at("n_embd"), .V = j.at("vocab_size")};
        c.T = j.contains("n_positions") ? j.at("n_positions") : j.at("n_ctx");
        c.bias = j.value("kiln_bias", true);
        return c;
    } catch (const nlohmann::json::exception& e) {
        fail(Exit::checkpoint, "{}: not a GPT-2 config: {}", name, e.what());
    }
}

void load_weights(const fs::path& directory, const Backend& k, Trainer& trainer) {
    const SafetensorsFile file(directory / "model.safetensors");
    const std::string path = file.path().string();
    std::map<std::string, SafetensorsEntry> left = file.entries();
    for (const StateTensor& t : trainer.parameters()) {
        std::string name = t.name;
        if (!left.contains(name)) name = "transformer." + t.name;
        const auto entry = left.find(name);
        if (entry == left.end()) fail(Exit::checkpoint, "{}: has no tensor {}", path, t.name);
        if (entry->second.shape != t.shape)
            fail(Exit::checkpoint, "{}: {} has shape {}, the config's model needs {}", path, name,
                 shape_text(entry->second.shape), shape_text(t.shape));
        read_tensor(file, entry->second, k, t);
        left.erase(entry);
    }
    // Hugging Face files carry these beside the parameters; with bias: false, biases of zero are dropped.
    for (const auto& [name, entry] : left) {
        const bool buffer =
            name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias") || name == "lm_head.weight";
        const bool zero_bias = !trainer.config().bias && name.ends_with(".bias") && all_zero(file, entry);
        if (!buffer && !zero_bias)
            fail(Exit::checkpoint, "{}: the config's model has no tensor {}{}", path, name,
                 name.ends_with(".bias") ? " (not all zero); use model.bias: true" : "");
    }
}

void load_optimizer(const fs::path& directory, const Backend& k, Trainer& trainer) {
    const fs::path path = directory / "optimizer.safetensors";
    if (!fs::exists(path))
        fail(Exit::checkpoint, "{}: has no optimizer state; to start a new run from its weights use model.init_from",
             directory.string());
    const SafetensorsFile file(path);
    for (const StateTensor& t : trainer.moments()) {
        const auto entry = file.entries().find(t.name);
        if (entry == file.entries().end() || entry->second.shape != t.shape)
            fail(Exit::checkpoint, "{}: {} is missing or of another shape than {}", path.string(), t.name,
                 shape_text(t.shape));
        read_tensor(file, entry->second, k, t);
    }
}
