// Arena: many named tensors in one flat piece of memory.  First add() them all, then allocate() or place() once: sizes
// are known and printable before any memory is taken.  Tensors lie in the order of add(), each on an aligned boundary,
// zeroed.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "common/buf.h"

// Where an arena gets its memory from: a backend's alloc and free.  alloc throws Error(Exit::memory).
struct Allocator {
    void* (*alloc)(size_t n_bytes);
    void (*free)(void*);
};

class Arena {
  public:
    static constexpr size_t kAlign = 512;  // bytes: 64 doubles

    explicit Arena(std::string name, size_t align = kAlign) : name_(std::move(name)), align_(align) {}
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    Arena(Arena&& o) noexcept;
    Arena& operator=(Arena&&) = delete;
    ~Arena();

    // `zero` writes n bytes of zero into the backend's memory.
    using Zero = std::function<void(void*, size_t n_bytes)>;

    // Plans a tensor; `where` is filled in later and must stay at its address until then.
    void add(Buf& where, std::string tensor, size_t count, DType dtype);
    // Takes the memory and fills in every planned Buf.
    void allocate(Allocator allocator, const Zero& zero);
    // The same in memory of n_bytes() that the caller owns, on a boundary of kAlign.
    void place(void* base, const Zero& zero);

    const std::string& name() const { return name_; }
    size_t n_bytes() const { return n_bytes_; }
    // All of it, padding included, as one buffer; every tensor must have this dtype.
    Buf flat(DType dtype) const;
    Buf bytes() const { return {base_, n_bytes_, DType::u8}; }
    // A line per kind of tensor (layer numbers folded to *): name, tensors, elements, bytes.
    std::string table() const;

  private:
    struct Tensor {
        Buf* where;
        std::string name;
        size_t count, offset;  // elements, bytes
        DType dtype;
    };
    std::string name_;
    std::vector<Tensor> tensors_;
    size_t align_, n_bytes_ = 0;
    void* base_ = nullptr;
    Allocator allocator_{};  // empty: the memory is someone else's
};

// "1.50 GiB", "12.0 MiB", "512 B".
std::string human_bytes(size_t n_bytes);
