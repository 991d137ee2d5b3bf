#include "checkpoint/checkpoint.h"

#include <sys/statvfs.h>

#include <algorithm>
#include <vector>

#include "checkpoint/safetensors.h"
#include "common/hash.h"
#include "common/json.h"

namespace {
using nlohmann::ordered_json;
constexpr size_t kMaxJson = 64 << 20;

FileRecord write_json(const fs::path& dir, const char* name, const ordered_json& j) {
    const std::string text = j.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n";
    OutFile out(dir / name);
    out.write(text);
    out.close();
    return {name, text.size(), hash64(text)};
}

// The tensors that model.safetensors has: a tensor that the model lacks has a null data pointer.
std::vector<StateTensor> as_stored(const std::vector<StateTensor>& tensors, const ModelConfig& c) {
    const Architecture& model = *c.architecture;
    std::vector<StateTensor> all;
    size_t next = 0;
    for (const ParamInfo& info : model.params(model.hugging_face.stored(c))) {
        const bool present = next < tensors.size() && tensors[next].name == info.name;
        all.push_back(present ? tensors[next++] : StateTensor::whole(info.name, info.shape_saved(), {}));
    }
    return all;
}

// From host memory.  A tensor without data is written as zeros.
FileRecord write_tensors(const fs::path& dir, const char* name, const std::vector<StateTensor>& tensors) {
    std::vector<SafetensorsWriter::Tensor> list;
    for (const StateTensor& t : tensors) {
        CHECK_THAT(t.is_whole(), "{} is a slice; a checkpoint has whole tensors", t.name);
        list.push_back({t.name, t.global_shape});
    }
    SafetensorsWriter out(dir / name, list);
    for (const StateTensor& t : tensors) {
        if (!t.data) {
            const std::vector<float> zeros(t.count());
            out.write(zeros.data(), zeros.size());
        }
        constexpr size_t kPiece = size_t(1) << 20;  // elements of a write
        for (size_t i = 0; i < t.data.count; i += kPiece)
            out.write(t.data.as<float>() + i, std::min(kPiece, t.data.count - i));
    }
    const auto written = out.close();
    return {name, written.n_bytes, written.hash};
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
            {"config", s.config},       {"attention", s.attention},     {"choices", s.choices}};
}

// Sizes that differ, and what would mend it.
void require_same_model(const fs::path& directory, const ModelConfig& theirs, const ModelConfig& ours) {
    std::vector<std::string> differ;
    const auto compare = [&](const char* key, int there, int here) {
        if (there != here) differ.push_back(fmt::format("model.{}: {} (the config has {})", key, there, here));
    };
    compare("n_layer", theirs.L, ours.L);
    compare("n_head", theirs.NH, ours.NH);
    compare("n_embd", theirs.C, ours.C);
    compare("context_length", theirs.T, ours.T);
    compare("vocab_size", theirs.V, ours.V);
    if (!differ.empty())
        fail(Exit::checkpoint, "{}: weights of another model; use {}", (directory / "config.json").string(),
             fmt::join(differ, ", "));
}

void require_space(const fs::path& root, uint64_t n_bytes) {
    struct statvfs vfs {};
    if (::statvfs(root.c_str(), &vfs) != 0) return;  // not every file system tells
    const uint64_t available = uint64_t(vfs.f_bavail) * vfs.f_frsize;
    if (available < n_bytes)
        fail(Exit::io, "{}: a checkpoint needs {}, the disk has {} left; free space, then start it again with --resume",
             root.string(), human_bytes(n_bytes), human_bytes(available));
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
    CHECK_THAT(t.is_whole(), "{} is a slice; a checkpoint has whole tensors", t.name);
    std::vector<float> host(std::min(t.data.count, size_t(1) << 20));
    for (size_t i = 0; i < t.data.count; i += host.size()) {
        const Buf part = t.data.slice(i, std::min(host.size(), t.data.count - i));
        file.read(e, i, part.count, t.on_host ? part.as<float>() : host.data());
        if (t.on_host) continue;
        k.upload(part.data, host.data(), part.n_bytes(), nullptr);
        k.synchronize(nullptr);
    }
}
std::vector<float> whole_tensor(const SafetensorsFile& file, const SafetensorsEntry& e) {
    size_t n = 1;
    for (size_t d : e.shape) n *= d;
    std::vector<float> values(n);
    file.read(e, 0, n, values.data());
    return values;
}
bool all_zero(const SafetensorsFile& file, const SafetensorsEntry& e) {
    const std::vector<float> values = whole_tensor(file, e);
    return std::all_of(values.begin(), values.end(), [](float v) { return v == 0; });
}
bool same_tensor(const SafetensorsFile& file, const SafetensorsEntry& a, const SafetensorsEntry& b) {
    return a.shape == b.shape && whole_tensor(file, a) == whole_tensor(file, b);
}
}  // namespace

