#include "comm/gradient_all_reduce.h"

#include <algorithm>

#include "comm/staging.h"

namespace {
void check_size(Buf grad, size_t n) {
    CHECK_THAT(grad.count <= n && grad.dtype == DType::f32,
               "a gradient of {} {}, the reduction was made for at most {} f32", grad.count, dtype_name(grad.dtype), n);
}

std::string name_of(AllReduce how, Payload payload) {
    return fmt::format("{}{}", all_reduce_name(how), payload == Payload::bf16 ? " in bf16" : "");
}

class OneRank final : public GradientAllReduce {
  public:
    void sum(Buf, Stream) override {}
    const char* name() const override { return "one rank"; }
};

// In place, on a backend whose memory the host addresses and whose work is done when a call returns.
class InPlaceSum final : public GradientAllReduce {
  public:
    InPlaceSum(Comm& host, AllReduce how, Payload payload, size_t n)
        : host_(host), how_(how), payload_(payload), n_(n), name_(name_of(how, payload)) {}
    void sum(Buf grad, Stream) override {
        check_size(grad, n_);
        all_reduce(host_, {grad.as<float>(), grad.count}, how_, payload_);
    }
    const char* name() const override { return name_.c_str(); }
    bool needs_host() const override { return true; }

  private:
    Comm& host_;
    const AllReduce how_;
    const Payload payload_;
    const size_t n_;
    const std::string name_;
};

// Device -> pinned memory -> all_reduce() -> device, in the pieces that all_reduce() itself would work in, so that the
// bits are those of one call.
class StagedSum final : public GradientAllReduce {
  public:
    StagedSum(const Backend& k, Comm& host, AllReduce how, Payload payload, size_t n)
        : host_(host),
          how_(how),
          payload_(payload),
          n_(n),
          name_(name_of(how, payload) + " through host memory"),
          staging_(k, std::min(n, all_reduce_piece(host.size())) * sizeof(float)) {}

    void sum(Buf grad, Stream s) override {
        check_size(grad, n_);
        staging_.transform(grad, s, [&](std::span<float> piece) { all_reduce(host_, piece, how_, payload_); });
    }
    const char* name() const override { return name_.c_str(); }
    bool needs_host() const override { return true; }

  private:
    Comm& host_;
    const AllReduce how_;
    const Payload payload_;
    const size_t n_;
    const std::string name_;
    Staging staging_;
};

// One call of NCCL's for the whole gradient.
class Nccl final : public GradientAllReduce {
  public:
    Nccl(DeviceComm& device, size_t n) : device_(device), n_(n) {}
    void sum(Buf grad, Stream s) override {
        check_size(grad, n_);
        device_.all_reduce_sum(grad, s);
    }
    const char* name() const override { return "nccl"; }

  private:
    DeviceComm& device_;
    const size_t n_;
};

// The gradient is cut into pieces, and a piece into one shard for each rank.  A rank receives its shard from all ranks,
// sums these by the tree, and sends the sum to all.  The sizes of pieces and shards change no bit.  The last few
// elements, too few to make a shard for every rank, go to every rank, and every rank sums them.
class OrderedByNccl final : public GradientAllReduce {
  public:
    OrderedByNccl(const Backend& k, DeviceComm& device, size_t n, size_t longest)
        : k_(k),
          device_(device),
          n_(n),
          shard_(std::min(n / (ranks() * kShardUnit) * kShardUnit, longest ? longest : affordable(ranks()))) {}
    void plan(Arena& arena) override {
        arena.add(parts_, "reduction's parts", ranks() * std::max(shard_, ranks() * kShardUnit), DType::f32);
    }
    void sum(Buf grad, Stream s) override {
        check_size(grad, n_);
        const size_t tail_count = grad.count % (ranks() * kShardUnit), whole = grad.count - tail_count;
        for (size_t start = 0; start < whole; start += ranks() * shard_) {
            const size_t n = std::min(shard_, (whole - start) / ranks());
            const Buf piece = grad.slice(start, ranks() * n);             // (ranks, n)
            const Buf mine = piece.slice(size_t(device_.rank()) * n, n);  // (n)
            device_.all_to_all(piece, parts(n), s);
            k_.tree_sum({.y = mine, .x = parts(n), .parts = device_.size()}, s);
            device_.all_gather(mine, piece, s);
        }
        if (!tail_count) return;
        const Buf tail = grad.slice(whole, tail_count);  // (tail_count)
        device_.all_gather(tail, parts(tail_count), s);
        k_.tree_sum({.y = tail, .x = parts(tail_count), .parts = device_.size()}, s);
    }
    const char* name() const override { return "ordered, moved by nccl"; }

  private:
    static constexpr size_t kShardUnit = 4;  // shards begin on 16 bytes
    // 64 MiB of scratch memory, where that makes shards of 2^18 to 2^22 elements.  In shorter shards the fixed cost of
    // a message exceeds the time of its bytes.
    static constexpr size_t affordable(size_t ranks) {
        return std::clamp((size_t(1) << 24) / ranks, size_t(1) << 18, size_t(1) << 22) / kShardUnit * kShardUnit;
    }
    size_t ranks() const { return size_t(device_.size()); }
    Buf parts(size_t n) const { return parts_.slice(0, ranks() * n); }  // (ranks, n)

    const Backend& k_;
    DeviceComm& device_;
    const size_t n_, shard_;
    Buf parts_;  // (ranks, max(shard_, a tail)) f32
};
}  // namespace

std::unique_ptr<GradientAllReduce> make_gradient_all_reduce(const Group& group, AllReduce how, size_t n,
                                                            Payload payload, size_t longest_shard) {
    const Backend& k = group.backend();
    if (group.size() == 1) return std::make_unique<OneRank>();
    CHECK_THAT(how != AllReduce::ordered || (group.size() & (group.size() - 1)) == 0,
               "ordered reduction over {} ranks; needs a power of two", group.size());
    const bool between_devices = !group.device().needs_host();
    CHECK_THAT(how != AllReduce::nccl || between_devices, "the nccl reduction needs a communicator between devices");
    CHECK_THAT(payload == Payload::fp32 || !between_devices, "gradients in bf16 go through host memory");
    if (how == AllReduce::nccl) return std::make_unique<Nccl>(group.device(), n);
    if (k.host_addressable) return std::make_unique<InPlaceSum>(group.host(), how, payload, n);
    if (how == AllReduce::ordered && between_devices)
        return std::make_unique<OrderedByNccl>(k, group.device(), n, longest_shard);
    return std::make_unique<StagedSum>(k, group.host(), how, payload, n);
}
