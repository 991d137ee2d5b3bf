#include "comm/gradient_reduce_scatter.h"

#include <bit>

namespace {
class ByCarrier final : public GradientReduceScatter {
  public:
    explicit ByCarrier(const Group& group) : device_(group.device()) {}
    void sum(Buf parts, Buf mine, Stream s) override { device_.reduce_scatter_sum(parts, mine, s); }

  private:
    DeviceComm& device_;
};

class Ordered final : public GradientReduceScatter {
  public:
    Ordered(const Group& group, size_t longest) : group_(group), longest_(longest) {
        CHECK_THAT(std::has_single_bit(unsigned(group.size())), "ordered needs a power of two, not {} ranks",
                   group.size());
    }
    void plan(Arena& arena) override {
        arena.add(received_, "reduction's parts", size_t(group_.size()) * longest_, DType::f32);
    }
    void sum(Buf parts, Buf mine, Stream s) override {
        const Buf received = received_.slice(0, parts.count);  // (ranks, u)
        group_.device().all_to_all(parts, received, s);
        group_.backend().tree_sum({.y = mine, .x = received, .parts = group_.size()}, s);
    }

  private:
    const Group& group_;
    const size_t longest_;
    Buf received_;  // (ranks, longest) f32
};

class Ring final : public GradientReduceScatter {
  public:
    Ring(const Group& group, size_t longest) : group_(group), longest_(longest) {}
    void plan(Arena& arena) override { arena.add(received_, "reduction's parts", longest_, DType::f32); }
    void sum(Buf parts, Buf mine, Stream s) override {
        const int size = group_.size(), rank = group_.rank();
        const Backend& k = group_.backend();
        const Buf received = received_.slice(0, mine.count);  // (u)
        const auto block = [&](int of) { return parts.slice(size_t((of + size) % size) * mine.count, mine.count); };
        // The sum of block b begins on rank b + 1 and ends on rank b.
        for (int hop = 1; hop < size; hop++) {
            group_.device().send_recv(block(rank - hop), (rank + 1) % size, received, (rank + size - 1) % size, s);
            k.add({.y = block(rank - hop - 1), .x = received}, s);
        }
        k.copy(mine.data, block(rank).data, mine.n_bytes(), s);
    }

  private:
    const Group& group_;
    const size_t longest_;
    Buf received_;  // (longest) f32
};
}  // namespace

std::unique_ptr<GradientReduceScatter> make_gradient_reduce_scatter(const Group& group, AllReduce how, size_t longest) {
    if (group.size() == 1) return std::make_unique<ByCarrier>(group);
    switch (how) {
        case AllReduce::ordered:
            return std::make_unique<Ordered>(group, longest);
        case AllReduce::ring:
            return std::make_unique<Ring>(group, longest);
        case AllReduce::mpi:
        case AllReduce::nccl:
            break;
    }
    return std::make_unique<ByCarrier>(group);
}
