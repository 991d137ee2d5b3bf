#include "comm/gradient_all_reduce.h"

#include <algorithm>

#include "comm/staging.h"

namespace {
void check_size(Buf grad, size_t n) {
    CHECK_THAT(grad.count == n && grad.dtype == DType::f32, "a gradient of {} {}, the reduction was made for {} f32",
               grad.count, dtype_name(grad.dtype), n);
}

class OneRank final : public GradientAllReduce {
  public:
    explicit OneRank(const Backend& k) : k_(k) {}
    void sum(Buf, Stream) override {}
    void wait(Stream s) override { k_.synchronize(s); }
    const char* name() const override { return "one rank"; }

  private:
    const Backend& k_;
};

// In memory that the host addresses, of a backend whose work is done when a call returns.
class InPlace final : public GradientAllReduce {
  public:
    InPlace(Comm& comm, AllReduce how, size_t n) : comm_(comm), how_(how), n_(n) {}
    void sum(Buf grad, Stream) override {
        check_size(grad, n_);
        all_reduce(comm_, {grad.as<float>(), n_}, how_);
    }
    void wait(Stream) override {}
    const char* name() const override { return all_reduce_name(how_); }
    bool needs_host() const override { return true; }

  private:
    Comm& comm_;
    const AllReduce how_;
    const size_t n_;
};

// Device -> pinned memory -> all_reduce() -> device, in the pieces that all_reduce() itself would work in, so that the
// bits are those of one call.
class Staged final : public GradientAllReduce {
  public:
    Staged(const Backend& k, Comm& comm, AllReduce how, size_t n)
        : k_(k),
          comm_(comm),
          how_(how),
          n_(n),
          name_(fmt::format("{} through host memory", all_reduce_name(how))),
          staging_(k, std::min(n, all_reduce_piece(comm.size())) * sizeof(float)) {}

    void sum(Buf grad, Stream s) override {
        check_size(grad, n_);
        staging_.transform(grad, s, [&](std::span<float> piece) { all_reduce(comm_, piece, how_); });
    }
    void wait(Stream s) override { k_.synchronize(s); }
    const char* name() const override { return name_.c_str(); }
    bool needs_host() const override { return true; }

  private:
    const Backend& k_;
    Comm& comm_;
    const AllReduce how_;
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
        if (n_) device_.all_reduce_sum(grad, s);
    }
    void wait(Stream s) override { device_.wait(s); }
    const char* name() const override { return "nccl"; }

  private:
    DeviceComm& device_;
    const size_t n_;
};

// Every rank gets one shard of a piece from all ranks, sums it by the tree, and hands it to all.  Sums are element by
// element: the sizes of pieces and shards do not touch the bits.  The last few elements, too few to make a shard for
// every rank, go to every rank, and every rank sums them.
class OrderedByNccl final : public GradientAllReduce {
  public:
    OrderedByNccl(const Backend& k, DeviceComm& device, size_t n, size_t longest)
        : k_(k),
          device_(device),
          n_(n),
          tail_(n % (ranks() * kShardUnit)),
          shard_(std::min((n - tail_) / ranks(), longest ? longest : affordable(ranks()))) {}
    void plan(Arena& arena) override {
        arena.add(parts_, "reduction's parts", ranks() * std::max(shard_, tail_), DType::f32);
    }
    void sum(Buf grad, Stream s) override {
        check_size(grad, n_);
        for (size_t start = 0; start < n_ - tail_; start += ranks() * shard_) {
            const size_t n = std::min(shard_, (n_ - tail_ - start) / ranks());
            const Buf piece = grad.slice(start, ranks() * n);             // (ranks, n)
            const Buf mine = piece.slice(size_t(device_.rank()) * n, n);  // (n)
            device_.all_to_all(piece, parts(n), s);
            k_.tree_sum({.y = mine, .x = parts(n), .parts = device_.size()}, s);
            device_.all_gather(mine, piece, s);
        }
        if (!tail_) return;
        const Buf tail = grad.slice(n_ - tail_, tail_);
        device_.all_gather(tail, parts(tail_), s);
        k_.tree_sum({.y = tail, .x = parts(tail_), .parts = device_.size()}, s);
    }
    void wait(Stream s) override { device_.wait(s); }
    const char* name() const override { return "ordered, moved by nccl"; }

  private:
    static constexpr size_t kShardUnit = 4;  // shards begin on 16 bytes
    // 64 MiB of scratch memory, but no shard below 2^18 elements, where messages cost more than their bytes, or above
    // 2^22.
    static constexpr size_t affordable(size_t ranks) {
        return std::clamp((size_t(1) << 24) / ranks, size_t(1) << 18, size_t(1) << 22) / kShardUnit * kShardUnit;
    }
    size_t ranks() const { return size_t(device_.size()); }
    Buf parts(size_t n) const { return parts_.slice(0, ranks() * n); }  // (ranks, n)

    const Backend& k_;
    DeviceComm& device_;
    const size_t n_, tail_, shard_;
    Buf parts_;  // (ranks, max(shard_, tail_)) f32
};
}  // namespace

std::unique_ptr<GradientAllReduce> make_gradient_all_reduce(const Backend& k, Comm& comm, AllReduce how, size_t n,
                                                            DeviceComm* nccl, size_t longest_shard) {
    if (comm.size() == 1) return std::make_unique<OneRank>(k);
    CHECK_THAT(how != AllReduce::ordered || (comm.size() & (comm.size() - 1)) == 0,
               "ordered reduction over {} ranks; needs a power of two", comm.size());
    CHECK_THAT(how != AllReduce::nccl || nccl, "the nccl reduction needs a communicator between devices");
    CHECK_THAT(!nccl || nccl->size() == comm.size(), "{} ranks, but {} devices", comm.size(), nccl->size());
    if (how == AllReduce::nccl) return std::make_unique<Nccl>(*nccl, n);
    if (k.host_addressable) return std::make_unique<InPlace>(comm, how, n);
    if (how == AllReduce::ordered && nccl) return std::make_unique<OrderedByNccl>(k, *nccl, n, longest_shard);
    return std::make_unique<Staged>(k, comm, how, n);
}
