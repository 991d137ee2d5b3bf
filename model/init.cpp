#include "model/init.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "common/rng.h"

namespace {
// Four normal numbers from one counter: Box and Muller 1958, twice.
std::array<double, 4> normal4(uint64_t key, uint32_t tensor, uint64_t counter) {
    const Philox4 r = philox(key, uint32_t(counter), uint32_t(counter >> 32), tensor, 0);
    std::array<double, 4> out{};
    for (int i = 0; i < 4; i += 2) {
        const double radius = std::sqrt(-2 * std::log(double(uniform_open0(r.v[i]))));
        const double angle = 2 * M_PI * double(uniform_open0(r.v[i + 1]));
        out[size_t(i)] = radius * std::cos(angle);
        out[size_t(i) + 1] = radius * std::sin(angle);
    }
    return out;
}

template <class T>
void fill(const Backend& k, Init init, Buf y, uint32_t tensor, uint64_t key, Stream s) {
    std::vector<T> piece(std::min(y.count, size_t(1) << 20));  // a large tensor is not held twice
    for (size_t first = 0; first < y.count; first += piece.size()) {
        const size_t n = std::min(piece.size(), y.count - first);
#pragma omp parallel for
        for (size_t group = 0; group < n; group += 4) {
            std::array<double, 4> z{};
            if (init.stddev > 0) z = normal4(key, tensor, (first + group) / 4);
            for (size_t i = group; i < std::min(group + 4, n); i++)
                piece[i] = T(float(init.mean + init.stddev * z[i - group]));
        }
        k.upload(y.slice(first, n).data, piece.data(), n * sizeof(T), s);
        k.synchronize(s);
    }
}
}  // namespace

void init_tensor(const Backend& k, Init init, Buf y, uint32_t tensor, uint64_t seed, Stream s) {
    const uint64_t key = stream_key(seed, RngStream::init);
    if (y.dtype == DType::f64) return fill<double>(k, init, y, tensor, key, s);
    fill<float>(k, init, y, tensor, key, s);
}
