// Broken on purpose and seen to fail: row_sum starting at t = 1; add writing x instead of y + x; the tree without its
// second level; the tree's second pass with the first pass's step; vectors where parts are not aligned; a hash without
// its last word, or without the parts of other blocks.
#include "common/hash.h"
#include "test/slice.h"

TEST_CASE("add: y += x") {
    for (const Target& t : targets())
        for (size_t n : {1, 2, 31, 100, 20011})
            for (size_t offset : {0, 1}) {
                CAPTURE(t.name);
                CAPTURE(n);
                CAPTURE(offset);
                const Doubles x = rounded(normal(n, 1), DType::f32), y = rounded(normal(n, 2), DType::f32);
                Slice dy(t, DType::f32, y, offset), dx(t, DType::f32, x, offset);
                t.k->add({.y = dy, .x = dx}, nullptr);
                Doubles want(n);
                for (size_t i = 0; i < n; i++) want[i] = x[i] + y[i];
                CHECK(worst(dy.host(), want, 0, kUnit) <= 1);  // one rounding
            }
}

TEST_CASE("row_sum: sums of rows") {
    struct Case {
        int B, T;
    };
    for (const Target& t : targets())
        for (Case c : {Case{1, 1}, {3, 7}, {5, 100}, {2, 1023}, {70, 33}}) {
            CAPTURE(t.name);
            CAPTURE(c.B);
            CAPTURE(c.T);
            const Doubles x = rounded(normal(size_t(c.B) * c.T, 1), t.stat());
            Doubles want(size_t(c.B)), tolerance(size_t(c.B));  // T sums in double, rounded once to float
            for (size_t i = 0; i < x.size(); i++)
                want[i / c.T] += x[i], tolerance[i / c.T] += c.T * 0x1p-53 * std::abs(x[i]);
            for (size_t b = 0; b < want.size(); b++) tolerance[b] += kUnit * std::abs(want[b]);
            Dev y(t, t.stat(), poison(size_t(c.B))), dx(t, t.stat(), x);
            t.k->row_sum({.y = y, .x = dx, .B = c.B, .T = c.T}, nullptr);
            CHECK(worst_each(y.host(), want, tolerance) <= 1);
        }
}

namespace {
// ops.h, TreeSum: the left half plus the right half.
float tree(const Doubles& x, size_t n, size_t i, size_t from, size_t parts) {
    if (parts == 1) return float(x[from * n + i]);
    return tree(x, n, i, from, parts / 2) + tree(x, n, i, from + parts / 2, parts / 2);
}
}  // namespace

TEST_CASE("tree_sum: the bits of the balanced tree, on every backend") {
    for (const Target& t : targets())
        for (int parts : {1, 2, 4, 8, 16, 32, 64, 128})
            for (size_t n : {1, 3, 64, 257, 1032})
                for (size_t offset : {0, 1}) {
                    CAPTURE(t.name);
                    CAPTURE(parts);
                    CAPTURE(n);
                    CAPTURE(offset);
                    const Doubles x = rounded(normal(size_t(parts) * n, 1), DType::f32);
                    Doubles want(n);
                    for (size_t i = 0; i < n; i++) want[i] = tree(x, n, i, 0, size_t(parts));
                    Slice y(t, DType::f32, poison(n), offset), apart(t, DType::f32, x, offset);
                    t.k->tree_sum({.y = y, .x = apart, .parts = parts}, nullptr);
                    CHECK(same_bits(y.host(), want));
                    Slice in(t, DType::f32, x, offset);  // the result in place of the first part
                    t.k->tree_sum({.y = Buf(in).slice(0, n), .x = in, .parts = parts}, nullptr);
                    Doubles first = in.host();
                    first.resize(n);
                    CHECK(same_bits(first, want));
                }
}

namespace {
// Nearest bf16 to a float, the even one of two: by the definition, over all that could be meant.
double nearest_bf16(double x) {
    if (!std::isfinite(x)) return x;
    int exponent;
    std::frexp(x, &exponent);
    const double step = std::ldexp(1, std::max(exponent, -125) - 8);  // between neighbours; below 2^-126 it is constant
    const double y = std::nearbyint(x / step) * step;                 // exact, ties to even
    return std::abs(y) < std::ldexp(1, 128) ? y : std::copysign(HUGE_VAL, x);
}
bool same_number(double a, double b) {
    return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}
}  // namespace

