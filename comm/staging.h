// Staging: pinned host memory through which messages of hosts reach memory that the host does not address.
#pragma once
#include <algorithm>
#include <array>
#include <span>

#include "kernels/owners.h"

class Staging {
  public:
    // Two slots of slot_bytes.  Longer buffers pass in pieces.
    Staging(const Backend& k, size_t slot_bytes)
        : k_(k), slot_bytes_(slot_bytes), slots_{Slot(k, slot_bytes), Slot(k, slot_bytes)}, free_(k) {}

    // work(piece) changes each piece of data (n) f32 on the host, in ascending order.  Meanwhile the next piece comes
    // down.
    template <class F>
    void transform(Buf data, Stream s, F&& work) {
        k_.wait_mark(free_.get());
        const size_t longest = slot_bytes_ / sizeof(float);
        const auto piece = [&](size_t i) {
            return data.slice(i * longest, std::min(longest, data.count - i * longest));
        };
        // The slot's former piece goes up before this one comes down: both are on the stream, in this order.
        const auto fetch = [&](size_t i) {
            if (i * longest >= data.count) return;
            const Slot& slot = slots_[i % 2];
            const Buf part = piece(i);  // (<= longest)
            k_.download(slot.memory.as<void>(), part.data, part.n_bytes(), s);
            k_.set_mark(slot.fetched.get(), s);
        };
        fetch(0);
        for (size_t i = 0; i * longest < data.count; i++) {
            fetch(i + 1);
            const Slot& slot = slots_[i % 2];
            const Buf part = piece(i);  // (<= longest)
            k_.wait_mark(slot.fetched.get());
            work(std::span(slot.memory.as<float>(), part.count));
            k_.upload(part.data, slot.memory.as<void>(), part.n_bytes(), s);
        }
        k_.set_mark(free_.get(), s);
    }

    struct Blocks {  // n of equal length, or none
        Buf buf;     // (n, length)
        size_t n = 0;
        size_t n_bytes() const { return n ? buf.n_bytes() / n : 0; }  // of one
    };
    // messages(down, n_down, up, n_up) sends a piece of every block of `from` and receives one of every block of `to`,
    // on the host: n_down and n_up bytes of each block.  Where the blocks of one side are shorter, its last pieces are
    // empty.
    template <class F>
    void exchange(Blocks from, Blocks to, Stream s, F&& messages) {
        k_.wait_mark(free_.get());
        const size_t longest = slot_bytes_ / std::max(from.n, to.n) / 8 * 8;
        char *const down = slots_[0].memory.template as<char>(), *const up = slots_[1].memory.template as<char>();
        for (size_t at = 0; at < std::max(from.n_bytes(), to.n_bytes()); at += longest) {
            const auto left = [&](const Blocks& b) {
                return std::min(longest, b.n_bytes() - std::min(at, b.n_bytes()));
            };
            const size_t n_down = left(from), n_up = left(to);
            for (size_t b = 0; b < from.n && n_down; b++) k_.download(down + b * n_down, place(from, b, at), n_down, s);
            k_.synchronize(s);  // and the piece before has gone up
            messages(down, n_down, up, n_up);
            for (size_t b = 0; b < to.n && n_up; b++) k_.upload(place(to, b, at), up + b * n_up, n_up, s);
        }
        k_.set_mark(free_.get(), s);
    }

  private:
    struct Slot {
        HostBuffer memory;  // (slot_bytes_)
        MarkOwner fetched;  // a piece of transform() has come down
        Slot(const Backend& k, size_t n_bytes) : memory(k, n_bytes), fetched(k) {}
    };
    static char* place(const Blocks& b, size_t block, size_t at) {
        return static_cast<char*>(b.buf.data) + block * b.n_bytes() + at;
    }

    const Backend& k_;
    const size_t slot_bytes_;
    std::array<Slot, 2> slots_;
    MarkOwner free_;  // the last call's uploads are done, on whichever stream they were
};
