#include "trainer/shards.h"

#include <algorithm>

#include "kernels/ops.h"

ShardLayout::ShardLayout(size_t n, int size, size_t max_row)
    : n_(n),
      size_(size_t(size)),
      row_(std::max<size_t>(1, max_row / (size_ * kGradNormChunk)) * size_ * kGradNormChunk) {
    const size_t whole = n / row_ * row_, chunks = (n - whole + kGradNormChunk - 1) / kGradNormChunk;
    padded_ = whole + (chunks + size_ - 1) / size_ * size_ * kGradNormChunk;
}

Range ShardLayout::row(int i) const {
    const size_t first = size_t(i) * row_;
    return {first, std::min(row_, padded_ - first)};
}

Range ShardLayout::unit(int i, int rank) const {
    const Range all = row(i);
    const size_t count = all.count / size_;
    return {all.first + size_t(rank) * count, count};
}

Range ShardLayout::in_shard(int i) const {
    const Range all = row(i);
    return {all.first / size_, all.count / size_};
}

Range ShardLayout::owned(int i, int rank) const {
    const Range all = unit(i, rank);
    const size_t end = std::min(all.end(), n_);
    return {all.first, end - std::min(end, all.first)};
}

size_t ShardLayout::owned_count(int rank) const {
    size_t count = 0;
    for (int i = 0; i < n_rows(); i++) count += owned(i, rank).count;
    return count;
}

std::vector<FlatParam> ShardLayout::pieces(const std::vector<FlatParam>& flat, int rank) const {
    std::vector<FlatParam> out;
    for (const FlatParam& p : flat)
        for (int i = row_of(p.range.first); i < n_rows() && row(i).first < p.range.end(); i++) {
            const Range mine = owned(i, rank);
            const size_t first = std::max(p.range.first, mine.first), end = std::min(p.range.end(), mine.end());
            if (first < end) out.push_back({p.info, {in_shard(i).first + first - mine.first, end - first}});
        }
    return out;
}
