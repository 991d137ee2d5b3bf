#include "trainer/shards.h"

#include <algorithm>
#include <utility>

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
    for (int i = 0; i < n_rows(); i++)
        for (FlatParam& piece : cut_params(flat, owned(i, rank))) {
            piece.range.first += in_shard(i).first;
            out.push_back(std::move(piece));
        }
    return out;
}
