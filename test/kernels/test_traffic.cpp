// Traffic of each memory-bound kernel, counted by the emulator's race build: no more than the `traffic` line at the
// head of the kernel's file says, in requests that fill the sectors they touch, and without bank conflicts.
//
// A sector is 32 bytes; a request is one instruction of a warp.  The count takes every access of a thread, whatever
// cache answers: `cached` bytes are read again from L1 or L2 and do not count as memory traffic.
//
// Broken on purpose and seen to fail: GELU reading one element at a time; the logits read a second time; sums in shared
// memory without device::spread (conflicts); eight neighbouring fp32 to a thread in the cast, in the embedding's
// gradient and in the sums of wide rows (every sector touched twice, or eight times).
#ifdef KILN_RACE  // only this build counts
#include <functional>
#include <map>

#include "common/token_order.h"
#include "emulator.h"
#include "test/op_test.h"

namespace {
constexpr double kSector = 32;
// Of the allowed bytes: rows that do not begin on a sector, blocks' single results, lanes beyond a tensor's end.
constexpr double kSlack = 0.03;
// Of the allowed bytes, a kernel may leave this share unused.  With more, a second read of a small tensor would pass.
constexpr double kUnused = 0.08;

// Bytes that one kernel may move, and how well: `used` is the least share of the sectors' bytes that lanes asked for.
struct Allowed {
    std::string kernel;
    double read, written, cached = 0;
    double used = 0.9;
    const char* because = "";  // `used` is lower
};

struct Sizes {  // of a dtype's test
    DType t;
    double e;          // bytes of an element
    std::string name;  // of the dtype in a kernel's name
};
const Sizes kReals[] = {{DType::f32, 4, "float"}, {DType::bf16, 2, "bf16"}};
Target target_of(const Sizes& s) { return {&cuda_backend(), s.t, "cuda " + s.name}; }

double most(double allowed) { return allowed * (1 + kSlack); }
double least(double allowed) { return allowed * (1 - kUnused); }

void check(const emulator::KernelCounters& c, const Allowed& a) {
    CAPTURE(a.kernel);
    const double read = kSector * double(c.global_load_sectors), written = kSector * double(c.global_store_sectors);
    CHECK(read <= most(a.read + a.cached));
    CHECK(read >= least(a.read + a.cached));
    CHECK(written <= most(a.written));
    CHECK(written >= least(a.written));
    CHECK(double(c.global_load_bytes) >= a.used * read);
    CHECK(double(c.global_store_bytes) >= a.used * written);
    CHECK(c.shared_conflict_cycles == 0);
}

// Runs `op`; every kernel that it launches must have a row.
void check_traffic(const std::function<void()>& op, const std::vector<Allowed>& rows) {
    const emulator::Config before = emulator::config();
    emulator::config().counters = true;
    emulator::reset_counters();
    op();
    cuda_backend().synchronize(nullptr);
    std::map<std::string, emulator::KernelCounters> counted = emulator::counters();
    emulator::config() = before;
    for (const Allowed& a : rows) {
        REQUIRE_MESSAGE(counted.count(a.kernel), a.kernel << " was not launched");
        check(counted[a.kernel], a);
        counted.erase(a.kernel);
    }
    for (const auto& [name, c] : counted) FAIL_CHECK(name << " has no row");
}
// The few bytes of a last stage by one block: not worth a rule.
const char* kOneBlock = "one block adds the chunks' sums";
}  // namespace

