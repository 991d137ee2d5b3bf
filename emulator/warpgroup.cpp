// Instructions that all four warps of a warpgroup execute alike: wgmma and setmaxnreg.  PTX leaves it undefined when
// one warp executes another instruction, other operands, or none.  The warps need not meet: the n-th instruction of a
// warp is compared with the n-th of the others.
#include <algorithm>

#include "state.h"

namespace emulator {
namespace {
Warpgroup& own_group() { return block().warpgroups[self().warp / kWarpsOfGroup]; }

// Registers of a thread that a block is launched with: an equal share of 65,536, in steps of 8, at most 256 (255 that
// a thread can name).  All of them belong to the block until it ends, also those of warps that have exited.
int launched_registers() { return std::min(65536 / (block().n_warps * 32) / 8 * 8, 256); }
}  // namespace

void join_warpgroup(const GroupInstruction& own) {
    Block& b = block();
    const unsigned first_warp = self().warp / kWarpsOfGroup * kWarpsOfGroup;
    if (int(first_warp + kWarpsOfGroup) > b.n_warps)
        fail("synccheck", own.name + " in a warp whose warpgroup is not complete");
    Warpgroup& g = own_group();
    const uint64_t at = own_warp().n_group_instructions++ - g.n_common;
    if (at == g.ahead.size())
        g.ahead.push_back(own);
    else if (g.ahead[at] != own)
        fail("synccheck", own.name + " [" + place(own.pc) + "] differs from that of another warp of its warpgroup: " +
                              g.ahead[at].name + " [" + place(g.ahead[at].pc) + "]");
    uint64_t common = own_warp().n_group_instructions;
    for (unsigned w = first_warp; w < first_warp + kWarpsOfGroup; w++)
        common = std::min(common, b.warps[w].n_group_instructions);
    for (; g.n_common < common; g.n_common++) g.ahead.pop_front();
}

void check_warpgroups() {
    const Block& b = block();
    for (const Warpgroup& g : b.warpgroups) {
        if (g.ahead.empty()) continue;
        const GroupInstruction& missed = g.ahead.front();
        report("synccheck", missed.pc, 8, [&] {
            return missed.name + " [" + place(missed.pc) + "] was not executed by all four warps of warpgroup " +
                   std::to_string(&g - b.warpgroups) + " (seen as " + agent_name(int(self().lin)) + " exits)";
        });
    }
}

// On hardware an increase waits until the block's other warps have given up enough registers.
void setmaxnreg(bool increase, int n) {
    const uintptr_t pc = CALLER_PC();
    struct Change {
        bool increase;
        int n;
        uintptr_t pc;
    };
    if (n < 24 || n > 256 || n % 8) fail("synccheck", "setmaxnreg of " + std::to_string(n) + ": not 24, 32, .. 256");
    Change change{increase, n, pc};
    const auto body = [](void* const* arguments, uint32_t) {
        const Change& c = *static_cast<const Change*>(arguments[0]);
        const std::string name = std::string(c.increase ? "setmaxnreg.inc " : "setmaxnreg.dec ") + std::to_string(c.n);
        join_warpgroup({.name = name, .pc = c.pc});
        Block& b = block();
        Warp& w = own_warp();
        const int before = w.registers ? w.registers : launched_registers();
        if (c.increase ? c.n < before : c.n > before)
            fail("synccheck", name + " in a warp whose threads have " + std::to_string(before) + " registers");
        const int wanted = 32 * (c.n - before);
        while (wanted > b.free_registers) {
            b.wait_for_registers[self().warp] |= 1u << self().lane;
            park("setmaxnreg.inc, for registers that no warp gives up", c.pc);
        }
        b.free_registers -= wanted;
        w.registers = c.n;
        if (wanted < 0) wake(b.wait_for_registers);
    };
    collective_at(increase ? "setmaxnreg.inc" : "setmaxnreg.dec", kFullMask, &change, body, pc);
}
}  // namespace emulator
