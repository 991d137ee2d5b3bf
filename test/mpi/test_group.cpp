// Groups of ranks: every operation, between host memories and between memories of each backend, through host memory
// and by NCCL; the world's group and its parts.
#include "comm/group.h"

#include <doctest/doctest.h>

#include <functional>

#include "test/mpi/device_gradient.h"

namespace {
constexpr double kTimeout = 60;                                  // seconds
const size_t kLengths[] = {1, 3, 64, 1000, (1 << 20) / 4 + 77};  // of a block; the last is more than a staged piece

struct Carried {
    std::string name;
    Group group;
};
// The world's group by each carrier that can be had here.
std::vector<Carried> worlds() {
    std::vector<Carried> all;
    all.push_back({"cpu", Group(cpu_backend(), world())});
    if (gpu()) all.push_back({"through host memory", Group(*gpu(), world())});
    if (own_gpus()) all.push_back({"nccl", nccl_group(kTimeout)});
    return all;
}
// f(group) for the world's group and for the part of it that this rank is in.
void for_each_group(const std::function<void(const Group&)>& f) {
    for (const Carried& c : worlds()) {
        CAPTURE(c.name);
        f(c.group);
        const Group part = c.group.split(world().rank() % 2, -world().rank());
        CAPTURE(part.size());
        f(part);
    }
}

// Numbers in a backend's memory.
template <class T>
class Numbers {
  public:
    Numbers(const Backend& k, const std::vector<T>& values)
        : k_(k), memory_(k, values.size() * sizeof(T)), buf_(static_cast<T*>(memory_.get()), values.size()) {
        k.upload(buf_.data, values.data(), buf_.n_bytes(), nullptr);
        k.synchronize(nullptr);
    }
    Buf buf() const { return buf_; }
    Buf block(int i, size_t n) const { return buf_.slice(size_t(i) * n, n); }
    // After what was given to the stream.
    std::vector<T> read(const Group& g, Stream s) const {
        std::vector<T> out(buf_.count);
        k_.download(out.data(), buf_.data, buf_.n_bytes(), s);
        g.device().wait(s);
        return out;
    }

  private:
    const Backend& k_;
    DeviceBuffer memory_;
    Buf buf_;
};

// A small whole number that tells sender, block and place, so that every sum is exact.
int number(int rank, int block, size_t i) { return rank * 1000 + block * 100 + int(i % 97); }
template <class T>
std::vector<T> numbers(int rank, int n_blocks, size_t n) {  // (n_blocks, n)
    std::vector<T> v;
    for (int b = 0; b < n_blocks; b++)
        for (size_t i = 0; i < n; i++) v.push_back(T(number(rank, b, i)));
    return v;
}
std::vector<float> summed(int size, int block, size_t n) {
    std::vector<float> v(n);
    for (size_t i = 0; i < n; i++)
        for (int r = 0; r < size; r++) v[i] += float(number(r, block, i));
    return v;
}
template <class T>
std::vector<T> joined(const std::vector<std::vector<T>>& parts) {
    std::vector<T> v;
    for (const auto& p : parts) v.insert(v.end(), p.begin(), p.end());
    return v;
}
}  // namespace

TEST_CASE("a group and its parts: ranks, and the words for host memory") {
    for (const Carried& c : worlds()) {
        CHECK(c.group.rank() == world().rank());
        CHECK(c.group.size() == world().size());
        CHECK(&c.group.host() == &world());
        CHECK(c.group.device().rank() == c.group.rank());
        CHECK(c.group.device().size() == c.group.size());
        const int color = world().rank() % 2;
        const Group part = c.group.split(color, -world().rank());  // in descending order
        CHECK(part.size() == (world().size() + 1 - color) / 2);
        CHECK(part.rank() == part.size() - 1 - world().rank() / 2);
        CHECK(part.device().rank() == part.rank());
        CHECK(part.device().size() == part.size());
        std::vector<int> members(size_t(part.size()));
        const int mine = world().rank();
        part.host().all_gather(&mine, members.data(), sizeof mine);
        for (int r = 0; r < part.size(); r++) CHECK(members[size_t(r)] == (part.size() - 1 - r) * 2 + color);
    }
}

TEST_CASE("device words: sums") {
    for_each_group([](const Group& g) {
        const Backend& k = g.backend();
        StreamOwner stream(k);
        const Stream s = stream.get();
        for (const size_t n : kLengths) {
            CAPTURE(n);
            Numbers data(k, numbers<float>(g.rank(), 1, n));
            g.device().all_reduce_sum(data.buf(), s);
            CHECK(data.read(g, s) == summed(g.size(), 0, n));

            Numbers blocks(k, numbers<float>(g.rank(), g.size(), n)), mine(k, std::vector<float>(n));
            g.device().reduce_scatter_sum(blocks.buf(), mine.buf(), s);
            CHECK(mine.read(g, s) == summed(g.size(), g.rank(), n));
            Numbers in_place(k, numbers<float>(g.rank(), g.size(), n));
            g.device().reduce_scatter_sum(in_place.buf(), in_place.block(g.rank(), n), s);
            g.device().all_gather(in_place.block(g.rank(), n), in_place.buf(), s);
            std::vector<std::vector<float>> want;
            for (int r = 0; r < g.size(); r++) want.push_back(summed(g.size(), r, n));
            CHECK(in_place.read(g, s) == joined(want));
        }
    });
}