TEST_CASE("traffic: layernorm") {
    struct Shape {
        int BT, C, columns, warps;  // of a lane's registers; of a row in the backward
    };
    for (const Sizes& s : kReals)
        for (const Shape& shape : {Shape{130, 768, 24, 1}, {66, 1600, 32, 2}}) {
            const Target t = target_of(s);
            const size_t BT = size_t(shape.BT), C = size_t(shape.C), n = BT * C;
            CAPTURE(s.name);
            CAPTURE(C);
            Dev x(t, s.t, normal(n, 1)), w(t, s.t, normal(C, 2)), b(t, s.t, normal(C, 3)), y(t, s.t, poison(n));
            Dev mean(t, DType::f32, poison(BT)), rstd(t, DType::f32, poison(BT));
            const double all = double(n) * s.e, stats = 2 * double(BT) * kSector;  // mean and rstd: a sector each
            const std::string forward = "layernorm_forward_kernel<" + s.name + ", " + (C == 768 ? "24>" : "64>");
            check_traffic(
                [&] {
                    t.k->layernorm_forward(
                        {.y = y, .mean = mean, .rstd = rstd, .x = x, .w = w, .b = b, .BT = shape.BT, .C = shape.C},
                        nullptr);
                },
                {{.kernel = forward, .read = all, .written = all + stats, .cached = 2 * all}});  // w and b for each row

            Dev dx(t, s.t, normal(n, 4)), dy(t, s.t, normal(n, 5));
            Dev dw(t, DType::f32, poison(C)), db(t, DType::f32, poison(C)), dx_sum(t, DType::f32, poison(C));
            for (bool more : {false, true}) {  // true: dx overwritten, its columns summed
                CAPTURE(more);
                const double sums = (more ? 3.0 : 2.0) * double(C) * 4, partial = double((BT + 15) / 16) * sums;
                check_traffic(
                    [&] {
                        t.k->layernorm_backward({.dx = dx,
                                                 .dw = dw,
                                                 .db = db,
                                                 .dx_sum = more ? Buf(dx_sum) : Buf(),
                                                 .dy = dy,
                                                 .x = x,
                                                 .w = w,
                                                 .mean = mean,
                                                 .rstd = rstd,
                                                 .BT = shape.BT,
                                                 .C = shape.C,
                                                 .overwrite_dx = more},
                                                nullptr);
                    },
                    {{.kernel = "layernorm_backward_kernel<" + s.name + ", " + std::to_string(shape.columns) + ", " +
                                std::to_string(shape.warps) + (more ? ", true>" : ", false>"),
                      .read = (more ? 2 : 3) * all,
                      .written = all + partial,
                      .cached = 2 * all + shape.warps * stats},  // w twice
                     {.kernel = "layernorm_combine_kernel", .read = partial, .written = sums}});
            }
        }
}

TEST_CASE("traffic: layernorm of rows too wide for registers") {
    for (const Sizes& s : kReals) {
        const Target t = target_of(s);
        const int BT = 70, C = 8448;
        const size_t n = size_t(BT) * C;
        CAPTURE(s.name);
        Dev x(t, s.t, normal(n, 1)), w(t, s.t, normal(size_t(C), 2)), dx(t, s.t, normal(n, 4)),
            dy(t, s.t, normal(n, 5));
        Dev mean(t, DType::f32, normal(size_t(BT), 6)), rstd(t, DType::f32, normal(size_t(BT), 7));
        Dev dw(t, DType::f32, poison(size_t(C))), db(t, DType::f32, poison(size_t(C)));
        const double all = double(n) * s.e, partial = 2.0 * ((BT + 15) / 16) * C * 4, stats = 2 * double(BT) * kSector;
        check_traffic(
            [&] {
                t.k->layernorm_backward({.dx = dx,
                                         .dw = dw,
                                         .db = db,
                                         .dy = dy,
                                         .x = x,
                                         .w = w,
                                         .mean = mean,
                                         .rstd = rstd,
                                         .BT = BT,
                                         .C = C},
                                        nullptr);
            },
            {{.kernel = "layernorm_backward_wide_kernel<" + s.name + ">",
              .read = 3 * all,
              .written = all,
              .cached = 4 * all + 8 * stats},  // x and dy, and w twice; 8 warps
             {.kernel = "layernorm_backward_wide_columns_kernel<" + s.name + ">",
              .read = 2 * all,
              .written = partial,
              .cached = double(C / 4) / 32 * stats,
              .used = 0.85,
              .because = "each warp reads mean and rstd of its rows"},
             {.kernel = "layernorm_combine_kernel", .read = partial, .written = 2.0 * C * 4}});
    }
}

