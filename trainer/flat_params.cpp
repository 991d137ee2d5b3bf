#include "trainer/flat_params.h"

#include <algorithm>

std::vector<FlatParam> flat_params(const std::vector<ParamInfo>& list) {
    std::vector<FlatParam> out;
    size_t first = 0;
    for (const ParamInfo& info : list) {
        const size_t count = (info.count() + kDecayBlock - 1) / kDecayBlock * kDecayBlock;
        out.push_back({info, {first, count}});
        first += count;
    }
    return out;
}

std::vector<FlatParam> cut_params(const std::vector<FlatParam>& flat, Range part) {
    std::vector<FlatParam> out;
    for (const auto& [info, range] : flat) {
        const size_t first = std::max(range.first, part.first), end = std::min(range.end(), part.end());
        if (first >= end) continue;
        ParamInfo piece = info;
        piece.shape = {std::min(end, range.first + info.count()) - first};
        piece.n_rows_saved = piece.shape[0];
        out.push_back({piece, {first - part.first, end - first}});
    }
    return out;
}

std::vector<Range> block_ranges(const std::vector<FlatParam>& flat, int n_blocks) {
    std::vector<Range> out;
    size_t first = 0;
    for (int block = 0; block < n_blocks; block++) {
        const auto next = std::ranges::find(flat, block + 1, [](const FlatParam& p) { return p.info.block; });
        const size_t end = next == flat.end() ? flat.back().range.end() : next->range.first;
        CHECK_THAT((next == flat.end()) == (block + 1 == n_blocks) && end > first,
                   "expected the parameters of {} blocks, one block after the other; not so behind block {}", n_blocks,
                   block);
        out.push_back({first, end - first});
        first = end;
    }
    return out;
}