namespace {
template <class T>
void check_moves(const Group& g, size_t n) {
    const Backend& k = g.backend();
    StreamOwner stream(k);
    const Stream s = stream.get();
    const int rank = g.rank(), size = g.size();
    std::vector<std::vector<T>> gathered, exchanged;
    for (int r = 0; r < size; r++) {
        gathered.push_back(numbers<T>(r, 1, n));
        const std::vector<T> sent = numbers<T>(r, size, n);
        exchanged.emplace_back(sent.begin() + ptrdiff_t(size_t(rank) * n),
                               sent.begin() + ptrdiff_t(size_t(rank + 1) * n));
    }
    const std::vector<T> empty(n * size_t(size));
    const Numbers mine(k, numbers<T>(rank, 1, n)), blocks(k, numbers<T>(rank, size, n));
    const Numbers all(k, empty), from_all(k, empty);
    g.device().all_gather(mine.buf(), all.buf(), s);
    g.device().all_to_all(blocks.buf(), from_all.buf(), s);
    CHECK(all.read(g, s) == joined(gathered));
    CHECK(from_all.read(g, s) == joined(exchanged));
    for (int root = 0; root < size; root++) {
        const Numbers data(k, numbers<T>(rank, 1, n));
        g.device().broadcast(data.buf(), root, s);
        CHECK(data.read(g, s) == numbers<T>(root, 1, n));
    }
    const int next = (rank + 1) % size, previous = (rank + size - 1) % size;
    const Numbers from_previous(k, std::vector<T>(n));
    g.device().send_recv(mine.buf(), next, from_previous.buf(), previous, s);
    CHECK(from_previous.read(g, s) == numbers<T>(previous, 1, n));
}
}  // namespace

TEST_CASE("device words: moves, of every dtype") {
    for_each_group([](const Group& g) {
        for (const size_t n : kLengths) {
            CAPTURE(n);
            check_moves<float>(g, n);
        }
        check_moves<double>(g, 33);
        check_moves<int32_t>(g, 33);
        check_moves<uint32_t>(g, 33);
        check_moves<uint8_t>(g, 33);
    });
}

// As between the stages of a pipeline: ranks that neither send nor receive do not call.
TEST_CASE("device words: a message passes from rank to rank") {
    for_each_group([](const Group& g) {
        const Backend& k = g.backend();
        if (g.size() == 1) return;
        StreamOwner stream(k);
        const Stream s = stream.get();
        for (const size_t n : kLengths) {
            CAPTURE(n);
            const Numbers data(k, std::vector<float>(n, g.rank() == 0 ? 1.0f : -1.0f)),
                one(k, std::vector<float>(n, 1));
            if (g.rank() > 0) {
                g.device().recv(data.buf(), g.rank() - 1, s);
                k.add({.y = data.buf(), .x = one.buf()}, s);
            }
            if (g.rank() < g.size() - 1) g.device().send(data.buf(), g.rank() + 1, s);
            CHECK(data.read(g, s) == std::vector<float>(n, float(g.rank() + 1)));
            // Messages of unequal length, there and back.
            const Numbers back(k, std::vector<float>(2 * n));
            const Buf shorter = data.buf(), longer = back.buf();
            if (g.rank() == 0) g.device().send_recv(shorter, 1, longer, 1, s);
            if (g.rank() == 1) g.device().send_recv(longer, 0, shorter, 0, s);
            if (g.rank() < 2) g.device().wait(s);
            if (g.rank() == 1) CHECK(data.read(g, s) == std::vector<float>(n, 1));
        }
        g.device().all_reduce_sum(Buf(), s);  // nothing
    });
}

TEST_CASE("device words refuse what does not fit") {
    for (const Carried& c : worlds()) {
        CAPTURE(c.name);
        const Group& g = c.group;
        const Numbers<float> a(c.group.backend(), std::vector<float>(size_t(6 * g.size())));
        const Numbers<int32_t> i(c.group.backend(), std::vector<int32_t>(6));
        const Buf six = a.buf().slice(0, 6), all = a.buf();
        const auto refused = [&](const char* text, const std::function<void()>& f) {
            CHECK_THROWS_WITH_AS(f(), doctest::Contains(text), Error);
        };
        DeviceComm& d = g.device();
        refused("sums are of f32", [&] { d.all_reduce_sum(i.buf(), nullptr); });
        refused("blocks of 5 f32", [&] { d.reduce_scatter_sum(all, six.slice(0, 5), nullptr); });
        refused("blocks of 6 i32", [&] { d.all_gather(i.buf(), all, nullptr); });
        refused("both must be", [&] { d.all_to_all(all, all.slice(1, all.count - 1), nullptr); });
        refused("broadcast from rank -1", [&] { d.broadcast(six, -1, nullptr); });
        refused("use send_recv", [&] { d.send(six, g.rank(), nullptr); });
        refused("recv: rank", [&] { d.recv(six, g.size(), nullptr); });
        refused("send_recv of f32 and i32", [&] { d.send_recv(six, g.rank(), i.buf(), g.rank(), nullptr); });
        refused("a rank gets from itself", [&] { d.send_recv(six, g.rank(), six.slice(0, 5), g.rank(), nullptr); });
    }
}
