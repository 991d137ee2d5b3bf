// wgmma: asynchronous products of a warpgroup.  A warp's part runs at its wait_group; until then the accumulator's
// registers are NaN, and neither these nor the operands, in registers or in shared memory, may be written.  PTX does
// not promise which warp of the group reads which rows of A: each warp counts as a reader of all 64.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "state.h"

namespace emulator {
namespace {
struct WgmmaLane {
    int n;
    float* d;
    const uint32_t* a_registers;
    uint64_t a, b;
    int scale_d, transpose_a, transpose_b;
    uintptr_t pc;
};

// Shared address of element (mn, k) of an operand of bf16, by its descriptor.
uint32_t element_address(uint64_t descriptor, bool mn_major, uint32_t mn, uint32_t k) {
    const uint32_t start = uint32_t(descriptor & 0x3FFF) << 4;
    const uint32_t leading = uint32_t(descriptor >> 16 & 0x3FFF) << 4, stride = uint32_t(descriptor >> 32 & 0x3FFF)
                                                                                << 4;
    // Swizzle field of the descriptor (none, 128, 64, 32 bytes) -> elements of a row, mode of swizzled().
    constexpr uint32_t kWidth[] = {8, 64, 32, 16};
    constexpr int kMode[] = {0, 3, 2, 1};
    const auto field = descriptor >> 62;
    const uint32_t width = kWidth[field];
    uint32_t a = start;
    if (field == 0)
        a += mn_major ? mn / 8 * stride + mn % 8 * 2 + k / 8 * leading + k % 8 * 16
                      : mn / 8 * stride + mn % 8 * 16 + k / 8 * leading + k % 8 * 2;
    else
        a += mn_major ? mn / width * leading + mn % width * 2 + k / 8 * stride + k % 8 * width * 2
                      : mn / 8 * stride + mn % 8 * width * 2 + k * 2;
    return swizzled(a, kMode[field]);
}

// A swizzle's pattern spans eight rows.  With base offset 0 the hardware counts them from the addresses that are
// multiples of the pattern, so an operand must start in the first row of a pattern.
void check_descriptor(uint64_t descriptor, const char* operand) {
    constexpr uint32_t kRow[] = {0, 128, 64, 32};  // bytes, by the swizzle field
    const uint32_t row = kRow[descriptor >> 62], start = uint32_t(descriptor & 0x3FFF) << 4;
    if (row == 0) return;
    const std::string where = std::string("wgmma: operand ") + operand + " at shared address " + std::to_string(start);
    if (descriptor >> 49 & 7) fail("synccheck", where + " has a base offset; the emulator knows only 0");
    if (start % (8 * row) >= row)
        fail("synccheck", where + " starts in row " + std::to_string(start % (8 * row) / row) + " of a swizzle of " +
                              std::to_string(8 * row) + " bytes; with base offset 0 it must be row 0");
}

// The instruction and the operands that all warps of a group share.
std::string text_of(const WgmmaOp& op) {
    char text[160];
    std::snprintf(text, sizeof text, "wgmma.m64n%dk16 (A %s %llx, B %llx, scale-d %d, transposed %d %d)", op.n,
                  op.a_in_registers ? "in registers" : "at", static_cast<unsigned long long>(op.a),
                  static_cast<unsigned long long>(op.b), op.scale_d, op.transpose_a, op.transpose_b);
    return text;
}

// Calls f(pointer) for each 16 bytes of rows first .. first + n of an operand.
template <class F>
void for_operand(uint64_t descriptor, bool mn_major, uint32_t first, uint32_t n, F f) {
    if (mn_major) {
        for (uint32_t k = 0; k < 16; k++)
            for (uint32_t r = first; r < first + n; r += 8) f(shared_pointer(element_address(descriptor, true, r, k)));
    } else {
        for (uint32_t r = first; r < first + n; r++)
            for (uint32_t k = 0; k < 16; k += 8) f(shared_pointer(element_address(descriptor, false, r, k)));
    }
}
// Calls f(pointer) for each 16 bytes of shared memory that this warp may read.
template <class F>
void for_operands(const WgmmaOp& op, F f) {
    if (!op.a_in_registers) for_operand(op.a, op.transpose_a, 0, 64, f);
    for_operand(op.b, op.transpose_b, 0, uint32_t(op.n), f);
}

// Value (row, n) of the warp's 16 x N part lies at register 4 (n / 8) + 2 (row / 8) + (n & 1) of lane
// 4 (row % 8) + (n % 8) / 2.
size_t accumulator_index(int row, int n, int n_per_lane) {
    return size_t(((row & 7) * 4 + (n & 7) / 2) * n_per_lane + n / 8 * 4 + 2 * (row >> 3) + (n & 1));
}

WgmmaOp make_op(const WgmmaLane* const* lanes) {
    const WgmmaLane& first = *lanes[0];
    WgmmaOp op{};
    op.n = first.n;
    op.a_in_registers = first.a_registers != nullptr;
    op.a = first.a;
    op.b = first.b;
    op.scale_d = first.scale_d;
    op.transpose_a = first.transpose_a;
    op.transpose_b = first.transpose_b;
    op.first_row = int(self().warp % 4) * 16;
    for (int l = 0; l < 32; l++) {
        if (lanes[l]->a != op.a || lanes[l]->b != op.b || lanes[l]->scale_d != op.scale_d)
            fail("synccheck", "wgmma: operands differ between the lanes of a warp");
        op.a_at[l] = lanes[l]->a_registers;
        if (op.a_in_registers) std::memcpy(op.a_registers[l], op.a_at[l], sizeof op.a_registers[l]);
    }
    return op;
}

// Returns the accumulator in flight that these registers belong to; where there is none, takes the registers over and
// poisons them.
std::shared_ptr<Accumulator> accumulator_of(const WgmmaLane* const* lanes, int n_per_lane) {
    const Warp& w = own_warp();
    std::shared_ptr<Accumulator> found;
    const float* const first = lanes[0]->d;
    const auto look_in = [&](const std::vector<WgmmaOp>& ops) {
        for (const WgmmaOp& op : ops) {
            const float* const other = op.accumulator->registers[0];
            if (other >= first + n_per_lane || first >= other + op.accumulator->n) continue;
            if (other != first || op.accumulator->n != n_per_lane)
                fail("synccheck", "wgmma: its accumulator overlaps one of another shape that is in flight");
            found = op.accumulator;
        }
    };
    for (const auto& group : w.wgmma_groups) look_in(group);
    look_in(w.wgmma);
    if (found) return found;
    auto taken = std::make_shared<Accumulator>();
    taken->n = n_per_lane;
    for (int l = 0; l < 32; l++) {
        taken->registers[l] = lanes[l]->d;
        taken->values.insert(taken->values.end(), lanes[l]->d, lanes[l]->d + n_per_lane);
        std::fill(lanes[l]->d, lanes[l]->d + n_per_lane, __builtin_nanf(""));
    }
    return taken;
}

void check_operands(const WgmmaOp& op, uintptr_t pc) {
    Block& b = block();
    const unsigned warp = self().warp;
    for_operands(op, [](uint8_t* p) { check_bounds(p, 16, "wgmma operand"); });
    if (!b.racecheck) return;
    std::vector<uint32_t> known(size_t(b.n_agents), 0);  // clocks known to any lane
    for (int l = 0; l < 32; l++) join(known.data(), clock_of(int(warp) * 32 + l));
    const int agent = b.wgmma_agent(warp);
    known[size_t(agent)] = 0x7fffffff;  // the reads are not over before wait_group
    for_operands(op, [&](uint8_t* p) {
        check_access({p, 16, false, pc, agent, false, known.data()});
        check_proxy_fence(p, 16, pc, "wgmma");
        for_cells(p, 16, [&](Cell& c) {
            c.pending_reads++;
            c.read_pc = pc;
        });
    });
}

void issue(void* const* arguments, uint32_t) {
    const auto* lanes = reinterpret_cast<const WgmmaLane* const*>(arguments);
    Warp& w = own_warp();
    if (!w.wgmma_fenced)
        fail("synccheck", "wgmma.mma_async without wgmma.fence since the accumulator's registers were last touched");
    WgmmaOp op = make_op(lanes);
    join_warpgroup({.name = text_of(op), .pc = lanes[0]->pc});
    if (!op.a_in_registers) check_descriptor(op.a, "A");
    check_descriptor(op.b, "B");
    op.accumulator = accumulator_of(lanes, op.n / 2);
    check_operands(op, lanes[0]->pc);
    w.wgmma.push_back(std::move(op));
}

float shared_bf16(uint32_t address) {
    uint16_t bits;
    std::memcpy(&bits, block().arena + address, 2);
    return __builtin_bit_cast(float, uint32_t(bits) << 16);
}

void multiply(const WgmmaOp& op) {
    constexpr int kK = 16, kRows = 16, kMaxN = 256;
    static thread_local float a[kRows][kK], b[kK][kMaxN], d[kRows][kMaxN];
    const int n_columns = op.n;
    for (int k = 0; k < kK; k++)
        for (int n = 0; n < n_columns; n++)
            b[k][n] = shared_bf16(element_address(op.b, op.transpose_b, uint32_t(n), uint32_t(k)));
    for (int row = 0; row < kRows; row++) {
        for (int k = 0; k < kK; k++) {
            const int lane = (row & 7) * 4 + (k & 7) / 2, reg = (row >> 3) + 2 * (k >> 3);
            a[row][k] =
                op.a_in_registers
                    ? __builtin_bit_cast(float, (op.a_registers[lane][reg] >> (16 * (k & 1))) << 16)
                    : shared_bf16(element_address(op.a, op.transpose_a, uint32_t(op.first_row + row), uint32_t(k)));
        }
    }
    float* values = op.accumulator->values.data();
    for (int row = 0; row < kRows; row++) {
        for (int n = 0; n < n_columns; n++)
            d[row][n] = op.scale_d ? values[accumulator_index(row, n, n_columns / 2)] : 0.0f;
        for (int k = 0; k < kK; k++)
            for (int n = 0; n < n_columns; n++) d[row][n] += a[row][k] * b[k][n];
        for (int n = 0; n < n_columns; n++) values[accumulator_index(row, n, n_columns / 2)] = d[row][n];
    }
}

// The kernel must not write registers in flight.
void check_registers(const WgmmaOp& op) {
    if (!op.a_in_registers) return;
    for (int l = 0; l < 32; l++)
        if (std::memcmp(op.a_registers[l], op.a_at[l], sizeof op.a_registers[l]) != 0)
            fail("synccheck", "registers of wgmma's operand A were written before wait_group");
}
void check_poison(const Accumulator& accumulator) {
    const auto is_poison = [](float x) {
        return __builtin_bit_cast(uint32_t, x) == __builtin_bit_cast(uint32_t, __builtin_nanf(""));
    };
    for (int l = 0; l < 32; l++)
        if (!std::all_of(accumulator.registers[l], accumulator.registers[l] + accumulator.n, is_poison))
            fail("synccheck", "registers of wgmma's accumulator were written before wait_group");
}

// Ends the reads of the operands: a thread that knows of the wait may write them again.
void end_reads(const WgmmaOp& op, int agent, uint32_t clock) {
    for_operands(op, [&](uint8_t* p) {
        for_cells(p, 16, [&](Cell& c) {
            if (c.pending_reads) c.pending_reads--;
            record_read(c, agent, clock, c.read_pc);
        });
    });
}

void give_back(Accumulator& accumulator) {
    const Warp& w = own_warp();
    const auto uses = [&](const std::vector<WgmmaOp>& ops) {
        return std::any_of(ops.begin(), ops.end(),
                           [&](const WgmmaOp& op) { return op.accumulator.get() == &accumulator; });
    };
    if (accumulator.values.empty() || uses(w.wgmma)) return;
    for (const auto& group : w.wgmma_groups)
        if (uses(group)) return;
    check_poison(accumulator);
    for (int l = 0; l < 32; l++)
        std::copy_n(&accumulator.values[size_t(l * accumulator.n)], accumulator.n, accumulator.registers[l]);
    accumulator.values.clear();
}

void wait(void* const* arguments, uint32_t) {
    Block& b = block();
    Warp& w = own_warp();
    const int n_left = *static_cast<const int*>(arguments[0]);
    const int agent = b.wgmma_agent(self().warp);
    const uint32_t clock = ++w.wgmma_clock;
    std::vector<std::shared_ptr<Accumulator>> finished;
    while (int(w.wgmma_groups.size()) > n_left) {
        for (const WgmmaOp& op : w.wgmma_groups.front()) {
            check_registers(op);
            multiply(op);
            finished.push_back(op.accumulator);
            if (b.racecheck) end_reads(op, agent, clock);
        }
        w.wgmma_groups.pop_front();
    }
    if (b.racecheck)
        for (int l = 0; l < 32; l++) clock_of(int(self().warp) * 32 + l)[agent] = clock;
    for (const auto& accumulator : finished) give_back(*accumulator);
    if (w.wgmma_groups.empty()) w.wgmma_fenced = false;
}
}  // namespace

void wgmma_issue(int n, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, int scale_d, int transpose_a,
                 int transpose_b) {
    WgmmaLane lane{n, d, a_registers, a, b, scale_d, transpose_a, transpose_b, CALLER_PC()};
    collective_at("wgmma.mma_async", kFullMask, &lane, issue, lane.pc);
}

void wgmma_fence() {
    const auto body = [](void* const*, uint32_t) { own_warp().wgmma_fenced = true; };
    collective_at("wgmma.fence", kFullMask, nullptr, body, CALLER_PC());
}

void wgmma_commit() {
    const auto body = [](void* const*, uint32_t) {
        Warp& w = own_warp();
        w.wgmma_groups.push_back(std::move(w.wgmma));
        w.wgmma.clear();
    };
    collective_at("wgmma.commit_group", kFullMask, nullptr, body, CALLER_PC());
}

void wgmma_wait(int n_left) { collective_at("wgmma.wait_group", kFullMask, &n_left, wait, CALLER_PC()); }
}  // namespace emulator
