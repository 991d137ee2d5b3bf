// Counters per kernel: how well a warp's accesses coalesce, and the bank conflicts of shared memory.
//
// The hooks see lanes one after the other.  Between two points where the lanes of a warp meet, the k-th execution of
// one instruction by each lane is taken to be one request: exact as long as all lanes run an instruction the same
// number of times.
#include <algorithm>
#include <cstdio>

#include "state.h"

namespace emulator {
struct Request {
    uint32_t lanes = 0;
    const uint8_t* address[32];
    uint32_t n_bytes[32];
};
struct AccessSite {
    bool write, shared;
    uint32_t executed[32] = {};  // by lane, since the lanes met
    std::vector<Request> requests;
};

namespace {
constexpr uintptr_t kSector = 32, kBanks = 32, kBankBytes = 4;
std::mutex g_mutex;
std::map<const void*, KernelCounters> g_counters;

struct Touched {
    uint64_t sectors = 0, bytes = 0;
};
Touched touched(const Request& r) {
    std::vector<std::pair<uintptr_t, uintptr_t>> ranges;  // of bytes, [first, end)
    for (int l = 0; l < 32; l++) {
        const auto first = reinterpret_cast<uintptr_t>(r.address[l]);
        if (r.lanes >> l & 1) ranges.emplace_back(first, first + r.n_bytes[l]);
    }
    std::sort(ranges.begin(), ranges.end());
    Touched t;
    uintptr_t bytes_to = 0, sectors_to = 0;  // all below has been counted
    for (const auto& [first, end] : ranges) {
        if (end > bytes_to) t.bytes += end - std::max(first, bytes_to), bytes_to = end;
        const uintptr_t last_sector = (end - 1) / kSector + 1;
        if (last_sector > sectors_to)
            t.sectors += last_sector - std::max(first / kSector, sectors_to), sectors_to = last_sector;
    }
    return t;
}

// Cycles beyond the first for accesses that the hardware serves together: the most words of one bank, less one.
uint64_t conflict_cycles(std::vector<uintptr_t>& words) {
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    uint64_t per_bank[kBanks] = {}, most = 0;
    for (uintptr_t w : words) most = std::max(most, ++per_bank[w % kBanks]);
    words.clear();
    return most > 1 ? most - 1 : 0;
}

// The hardware serves the whole warp at once for up to 4 bytes per lane, halves of the warp one after the other for 8
// bytes, and quarters for 16 bytes.
uint64_t conflicts(const Request& r) {
    std::vector<uintptr_t> words;
    uint64_t extra = 0;
    uint32_t widest = kBankBytes;
    for (int l = 0; l < 32; l++)
        if (r.lanes >> l & 1) widest = std::max(widest, r.n_bytes[l]);
    const int at_once = std::max(1, int(kBanks * kBankBytes / widest));
    for (int l = 0; l < 32; l++) {
        if (r.lanes >> l & 1) {
            const auto first = reinterpret_cast<uintptr_t>(r.address[l]);
            for (uintptr_t w = first / kBankBytes; w <= (first + r.n_bytes[l] - 1) / kBankBytes; w++)
                words.push_back(w);
        }
        if ((l + 1) % at_once == 0) extra += conflict_cycles(words);
    }
    return extra;
}

void count(const AccessSite& site, const Request& r, KernelCounters& to) {
    if (site.shared) {
        to.shared_accesses++;
        to.shared_conflict_cycles += conflicts(r);
    } else {
        const Touched t = touched(r);
        (site.write ? to.global_stores : to.global_loads)++;
        (site.write ? to.global_store_sectors : to.global_load_sectors) += t.sectors;
        (site.write ? to.global_store_bytes : to.global_load_bytes) += t.bytes;
    }
}

void add(KernelCounters& to, const KernelCounters& from) {
    to.launches += from.launches;
    to.global_loads += from.global_loads;
    to.global_load_sectors += from.global_load_sectors;
    to.global_load_bytes += from.global_load_bytes;
    to.global_stores += from.global_stores;
    to.global_store_sectors += from.global_store_sectors;
    to.global_store_bytes += from.global_store_bytes;
    to.shared_accesses += from.shared_accesses;
    to.shared_conflict_cycles += from.shared_conflict_cycles;
}

void print_at_exit() {
    const auto ratio = [](uint64_t a, uint64_t b) { return b ? double(a) / double(b) : 0.0; };
    std::fprintf(stderr, "%-48s %9s %12s %8s %6s %12s %8s %6s %12s %12s\n", "kernel", "launches", "loads", "sectors",
                 "used", "stores", "sectors", "used", "shared", "conflicts");
    for (const auto& [name, c] : counters())
        std::fprintf(stderr, "%-48s %9llu %12llu %8.2f %5.0f%% %12llu %8.2f %5.0f%% %12llu %12llu\n", name.c_str(),
                     static_cast<unsigned long long>(c.launches), static_cast<unsigned long long>(c.global_loads),
                     ratio(c.global_load_sectors, c.global_loads),
                     100 * ratio(c.global_load_bytes, kSector * c.global_load_sectors),
                     static_cast<unsigned long long>(c.global_stores), ratio(c.global_store_sectors, c.global_stores),
                     100 * ratio(c.global_store_bytes, kSector * c.global_store_sectors),
                     static_cast<unsigned long long>(c.shared_accesses),
                     static_cast<unsigned long long>(c.shared_conflict_cycles));
    if (stats().hooks == 0) std::fprintf(stderr, "accesses are counted in the race build only\n");
}
}  // namespace

void count_access(const Thread& t, const void* p, size_t n_bytes, bool write, uintptr_t pc) {
    Block& b = block();
    const auto* byte = static_cast<const uint8_t*>(p);
    const bool shared = b.in_arena(p);
    if (n_bytes == 0 || (!shared && !find_buffer(p, n_bytes))) return;  // a local variable, or a kernel's parameter
    const uintptr_t key = pc << 2 | uintptr_t(write) << 1 | uintptr_t(shared);
    std::shared_ptr<AccessSite>& site = b.sites[t.warp][key];
    if (!site) {
        site = std::make_shared<AccessSite>();
        site->write = write;
        site->shared = shared;
    }
    const uint32_t k = site->executed[t.lane]++;
    if (k >= site->requests.size()) site->requests.resize(k + 1);
    Request& r = site->requests[k];
    r.lanes |= 1u << t.lane;
    r.address[t.lane] = byte;
    r.n_bytes[t.lane] = uint32_t(n_bytes);
}

void count_matrix(const uint8_t* const (&rows)[8]) {
    std::vector<uintptr_t> words;
    for (const uint8_t* row : rows)
        for (uintptr_t w = 0; w < 4; w++) words.push_back(reinterpret_cast<uintptr_t>(row) / kBankBytes + w);
    block().counted.shared_accesses++;
    block().counted.shared_conflict_cycles += conflict_cycles(words);
}

void flush_counters(unsigned warp) {
    Block& b = block();
    for (auto& [key, site] : b.sites[warp]) {
        for (const Request& r : site->requests) count(*site, r, b.counted);
        site->requests.clear();
        std::fill(std::begin(site->executed), std::end(site->executed), 0u);
    }
}

void add_counters(const void* kernel, const KernelCounters& counted, bool launch) {
    static const bool printed = [] {
        if (const char* wanted = std::getenv("KILN_EMULATOR_COUNTERS"); wanted && *wanted != '0')
            std::atexit(print_at_exit);
        return true;
    }();
    (void)printed;
    const std::lock_guard<std::mutex> lock(g_mutex);
    KernelCounters& c = g_counters[kernel];
    add(c, counted);
    c.launches += launch;
}

std::map<std::string, KernelCounters> counters() {
    std::map<std::string, KernelCounters> by_name;
    const std::lock_guard<std::mutex> lock(g_mutex);
    for (const auto& [kernel, c] : g_counters) add(by_name[name_of_kernel(kernel)], c);
    return by_name;
}

void reset_counters() {
    const std::lock_guard<std::mutex> lock(g_mutex);
    g_counters.clear();
}
}  // namespace emulator