TEST_CASE("cast: rounds to the nearest, ties to even") {
    const double tiny = std::numeric_limits<float>::denorm_min(), most = std::numeric_limits<float>::max();
    Doubles x = {0, -0.0, 1, -1, HUGE_VAL, -HUGE_VAL, std::nan(""), tiny, -tiny, most, -most};
    for (double tie : {1 + 0x1p-8, 1 + 0x3p-8, 0x1p-133 / 2, 0x3p-133 / 2, 0x1.ffp127, 0x1.fdp127, 0x1.01p-126})
        for (double sign : {1.0, -1.0}) {
            const auto at = float(sign * tie);
            for (float v : {at, std::nextafter(at, 1e38f), std::nextafter(at, -1e38f)}) x.push_back(v);
        }
    const Doubles more = rounded(normal(20011, 1), DType::f32);
    x.insert(x.end(), more.begin(), more.end());
    for (const Target& t : targets())
        for (size_t n : {size_t(1), size_t(7), x.size()})
            for (size_t offset : {0, 1})
                for (DType to : {DType::bf16, DType::f32}) {
                    CAPTURE(t.name);
                    CAPTURE(n);
                    CAPTURE(offset);
                    CAPTURE(dtype_name(to));
                    const Doubles part(x.begin(), x.begin() + std::ptrdiff_t(n));
                    Slice y(t, to, poison(n), offset), from(t, DType::f32, part, offset);
                    t.k->cast({.y = y, .x = from}, nullptr);
                    const Doubles got = y.host();
                    size_t wrong = 0;
                    for (size_t i = 0; i < n; i++)
                        wrong += !same_number(got[i], to == DType::bf16 ? nearest_bf16(part[i]) : part[i]);
                    CHECK(wrong == 0);
                }
}

namespace {
Doubles random_bytes(size_t n, unsigned seed) { return integers(n, seed, 256); }
uint64_t hash_of(const Target& t, const Buf& x) {
    Dev y(t, DType::u32, {1, 2});
    t.k->hash({.y = y, .x = x}, nullptr);
    const Doubles halves = y.host();
    return uint64_t(halves[1]) << 32 | uint64_t(halves[0]);
}
uint64_t hash_of(const Target& t, const Doubles& bytes, size_t offset = 0) {
    const Slice x(t, DType::u8, bytes, offset);
    return hash_of(t, Buf(x));
}
// common/hash.h, word for word.
uint64_t plain_hash(const Doubles& bytes) {
    uint64_t sum = 0;
    for (size_t i = 0; i < bytes.size() / 4; i++) {
        uint32_t word = 0;
        for (size_t k = 0; k < 4; k++) word |= uint32_t(bytes[4 * i + k]) << (8 * k);
        sum += hash_word(i, word);
    }
    return sum;
}
}  // namespace

TEST_CASE("hash: the same on every backend, wherever the bytes lie") {
    for (size_t n_words : {1, 3, 4, 5, 255, 1023, 1024, 2049, 5003}) {
        const Doubles bytes = random_bytes(4 * n_words, unsigned(n_words));
        const uint64_t want = plain_hash(bytes);
        for (const Target& t : targets())
            for (size_t offset : {0, 1, 2, 4, 16}) {
                CAPTURE(t.name);
                CAPTURE(n_words);
                CAPTURE(offset);
                CHECK(hash_of(t, bytes, offset) == want);
            }
    }
}

TEST_CASE("hash: of the bytes, whatever their dtype") {
    const Doubles bytes = random_bytes(4096, 1);
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        Dev x(t, DType::u8, bytes);
        for (DType as : {DType::f32, DType::bf16, DType::i32, DType::f64})
            CHECK(hash_of(t, Buf(Buf(x).data, 4096 / dtype_bytes(as), as)) == plain_hash(bytes));
    }
}

