#include "checkpoint/safetensors.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/buf.h"
#include "common/json.h"

namespace {
constexpr size_t kMaxHeader = 100'000'000;  // the reference implementation's cap

struct DtypeSize {
    const char* name;
    size_t n_bytes;
};
constexpr DtypeSize kDtypes[] = {{"F64", 8}, {"F32", 4}, {"F16", 2},  {"BF16", 2}, {"I64", 8}, {"I32", 4}, {"I16", 2},
                                 {"I8", 1},  {"U8", 1},  {"BOOL", 1}, {"U64", 8},  {"U32", 4}, {"U16", 2}};

size_t dtype_size(const std::string& name) {
    for (const DtypeSize& d : kDtypes)
        if (name == d.name) return d.n_bytes;
    return 0;
}

float half_to_float(uint16_t h) {  // IEEE 754 binary16
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const float sign = h & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(float(fraction), -24);
    return sign * std::ldexp(float(1024 + fraction), exponent - 25);
}

// One header entry, as far as it can be checked alone.
SafetensorsEntry parse_entry(const std::string& where, const nlohmann::json& j) {
    const auto refuse = [&](const std::string& what) { fail(Exit::checkpoint, "{}: {}", where, what); };
    if (!j.is_object() || j.size() != 3 || !j.contains("dtype") || !j.contains("shape") || !j.contains("data_offsets"))
        refuse("expected an object with dtype, shape and data_offsets");
    SafetensorsEntry e;
    if (!j["dtype"].is_string()) refuse("dtype is not a string");
    e.dtype = j["dtype"].get<std::string>();
    size_t n_bytes = dtype_size(e.dtype);
    if (n_bytes == 0) refuse("unknown dtype " + e.dtype);
    const auto& offsets = j["data_offsets"];
    if (!j["shape"].is_array() || !offsets.is_array() || offsets.size() != 2)
        refuse("shape or data_offsets is not a list");
    for (const auto& d : j["shape"]) {
        if (!d.is_number_unsigned()) refuse("a dimension is not a whole number");
        e.shape.push_back(d.get<size_t>());
        if (__builtin_mul_overflow(n_bytes, e.shape.back(), &n_bytes)) refuse("the shape's size overflows 64 bits");
    }
    if (!offsets[0].is_number_unsigned() || !offsets[1].is_number_unsigned())
        refuse("a data offset is not a whole number");
    e.begin = offsets[0].get<size_t>();
    e.end = offsets[1].get<size_t>();
    if (e.begin > e.end || e.end - e.begin != n_bytes)
        refuse(fmt::format("data_offsets [{}, {}) hold other than the {} bytes of its shape", e.begin, e.end, n_bytes));
    return e;
}

// Tensors must cover the data exactly: no hole, no overlap, nothing behind the last.
void check_coverage(const std::string& file, const std::map<std::string, SafetensorsEntry>& entries,
                    size_t data_bytes) {
    std::vector<std::pair<size_t, size_t>> ranges;
    for (const auto& [name, e] : entries) ranges.emplace_back(e.begin, e.end);
    std::sort(ranges.begin(), ranges.end());
    size_t at = 0;
    for (const auto& [begin, end] : ranges) {
        if (begin != at)
            fail(Exit::checkpoint, "{}: tensors leave a hole or overlap at data byte {}", file, std::min(at, begin));
        at = end;
    }
    if (at != data_bytes)
        fail(Exit::checkpoint,
             "{}: the tensors take {} bytes, the file holds {} bytes of data: truncated or with bytes added", file, at,
             data_bytes);
}
}  // namespace

SafetensorsWriter::SafetensorsWriter(const fs::path& path, const std::vector<Tensor>& tensors) : file_(path) {
    nlohmann::ordered_json header;
    header["__metadata__"] = {{"format", "pt"}};  // what Hugging Face's loader asks for
    size_t at = 0;
    for (const Tensor& t : tensors) {
        size_t n_bytes = sizeof(float);
        for (size_t d : t.shape) n_bytes *= d;
        header[t.name] = {{"dtype", "F32"}, {"shape", t.shape}, {"data_offsets", {at, at + n_bytes}}};
        at += n_bytes;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');  // data starts on 8 bytes
    const uint64_t length = text.size();
    expected_ = 8 + length + at;
    put(&length, 8);
    put(text.data(), text.size());
}

void SafetensorsWriter::put(const void* data, size_t n_bytes) {
    hasher_.update(data, n_bytes);
    file_.write(data, n_bytes);
    written_ += n_bytes;
}
void SafetensorsWriter::write(const float* data, size_t count) { put(data, count * sizeof(float)); }

SafetensorsWriter::Written SafetensorsWriter::close() {
    CHECK_THAT(written_ == expected_, "{} bytes written, the header promises {}", written_, expected_);
    file_.close();
    return {written_, hasher_.digest()};
}

SafetensorsFile::SafetensorsFile(const fs::path& path) : file_(path, Exit::checkpoint) {
    const std::string name = path.string();
    const size_t size = file_.bytes().size();
    uint64_t length = 0;
    if (size < 8) fail(Exit::checkpoint, "{}: {} bytes; a safetensors file has at least 8", name, size);
    file_.read(0, &length, 8);
    if (length > kMaxHeader || length > size - 8)
        fail(Exit::checkpoint, "{}: a header of {} bytes; the file has {}, the format allows {}", name, length,
             size - 8, kMaxHeader);
    std::string text(length, '\0');
    file_.read(8, text.data(), length);
    if (text.empty() || text[0] != '{') fail(Exit::checkpoint, "{}: the header does not start with '{{'", name);
    const nlohmann::json header = parse_json(text, name, Exit::checkpoint);
    for (const auto& [key, value] : header.items()) {
        if (key == "__metadata__") {
            if (!value.is_object()) fail(Exit::checkpoint, "{}: __metadata__ is not an object", name);
            for (const auto& [k, v] : value.items())
                if (!v.is_string()) fail(Exit::checkpoint, "{}: __metadata__.{} is not a string", name, k);
            continue;
        }
        entries_[key] = parse_entry(name + ": " + key, value);
    }
    data_begin_ = 8 + length;
    check_coverage(name, entries_, size - data_begin_);
}

void SafetensorsFile::read(const SafetensorsEntry& e, size_t first, size_t count, float* to) const {
    if (e.dtype == "F32") return file_.read(data_begin_ + e.begin + first * 4, to, count * 4);
    if (e.dtype != "BF16" && e.dtype != "F16")
        fail(Exit::checkpoint, "{}: tensors of dtype {} cannot be weights; expected F32, BF16 or F16", path().string(),
             e.dtype);
    std::vector<uint16_t> half(count);
    file_.read(data_begin_ + e.begin + first * 2, half.data(), count * 2);
    for (size_t i = 0; i < count; i++) {
        bf16 b;
        b.bits = half[i];
        to[i] = e.dtype == "BF16" ? float(b) : half_to_float(half[i]);
    }
}
