#include "common/arena.h"

#include <cctype>
#include <utility>

namespace {
// "h.11.attn.c_attn.weight" -> "h.*.attn.c_attn.weight"
std::string fold_layer(const std::string& name) {
    std::string out;
    for (size_t i = 0; i < name.size();) {
        const bool starts_number = std::isdigit(static_cast<unsigned char>(name[i])) && i > 0 && name[i - 1] == '.';
        if (!starts_number) {
            out += name[i++];
            continue;
        }
        while (i < name.size() && std::isdigit(static_cast<unsigned char>(name[i]))) i++;
        out += '*';
    }
    return out;
}
}  // namespace

Arena::Arena(Arena&& o) noexcept
    : name_(std::move(o.name_)),
      tensors_(std::move(o.tensors_)),
      align_(o.align_),
      n_bytes_(o.n_bytes_),
      base_(std::exchange(o.base_, nullptr)),
      allocator_(o.allocator_) {}

Arena::~Arena() {
    if (base_ && allocator_.free) allocator_.free(base_);
}

void Arena::add(Buf& where, std::string tensor, size_t count, DType dtype) {
    CHECK_THAT(!base_, "arena {}: add({}) after allocate()", name_, tensor);
    tensors_.push_back({&where, std::move(tensor), count, n_bytes_, dtype});
    n_bytes_ += (count * dtype_bytes(dtype) + align_ - 1) / align_ * align_;
}

void Arena::allocate(Allocator allocator, const Zero& zero) {
    CHECK_THAT(!base_, "arena {}: allocate() twice", name_);
    if (n_bytes_ == 0) return;
    void* const base = allocator.alloc(n_bytes_);
    allocator_ = allocator;
    place(base, zero);
}

void Arena::place(void* base, const Zero& zero) {
    CHECK_THAT(!base_, "arena {}: placed twice", name_);
    if (n_bytes_ == 0) return;
    base_ = base;
    zero(base_, n_bytes_);
    for (const Tensor& t : tensors_) *t.where = Buf(static_cast<char*>(base_) + t.offset, t.count, t.dtype);
}

Buf Arena::flat(DType dtype) const {
    for (const Tensor& t : tensors_)
        CHECK_THAT(t.dtype == dtype, "arena {}: {} is {}, not {}", name_, t.name, dtype_name(t.dtype),
                   dtype_name(dtype));
    return {base_, n_bytes_ / dtype_bytes(dtype), dtype};
}

std::string Arena::table() const {
    struct Row {
        std::string name;
        size_t tensors, count, n_bytes;
    };
    std::vector<Row> rows;
    for (const Tensor& t : tensors_) {
        const std::string kind = fold_layer(t.name);
        Row* row = nullptr;
        for (Row& r : rows)
            if (r.name == kind) row = &r;
        if (!row) row = &rows.emplace_back(Row{kind, 0, 0, 0});
        row->tensors++;
        row->count += t.count;
        row->n_bytes += t.count * dtype_bytes(t.dtype);
    }
    std::string out = fmt::format("{}: {}\n", name_, human_bytes(n_bytes_));
    for (const Row& r : rows)
        out += fmt::format("  {:<28} {:>4} x {:>12} = {:>10}\n", r.name, r.tensors, r.count / r.tensors,
                           human_bytes(r.n_bytes));
    return out;
}

std::string human_bytes(size_t n_bytes) {
    const char* unit[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double v = double(n_bytes);
    int u = 0;
    while (v >= 1024 && u < 4) v /= 1024, u++;
    return u == 0 ? fmt::format("{} B", n_bytes) : fmt::format("{:.{}f} {}", v, v < 10 ? 2 : v < 100 ? 1 : 0, unit[u]);
}