void save_checkpoint(const fs::path& root, const RunSnapshot& snapshot, int keep,
                     const std::function<void()>& before_rename) {
    const ModelConfig& model = snapshot.model;
    const std::vector<StateTensor> weights = as_stored(snapshot.parameters.tensors(), model);
    const std::vector<StateTensor>& moments = snapshot.moments.tensors();
    uint64_t n_bytes = 1 << 20;  // headers and JSON
    for (const auto* list : {&weights, &moments})
        for (const StateTensor& t : *list) n_bytes += t.count() * sizeof(float);
    make_directories(root);
    require_space(root, n_bytes);
    const auto write_files = [&](const fs::path& dir) -> std::vector<FileRecord> {
        return {write_tensors(dir, "model.safetensors", weights),
                write_json(dir, "config.json", model.architecture->hugging_face.write_config(model)),
                write_tensors(dir, "optimizer.safetensors", moments),
                write_json(dir, "state.json", state_json(snapshot.run))};
    };
    store_checkpoint(root, snapshot.run.step, keep, write_files, before_rename);
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
                .attention =
                    j.value("attention", "portable"),  // old checkpoints lack this key; they used the portable kernels
                .choices = j.value("choices", ""),     // older ones took the library's guesses
                .train = parts_of(j.at("train")),
                .val = parts_of(j.at("val"))};
    } catch (const std::exception& e) { fail(Exit::checkpoint, "{}: not a kiln state: {}", name, e.what()); }
}

namespace {
// The sizes that a directory's config.json describes (kiln's or Hugging Face's).
ModelConfig read_model_config(const fs::path& directory, const Architecture& model) {
    const std::string name = (directory / "config.json").string();
    const nlohmann::json j = parse_json(read_text(name, kMaxJson, Exit::checkpoint), name, Exit::checkpoint);
    try {
        return model.hugging_face.read_config(j, name);
    } catch (const nlohmann::json::exception& e) {
        fail(Exit::checkpoint, "{}: not a {} config: {}", name, model.title, e.what());
    }
}
}  // namespace

void load_weights(const fs::path& directory, const Backend& k, const ModelConfig& config,
                  const std::vector<StateTensor>& parameters) {
    const HuggingFace& names = config.architecture->hugging_face;
    require_same_model(directory, read_model_config(directory, *config.architecture), config);
    const SafetensorsFile file(directory / "model.safetensors");
    const std::string path = file.path().string();
    std::map<std::string, SafetensorsEntry> left = file.entries();
    SafetensorsEntry tied;
    for (const StateTensor& t : parameters) {
        std::string name = t.name;
        if (!left.contains(name)) name = names.prefix + t.name;
        const auto entry = left.find(name);
        if (entry == left.end())
            fail(Exit::checkpoint, "{}: has no tensor {}{}", path, t.name,
                 t.name.ends_with(".bias") ? "; use model.bias: false" : "");
        if (entry->second.shape != t.global_shape)
            fail(Exit::checkpoint, "{}: {} has shape {}, the config's model needs {}", path, name,
                 shape_text(entry->second.shape), shape_text(t.global_shape));
        read_tensor(file, entry->second, k, t);
        if (names.tied && t.name == names.tied) tied = entry->second;
        left.erase(entry);
    }
    // Hugging Face files carry these beside the parameters; with bias: false, biases of zero are dropped.
    for (const auto& [name, entry] : left) {
        if (names.tied && name == names.head) {
            if (same_tensor(file, entry, tied)) continue;
            fail(Exit::checkpoint, "{}: {} differs from {}; kiln's classifier is tied to it", path, names.head,
                 names.tied);
        }
        const bool zero_bias = !config.bias && name.ends_with(".bias") && all_zero(file, entry);
        if (!names.is_buffer(name) && !zero_bias)
            fail(Exit::checkpoint, "{}: the config's model has no tensor {}{}", path, name,
                 name.ends_with(".bias") && !config.bias ? " (not all zero); use model.bias: true" : "");
    }
}

namespace {
SafetensorsFile open_optimizer(const fs::path& directory) {
    const fs::path path = directory / "optimizer.safetensors";
    if (!fs::exists(path))
        fail(Exit::checkpoint, "{}: has no optimizer state; to start a new run from its weights use model.init_from",
             directory.string());
    return SafetensorsFile(path);
}
}  // namespace

std::vector<std::string> optimizer_tensors(const fs::path& checkpoint) {
    std::vector<std::string> names;
    const SafetensorsFile file = open_optimizer(checkpoint);
    for (const auto& [name, entry] : file.entries()) names.push_back(name);
    return names;
}

void load_optimizer(const fs::path& directory, const Backend& k, const std::vector<StateTensor>& moments) {
    const SafetensorsFile file = open_optimizer(directory);
    for (const StateTensor& t : moments) {
        const auto entry = file.entries().find(t.name);
        if (entry == file.entries().end() || entry->second.shape != t.global_shape)
            fail(Exit::checkpoint, "{}: {} is missing or of another shape than {}", file.path().string(), t.name,
                 shape_text(t.global_shape));
        read_tensor(file, entry->second, k, t);
    }
}
