// Reports, and the names that they use for places in the source, threads and memory.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "state.h"

extern "C" char __executable_start;  // from the linker

namespace emulator {
namespace {
std::mutex g_mutex;
std::vector<Report> g_reports;
std::set<std::pair<uintptr_t, uintptr_t>> g_reported;

// Lines that addr2line prints for an address of this program.
std::vector<std::string> addr2line(const char* options, uintptr_t address) {
    const char* start = &__executable_start;
    asm("" : "+r"(start));  // else the compiler reasons that one char has no ELF header
    constexpr uint16_t kPositionIndependent = 3;
    if (reinterpret_cast<const uint16_t*>(start)[8] == kPositionIndependent)
        address -= reinterpret_cast<uintptr_t>(start);
    char command[256], line[4096];
    std::snprintf(command, sizeof command, "addr2line %s -e /proc/%d/exe 0x%lx 2>/dev/null", options, int(getpid()),
                  static_cast<unsigned long>(address));
    std::vector<std::string> lines;
    FILE* pipe = popen(command, "r");
    if (!pipe) return lines;
    while (std::fgets(line, sizeof line, pipe)) {
        lines.emplace_back(line);
        while (!lines.back().empty() && lines.back().back() == '\n') lines.back().pop_back();
    }
    pclose(pipe);
    return lines;
}

void erase_all(std::string& s, const std::string& part) {
    for (size_t at; (at = s.find(part)) != std::string::npos;) s.erase(at, part.size());
}
// "void (anonymous namespace)::add_kernel<float>(float*, int)" -> "add_kernel<float>"
std::string shortened(std::string name) {
    erase_all(name, "(anonymous namespace)::");
    int depth = 0;
    size_t end = name.size();
    for (size_t i = 0; i < name.size(); i++) {
        if (name[i] == '<') depth++;
        if (name[i] == '>') depth--;
        if (name[i] == '(' && depth == 0 && i > 0) {
            end = i;
            break;
        }
    }
    name.resize(end);
    if (name.rfind("void ", 0) == 0) name.erase(0, 5);
    return name;
}
}  // namespace

std::string place(uintptr_t pc) {
    static std::mutex mutex;
    static std::map<uintptr_t, std::string> cache;
    const std::lock_guard<std::mutex> lock(mutex);
    if (pc == 0) return "?";
    std::string& chain = cache[pc];
    if (!chain.empty()) return chain;
    for (const std::string& line : addr2line("-i -s", pc - 1)) {  // - 1: the call, not the instruction after it
        if (!chain.empty()) chain += " < ";
        chain += line.substr(0, line.find(' '));
    }
    if (chain.empty()) chain = "?";
    return chain;
}

std::string name_of_kernel(const void* kernel) {
    static std::mutex mutex;
    static std::map<const void*, std::string> cache;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!kernel) return "?";
    std::string& name = cache[kernel];
    if (!name.empty()) return name;
    // Two lines (function, place) for each inlined call at the kernel's first instruction, the kernel itself last.
    const std::vector<std::string> lines = addr2line("-f -i -C", reinterpret_cast<uintptr_t>(kernel));
    name = lines.size() < 2 ? "?" : shortened(lines[lines.size() - 2]);
    return name;
}

std::string coordinates(uint3 c) {
    return "(" + std::to_string(c.x) + "," + std::to_string(c.y) + "," + std::to_string(c.z) + ")";
}

std::string agent_name(int agent) {
    const Block& b = block();
    if (agent < b.n_threads) return "thread " + coordinates(b.threads[size_t(agent)].tid);
    if (agent < b.tma_agent(0)) return "wgmma of warp " + std::to_string(agent - b.n_threads);
    return "TMA load (mbarrier #" + std::to_string(agent - b.tma_agent(0)) + ")";
}

std::string object_name(const void* p) {
    const Block& b = block();
    const size_t offset = b.offset(p);
    if (offset >= kArenaBytes) {
        const DeviceBuffer* a = b.last_buffer;
        const ptrdiff_t at = a ? static_cast<const uint8_t*>(p) - a->p : 0;
        if (a && at >= -ptrdiff_t(kRedzone) && at < ptrdiff_t(a->n_bytes + kRedzone))
            return "device buffer of " + std::to_string(a->n_bytes) + " bytes " + (at < 0 ? "" : "+") +
                   std::to_string(at);
        return "device memory";
    }
    if (offset >= kSharedBase && offset < kSharedBase + b.n_dynamic_shared)
        return "dynamic shared memory +" + std::to_string(offset - kSharedBase);
    for (size_t i = 0; i < b.static_arrays.size(); i++) {
        const StaticShared& s = b.static_arrays[i];
        if (offset >= s.offset && offset < s.offset + s.n_bytes)
            return "static shared array #" + std::to_string(i) + " +" + std::to_string(offset - s.offset);
    }
    return "shared address " + std::to_string(offset) + ", which no array holds";
}

bool is_new_report(uintptr_t pc, uintptr_t other_pc) {
    const std::lock_guard<std::mutex> lock(g_mutex);
    return g_reports.size() < config().max_reports && g_reported.insert({pc, other_pc}).second;
}

void add_report(const std::string& kind, const std::string& text) {
    const std::lock_guard<std::mutex> lock(g_mutex);
    g_reports.push_back({kind, text});
}

std::vector<Report> take_reports() {
    const std::lock_guard<std::mutex> lock(g_mutex);
    std::vector<Report> reports = std::move(g_reports);
    g_reports.clear();
    g_reported.clear();
    return reports;
}
}  // namespace emulator