TEST_CASE("hash: any flipped bit and any two words swapped change it") {
    const Target t = targets()[0];  // the others give the same values
    const Doubles bytes = random_bytes(4 * 37, 1);
    const uint64_t before = hash_of(t, bytes);
    for (size_t bit = 0; bit < 8 * bytes.size(); bit++) {
        Doubles other = bytes;
        other[bit / 8] = double(uint32_t(other[bit / 8]) ^ 1u << (bit % 8));
        CAPTURE(bit);
        CHECK(hash_of(t, other) != before);
    }
    for (size_t a = 0; a < 37; a++)
        for (size_t b = a + 1; b < 37; b++) {
            Doubles other = bytes;
            std::swap_ranges(other.begin() + std::ptrdiff_t(4 * a), other.begin() + std::ptrdiff_t(4 * a + 4),
                             other.begin() + std::ptrdiff_t(4 * b));
            CAPTURE(a);
            CAPTURE(b);
            CHECK(hash_of(t, other) != before);
        }
    CHECK(hash_of(t, join({bytes, Doubles(4)})) != before);  // nor does a zero at the end pass unseen
}

TEST_CASE("elementwise ops: the same bits on 1 to 4 threads") {
    const Target t = targets()[0];
    const size_t n = 50001, parts = 4;
    check_thread_counts([&] {
        Dev y(t, DType::f32, normal(n, 1)), x(t, DType::f32, normal(n, 2)), sums(t, DType::f32, poison(3));
        t.k->add({.y = y, .x = x}, nullptr);
        t.k->row_sum({.y = sums, .x = y, .B = 3, .T = 16667}, nullptr);
        Dev small(t, DType::bf16, poison(n)), all(t, DType::f32, normal(n * parts, 3)), tree(t, DType::f32, poison(n));
        t.k->cast({.y = small, .x = y}, nullptr);
        t.k->tree_sum({.y = tree, .x = all, .parts = parts}, nullptr);
        Dev hash(t, DType::u32, {0, 0});
        t.k->hash({.y = hash, .x = y}, nullptr);
        return join({y.host(), sums.host(), small.host(), tree.host(), hash.host()});
    });
}

TEST_CASE("elementwise ops reject a short buffer") {
    for (const Target& t : targets()) {
        CAPTURE(t.name);
        Dev four(t, DType::f32, Doubles(4)), five(t, DType::f32, Doubles(5)), two(t, DType::u32, Doubles(2));
        Dev odd(t, DType::bf16, Doubles(5)), one(t, DType::u32, Doubles(1));
        using doctest::Contains;
        CHECK_THROWS_WITH_AS(t.k->add({.y = four, .x = five}, nullptr),
                             Contains("add.y holds 4 elements, expected add.x = 5"), Error);
        CHECK_THROWS_WITH_AS(t.k->row_sum({.y = four, .x = five, .B = 4, .T = 2}, nullptr),
                             Contains("expected B*T = 8"), Error);
        CHECK_THROWS_WITH_AS(t.k->tree_sum({.y = four, .x = five, .parts = 2}, nullptr),
                             Contains("tree_sum.x holds 5 elements, expected parts*n = 8"), Error);
        CHECK_THROWS_WITH_AS(t.k->tree_sum({.y = four, .x = five, .parts = 3}, nullptr),
                             Contains("tree_sum of 3 parts; needs a power of two"), Error);
        CHECK_THROWS_WITH_AS(t.k->cast({.y = odd, .x = four}, nullptr),
                             Contains("cast.y holds 5 elements, expected cast.x = 4"), Error);
        CHECK_THROWS_WITH_AS(t.k->cast({.y = four, .x = Buf(odd).slice(0, 4)}, nullptr), Contains("buffer holds bf16"),
                             Error);
        CHECK_THROWS_WITH_AS(t.k->hash({.y = one, .x = four}, nullptr), Contains("hash.y holds 1 elements"), Error);
        CHECK_THROWS_WITH_AS(t.k->hash({.y = two, .x = odd}, nullptr),
                             Contains("hash.x holds 10 bytes, expected a multiple of 4"), Error);
    }
}
