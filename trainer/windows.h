// Windows: memory for a flat buffer of which only some blocks are there at a time (ZeRO-2 and 3).
//
// Window 0 holds the embedding and has memory of its own; window b + 1 holds the parameters of block b, and the last
// window those behind it.  The windows of blocks share a few slots in turn.  A window spans the rows of a ShardLayout
// that its parameters touch, so neighbours overlap in up to one row.
#pragma once
#include "model/architecture.h"
#include "trainer/shards.h"

class Windows {
  public:
    Windows(const std::vector<FlatParam>& flat, int n_blocks, const ShardLayout& layout, int n_slots);
    // Plans the memory; call the functions below when it is placed.
    void plan(Arena& arena, DType t);

    int last() const { return int(content_.size()) - 1; }
    // Elements of the flat buffer: those of the window's parameters, and all that it spans.
    Range content(int window) const { return content_[size_t(window)]; }
    Range span(int window) const { return span_[size_t(window)]; }
    bool share_slot(int one, int other) const { return slot_of(one) == slot_of(other); }
    Buf memory(int window) const { return part(window, span(window)); }  // (span(window).count)
    Buf part(int window, Range of_flat) const;                           // (of_flat.count)
    // Makes each parameter's tensor the place that its window has for it.
    void bind(Tensors& tensors) const;

  private:
    int slot_of(int window) const { return window == 0 ? 0 : 1 + (window - 1) % n_slots_; }

    const std::vector<FlatParam> flat_;
    const int n_slots_;
    std::vector<Range> content_, span_;  // (windows)
    std::vector<Buf> slots_;             // (1 + n_slots): the embedding's first
};