TEST_CASE("traffic: cross_entropy") {
    for (const Sizes& s : kReals)
        for (bool training : {true, false}) {
            const Target t = target_of(s);
            const int BT = 3, Vp = 12800, V = Vp - 47;
            CAPTURE(s.name);
            CAPTURE(training);
            Dev loss(t, DType::f32, poison(BT)), correct(t, DType::i32, Doubles(BT, 0));
            Dev logits(t, s.t, normal(size_t(BT) * Vp, 1)), targets(t, DType::i32, integers(BT, 2, V));
            const double all = double(BT) * Vp * s.e, look_up = BT * 16 * 2 * kSector;  // 16 warps: target, its logit
            check_traffic(
                [&] {
                    t.k->cross_entropy({.loss = loss,
                                        .correct = correct,
                                        .logits = logits,
                                        .targets = targets,
                                        .BT = BT,
                                        .V = V,
                                        .Vp = Vp,
                                        .grad_scale = training ? 0.25f : 0.0f},
                                       nullptr);
                },
                {{.kernel = "cross_entropy_kernel<" + s.name + (training ? ", true>" : ", false>"),
                  .read = all,
                  .written = (training ? all : 0) + 2 * BT * kSector,
                  .cached = look_up,
                  .used = training ? 0.9 : 0.1,
                  .because = "evaluation writes two numbers a row"}});
        }
}

TEST_CASE("traffic: embedding") {
    for (const Sizes& s : kReals) {
        const Target t = target_of(s);
        const int B = 3, T = 64, C = 768, V = 100, BT = B * T;
        CAPTURE(s.name);
        const Doubles at = integers(BT, 1, V);
        Dev tokens(t, DType::i32, at), y(t, s.t, poison(size_t(BT) * C));
        Dev wte(t, s.t, normal(128 * C, 2)), wpe(t, s.t, normal(size_t(T) * C, 3));
        const double all = double(BT) * C * s.e;
        check_traffic(
            [&] {
                t.k->embedding_forward(
                    {.y = y, .tokens = tokens, .wte = wte, .wpe = wpe, .B = B, .T = T, .C = C, .V = V}, nullptr);
            },
            {{.kernel = "embedding_forward_kernel<" + s.name + ">",
              .read = 2 * all,
              .written = all,
              .cached = BT * kSector}});

        const std::vector<int32_t> token(at.begin(), at.end());
        std::vector<int32_t> order(token.size());
        sort_rows_by_token(token.data(), order.data(), order.size(), V);
        // Stretches of equal tokens inside chunks of 32 sorted rows: whole ones are finished there, others are partial.
        double whole = 0, partial = 0, joined = 0;
        const auto token_at = [&](int p) { return p < 0 || p >= BT ? -1 : token[size_t(order[size_t(p)])]; };
        for (int p = 0; p < BT; p++) {
            if (p % 32 && token_at(p - 1) == token_at(p)) continue;
            int end = p + 1;
            while (end % 32 && token_at(end) == token_at(p)) end++;
            const bool before = token_at(p - 1) == token_at(p), after = token_at(end) == token_at(p);
            (before || after ? partial : whole)++;
            joined += after && !before;
        }
        REQUIRE(whole > 0);
        REQUIRE(joined > 0);
        Dev dwte(t, DType::f32, normal(128 * C, 4)), dwpe(t, DType::f32, poison(size_t(T) * C));
        Dev dy(t, s.t, normal(size_t(BT) * C, 5)), sorted(t, DType::i32, Doubles(order.begin(), order.end()));
        const double row = 4.0 * C, chunks = BT / 32, warps = C / 4 / 32;
        const double look_ups = chunks * warps * (4 + 4 + 2 * 32) * kSector;  // sorted rows; their tokens lie anywhere
        check_traffic(
            [&] {
                t.k->embedding_backward({.dwte = dwte,
                                         .dwpe = dwpe,
                                         .dy = dy,
                                         .tokens = tokens,
                                         .order = sorted,
                                         .B = B,
                                         .T = T,
                                         .C = C,
                                         .V = V},
                                        nullptr);
            },
            {{.kernel = "embedding_backward_places_kernel<" + s.name + ">", .read = all, .written = T * row},
             {.kernel = "embedding_backward_words_kernel<" + s.name + ">",
              .read = all + whole * row,
              .written = (whole + partial) * row,
              .cached = look_ups,
              .used = 0.5,
              .because = "tokens are looked up in the order of the sorted rows"},
             {.kernel = "embedding_backward_join_kernel<" + s.name + ">",
              .read = partial * row + joined * row,
              .written = joined * row,
              .cached = (chunks - 1) * 6 * 16 * 6 * kSector,
              .used = 0.2,
              .because = "a warp of a chunk that has nothing to join reads six words and ends"}});
    }
}

