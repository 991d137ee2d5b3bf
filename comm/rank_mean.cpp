#include "comm/rank_mean.h"

#include <algorithm>

namespace {
// Elements of a shard in one message.  It bounds the scratch memory, and changes no bit: blocks of int4 stay whole.
constexpr size_t kPiece = size_t(1) << 18;
static_assert(kPiece % kInt4Block == 0);

std::span<float> part(std::span<float> all, size_t first, size_t n) {
    return all.empty() ? all : all.subspan(first, n);
}

// Packs x; `error` gets what rounding left out of x + error, which x becomes.
void pack_with_error(OuterDtype t, std::span<float> x, std::span<float> error, std::byte* to) {
    for (size_t i = 0; i < error.size(); i++) x[i] += error[i];
    pack(t, x, to);
    if (error.empty()) return;
    unpack(t, to, error);
    for (size_t i = 0; i < error.size(); i++) error[i] = x[i] - error[i];
}

// The parts' sum as a balanced tree in their order replaces the first part.
void tree_sum(float* x, size_t parts, size_t n) {  // x (parts, n)
    for (size_t step = 1; step < parts; step *= 2)
        for (size_t p = 0; p + step < parts; p += 2 * step)
            for (size_t i = 0; i < n; i++) x[p * n + i] += x[(p + step) * n + i];
}
}  // namespace

void RankMean::mean(std::span<float> x, std::span<float> error) {
    const size_t ranks = size_t(comm_.size()), me = size_t(comm_.rank()), shard = (x.size() + ranks - 1) / ranks;
    for (size_t at = 0; at < shard; at += kPiece) {
        const size_t longest = std::min(kPiece, shard - at), n_bytes = packed_bytes(dtype_, longest);
        const auto piece = [&](std::span<float> all, size_t rank) {  // of this rank's shard
            const size_t first = std::min(x.size(), rank * shard + at);
            return part(all, first, std::min({longest, x.size() - first, (rank + 1) * shard - first}));
        };
        send_.resize(ranks * n_bytes), recv_.resize(ranks * n_bytes), parts_.resize(ranks * longest);
        for (size_t r = 0; r < ranks; r++)
            if (r != me) pack_with_error(dtype_, piece(x, r), piece(error, r), &send_[r * n_bytes]);
        comm_.all_to_all(send_.data(), recv_.data(), n_bytes);
        const std::span<float> own = piece(x, me);
        for (size_t r = 0; r < ranks; r++)
            if (r != me) unpack(dtype_, &recv_[r * n_bytes], {&parts_[r * longest], own.size()});
        std::ranges::copy(own, &parts_[me * longest]);
        tree_sum(parts_.data(), ranks, longest);
        for (size_t i = 0; i < own.size(); i++) own[i] = parts_[i] / float(ranks);
        pack_with_error(dtype_, own, piece(error, me), send_.data());
        comm_.all_gather(send_.data(), recv_.data(), n_bytes);
        for (size_t r = 0; r < ranks; r++) unpack(dtype_, &recv_[r * n_bytes], piece(x, r));
    }
}
