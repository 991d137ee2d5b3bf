#include "trainer/windows.h"

#include <algorithm>

Windows::Windows(const std::vector<FlatParam>& flat, int n_blocks, const ShardLayout& layout, int n_slots)
    : flat_(flat), n_slots_(n_slots), slots_(size_t(n_slots) + 1) {
    const auto first_block = std::ranges::find(flat, 0, [](const FlatParam& p) { return p.info.block; });
    CHECK_THAT(first_block != flat.begin() && first_block != flat.end(), "expected an embedding and then blocks");
    const size_t embedding_end = first_block->range.first;
    content_ = block_ranges(flat, n_blocks);
    content_.front() = {embedding_end, content_.front().end() - embedding_end};
    content_.insert(content_.begin(), {0, embedding_end});
    for (const Range& content : content_) {
        const size_t first = layout.row(layout.row_of(content.first)).first,
                     end = layout.row(layout.row_of(content.end() - 1)).end();
        span_.push_back({first, end - first});
    }
}

void Windows::plan(Arena& arena, DType t) {
    for (int slot = 0; slot <= n_slots_; slot++) {
        size_t largest = 0;
        for (int w = 0; w <= last(); w++)
            if (slot_of(w) == slot) largest = std::max(largest, span(w).count);
        arena.add(slots_[size_t(slot)], slot == 0 ? "embedding" : "block", largest, t);
    }
}

Buf Windows::part(int window, Range of_flat) const {
    const Range all = span(window);
    CHECK_THAT(of_flat.first >= all.first && of_flat.end() <= all.end(), "elements {} to {} of window {}: {} to {}",
               of_flat.first, of_flat.end(), window, all.first, all.end());
    return slots_[size_t(slot_of(window))].slice(of_flat.first - all.first, of_flat.count);
}

void Windows::bind(Tensors& tensors) const {
    tensors.resize(flat_.size());
    int window = 0;
    for (size_t i = 0; i < flat_.size(); i++) {
        while (flat_[i].range.first >= content(window).end()) window++;
        tensors[i] = part(window, {flat_[i].range.first, flat_[i].info.count()});
    }
}