TEST_CASE("traffic: optimizer") {
    const Target t = target_of(kReals[0]);
    const size_t n = 256 * 70 + 24;
    for (OptimizerKind kind : values_of<OptimizerKind>())
        for (bool with_copy : {true, false}) {
            const double moments = double(n_moments(kind));
            CAPTURE(word_of(kind));
            CAPTURE(with_copy);
            Dev param(t, DType::f32, normal(n, 1)), m(t, DType::f32, normal(n, 2)), v(t, DType::f32, Doubles(n, 1));
            Dev grad(t, DType::f32, normal(n, 3)), decay(t, DType::u8, Doubles((n + 63) / 64, 1));
            Dev copy(t, DType::bf16, poison(n)), rate(t, DType::f32, {1e-3, 0.5, 0.5}), clip(t, DType::f32, {1});
            const double each = 4.0 * double(n), settings = double(n) / 256 * (4 + 2) * kSector;
            check_traffic(
                [&] {
                    t.k->optimizer_update({.param = param,
                                           .copy = with_copy ? Buf(copy) : Buf(),
                                           .m = m,
                                           .v = moments > 1 ? Buf(v) : Buf(),
                                           .grad = grad,
                                           .decay = decay,
                                           .rate = rate,
                                           .clip = clip,
                                           .kind = kind},
                                          nullptr);
                },
                // AdamW: 30 bytes per parameter with the copy, and the few numbers that each warp reads
                {{.kernel = "optimizer_update_kernel<(OptimizerKind)" + std::to_string(int(kind)) + ">",
                  .read = (2 + moments) * each,
                  .written = (1 + moments) * each + (with_copy ? 2.0 * double(n) : 0),
                  .cached = settings}});
        }
}

TEST_CASE("traffic: grad_norm") {
    const Target t = target_of(kReals[0]);
    const size_t n = 2 * kGradNormChunk + 1000;
    Dev norm(t, DType::f32, poison(1)), clip(t, DType::f32, poison(1)), grad(t, DType::f32, normal(n, 1));
    Dev scratch(t, DType::f32, poison(grad_norm_scratch(n)));
    check_traffic(
        [&] { t.k->grad_norm({.norm = norm, .clip = clip, .grad = grad, .scratch = scratch, .max_norm = 1}, nullptr); },
        {{.kernel = "grad_norm_chunk_kernel",
          .read = 4.0 * double(n),
          .written = 3 * kSector,
          .used = 0.1,
          .because = "a chunk leaves one number"},
         {.kernel = "grad_norm_kernel", .read = kSector, .written = 2 * kSector, .used = 0.1, .because = kOneBlock}});
}

TEST_CASE("traffic: element by element") {
    for (const Sizes& s : kReals) {
        const Target t = target_of(s);
        const int B = 2, T = 33, C = 96;
        const size_t n = size_t(B) * T * C;
        CAPTURE(s.name);
        Dev x(t, s.t, normal(n, 1)), y(t, s.t, normal(n, 2)), z(t, s.t, poison(n)), wide(t, DType::f32, normal(n, 3));
        const double all = double(n) * s.e;
        check_traffic([&] { t.k->gelu_forward({.y = z, .x = x}, nullptr); },
                      {{.kernel = "gelu_forward_kernel<" + s.name + ">", .read = all, .written = all}});
        check_traffic([&] { t.k->gelu_backward({.dx = z, .dy = y, .x = x}, nullptr); },
                      {{.kernel = "gelu_backward_kernel<" + s.name + ">", .read = 2 * all, .written = all}});
        check_traffic([&] { t.k->cast({.y = z, .x = wide}, nullptr); },
                      {{.kernel = "cast_kernel<" + s.name + ">", .read = 4.0 * double(n), .written = all}});
        Dev where(t, DType::u32, {3, 5});
        const double warps = all / 512;
        check_traffic(
            [&] {
                t.k->dropout({.y = z,
                              .x = x,
                              .residual = y,
                              .mask = {.where = where, .seed = 1, .site = 2, .p = 0.2f},
                              .B = B,
                              .T = T,
                              .C = C},
                             nullptr);
            },
            {{.kernel = "dropout_kernel<" + s.name + ">",
              .read = 2 * all,
              .written = all,
              .cached = 2 * warps * kSector}});  // each warp: step and place
    }
}

TEST_CASE("traffic: sums") {
    const Target t = target_of(kReals[0]);
    const size_t n = 4 * 256 * 5 + 16;
    const double each = 4.0 * double(n);
    Dev x(t, DType::f32, normal(16 * n, 1)), y(t, DType::f32, normal(n, 2)), other(t, DType::f32, normal(n, 3));
    check_traffic([&] { t.k->add({.y = y, .x = other}, nullptr); },
                  {{.kernel = "add_kernel", .read = 2 * each, .written = each}});
    check_traffic([&] { t.k->tree_sum({.y = y, .x = x, .parts = 16}, nullptr); },  // 16, then the two sums of eight
                  {{.kernel = "tree_sum_kernel", .read = 16 * each, .written = 3 * each, .cached = 2 * each}});
    Dev hash(t, DType::u32, Doubles(2, 0));
    check_traffic(
        [&] { t.k->hash({.y = hash, .x = y}, nullptr); },
        {{.kernel = "hash_parts_kernel",
          .read = each,
          .written = 5 * kSector,
          .used = 0.2,
          .because = "a block leaves one number"},
         {.kernel = "hash_kernel", .read = 2 * kSector, .written = 2 * kSector, .used = 0.1, .because = kOneBlock}});
    const int B = 3, T = 512;
    Dev rows(t, DType::f32, normal(size_t(B) * T, 4)), sums(t, DType::f32, poison(B));
    check_traffic([&] { t.k->row_sum({.y = sums, .x = rows, .B = B, .T = T}, nullptr); },
                  {{.kernel = "row_sum_kernel",
                    .read = 4.0 * B * T,
                    .written = B * kSector,
                    .used = 0.1,
                    .because = "a row leaves one number"}});
}

TEST_CASE("traffic: linear's column sums") {
    for (const Sizes& s : kReals)
        for (bool accumulate : {false, true}) {
            const Target t = target_of(s);
            const int BT = 130, C = 16, OC = 768, chunks = 3;  // of 64 rows
            CAPTURE(s.name);
            CAPTURE(accumulate);
            Dev dy(t, s.t, normal(size_t(BT) * OC, 1)), x(t, s.t, normal(size_t(BT) * C, 2));
            Dev w(t, s.t, normal(size_t(C) * OC, 3));
            Dev dw(t, DType::f32, normal(size_t(C) * OC, 4)), db(t, DType::f32, normal(size_t(OC), 5));
            const double row = 4.0 * OC;
            check_traffic(
                [&] {
                    t.k->linear_backward({.dw = dw,
                                          .db = db,
                                          .dy = dy,
                                          .x = x,
                                          .w = w,
                                          .BT = BT,
                                          .C = C,
                                          .OC = OC,
                                          .accumulate = accumulate},
                                         nullptr);
                },
                {{.kernel = "linear_column_sum_kernel<" + s.name + (s.e == 2 ? ", 8>" : ", 4>"),
                  .read = double(BT) * OC * s.e,
                  .written = chunks * row},
                 {.kernel = "linear_column_sum_kernel<float, 1>",
                  .read = (chunks + accumulate) * row,
                  .written = row}});
        }
}
#endif
