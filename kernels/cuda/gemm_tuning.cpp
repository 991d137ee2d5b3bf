// Chooses algorithms, and whether to fuse, by timing or from a text: see gemm_tuning.h.
#include "kernels/cuda/gemm_tuning.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "common/tuning_cache.h"
#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/cuda.h"

namespace {
using cuda::Gemm;
using Key = cuda::GemmKey;
using Plan = cuda::GemmPlan;
using Algorithm = cuda::GemmAlgorithm;

constexpr const char* kApart = "apart";  // stands in a text where an algorithm would
constexpr double kSlow = 1.5;            // a first timed run this many times slower than the best drops a candidate
constexpr int kRounds = 3;
constexpr double kRoundMs = 0.2;  // a round repeats a run for this long, or kMaxRuns times: a single run
constexpr double kLongMs = 2;  // such a run is timed once, and only for kLongCandidates: the head's would take seconds
constexpr size_t kLongCandidates = 8;
constexpr int kMaxRuns = 16;  // of a few microseconds would only time its launch

// The plans of the open device.  Never destroyed, as the library's handle.
struct Table {
    std::map<Key, Plan> plans;
    Choices given{.made_for = {}, .by_kind = {}};
    bool tuning = false, trying = false;  // trying: timing calls that may not be chosen
    std::string notes;                    // since tuning began; a line each
};
Table& table() {
    static Table& t = *new Table;
    return t;
}
void note(const Key& k, const std::string& text) { table().notes += fmt::format("{}: {}\n", cuda::text_of(k), text); }

std::string made_for() {
    int ordinal = 0;
    cudaDeviceProp p{};
    CUDA_CHECK(cudaGetDevice(&ordinal));
    CUDA_CHECK(cudaGetDeviceProperties(&p, ordinal));
    return fmt::format("{}, compute capability {}.{}, {} multiprocessors, cuBLASLt {} with {} MiB", p.name, p.major,
                       p.minor, p.multiProcessorCount, cuda::lt().GetVersion(), cuda::gemm_workspace_bytes() >> 20);
}

// An algorithm as 128 hexadecimal digits.
std::string text_of(const Algorithm& a) {
    std::string text;
    for (const uint64_t word : a.data) text += fmt::format("{:016x}", word);
    return text;
}
bool read(const std::string& text, Algorithm& a) {
    if (text.size() != 16 * std::size(a.data)) return false;
    const char* p = text.data();
    for (uint64_t& word : a.data) {
        const auto [end, error] = std::from_chars(p, p + 16, word, 16);
        if (error != std::errc() || end != p + 16) return false;
        p += 16;
    }
    return true;
}

bool is_captured(Stream s) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    CUDA_CHECK(cudaStreamIsCapturing(s, &status));
    return status != cudaStreamCaptureStatusNone;
}

// Milliseconds that n runs of `work` take on the device.  Negative: work() returned false.
template <class F>
double elapsed(F&& work, long n, Stream s) {
    static const std::array<cudaEvent_t, 2> events = [] {
        std::array<cudaEvent_t, 2> made{};
        for (cudaEvent_t& e : made) CUDA_CHECK(cudaEventCreateWithFlags(&e, cudaEventDefault));
        return made;
    }();
    CUDA_CHECK(cudaEventRecord(events[0], s));
    for (long i = 0; i < n; i++)
        if (!work()) return -1;
    CUDA_CHECK(cudaEventRecord(events[1], s));
    CUDA_CHECK(cudaEventSynchronize(events[1]));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, events[0], events[1]));
    return double(ms);
}

// The least time of a run, after one untimed run.  A run that is far slower than the best so far is timed only once.
template <class F>
double time_of(F&& work, double best, Stream s) {
    if (!work()) return -1;
    const double first = elapsed(work, 1, s);
    if (first < 0 || first > kSlow * best || first > kLongMs) return first;
    const long n = std::lround(std::clamp(kRoundMs / std::max(first, 1e-3), 1.0, double(kMaxRuns)));
    double least = first;
    for (int round = 0; round < kRounds; round++) {
        const double ms = elapsed(work, n, s);
        if (ms < 0) return ms;
        least = std::min(least, ms / double(n));
    }
    return least;
}

// A hash of everything that a product writes.
uint64_t hash_of_outputs(const Gemm& g, Stream s) {
    uint64_t sum = 0;
    for (const Buf& out : {g.d, g.pre_gelu, g.sums_a, g.sums_b}) {
        if (!out) continue;
        const size_t per_word = 4 / dtype_bytes(out.dtype), whole = out.count / per_word * per_word;
        uint32_t halves[2] = {};
        uint16_t last = 0;                                                     // an odd number of bf16
        const Buf y(static_cast<uint32_t*>(cuda::gemm_workspace(s).data), 2);  // (2) the product no longer uses it
        cuda::hash({.y = y, .x = out.slice(0, whole)}, s);
        CUDA_CHECK(cudaMemcpyAsync(halves, y.data, sizeof halves, cudaMemcpyDeviceToHost, s));
        if (whole < out.count)
            CUDA_CHECK(cudaMemcpyAsync(&last, out.slice(whole, 1).data, sizeof last, cudaMemcpyDeviceToHost, s));
        CUDA_CHECK(cudaStreamSynchronize(s));
        sum = sum * 31 + (halves[0] | uint64_t(halves[1]) << 32) + last;
    }
    return sum;
}

// True: two runs give the same bits.  A product that adds to its own output runs without adding: same algorithm.
bool repeats(const Gemm& g, const Plan& p, const Algorithm& a, Stream s) {
    uint64_t hashes[2] = {};
    for (uint64_t& h : hashes) {
        const cublasStatus_t status = cuda::multiply(g, p, a, g.c.data != g.d.data, s);
        CHECK_THAT(status == CUBLAS_STATUS_SUCCESS, "cuBLASLt: {} when it is repeated",
                   cuda::lt().GetStatusName(status));
        h = hash_of_outputs(g, s);
    }
    return hashes[0] == hashes[1];
}

// Elements of an output, evenly spread over it.
constexpr size_t kPieces = 16, kPiece = 256;
std::vector<double> sample(const Buf& out, Stream s) {
    const size_t n_pieces = std::min(kPieces, (out.count + kPiece - 1) / kPiece), n = std::min(kPiece, out.count);
    std::vector<double> all;
    for (size_t i = 0; i < n_pieces; i++) {
        const Buf piece = out.slice(n_pieces == 1 ? 0 : (out.count - n) * i / (n_pieces - 1), n);
        std::vector<char> bytes(piece.n_bytes());
        CUDA_CHECK(cudaMemcpyAsync(bytes.data(), piece.data, bytes.size(), cudaMemcpyDeviceToHost, s));
        CUDA_CHECK(cudaStreamSynchronize(s));
        for (size_t j = 0; j < n; j++)
            all.push_back(piece.dtype == DType::bf16 ? double(float(reinterpret_cast<const bf16*>(bytes.data())[j]))
                                                     : double(reinterpret_cast<const float*>(bytes.data())[j]));
    }
    return all;
}
struct Sample {
    std::vector<std::vector<double>> outputs;  // that a product has
    std::vector<double> unit;                  // of each: the distance of neighbouring numbers near 1
};
// Empty where the algorithm does not run.
Sample sample_of(const Gemm& g, const Plan& p, const Algorithm& a, Stream s) {
    Sample x;
    if (cuda::multiply(g, p, a, g.c.data != g.d.data, s) != CUBLAS_STATUS_SUCCESS) return x;
    for (const Buf& out : {g.d, g.pre_gelu, g.sums_a, g.sums_b}) {
        if (!out) continue;
        x.outputs.push_back(sample(out, s));
        x.unit.push_back(out.dtype == DType::bf16 ? 0x1p-7 : 0x1p-23);
    }
    return x;
}

// Why two results of one product of K terms cannot both be right; empty: they agree.  Sums in fp32 of K terms, which
// are about as large as rms / sqrt(K), end with an error of about sqrt(K) roundings of rms, and of K / 16 more where
// tensor cores cut each sum of 16 terms instead of rounding it.  16 times the first and twice the second are allowed,
// and one unit of the stored number.  One tile of k left out (16 terms or more) changes results by sqrt(16 / K) rms.
std::string difference(const Sample& x, const Sample& reference, int K) {
    for (size_t o = 0; o < x.outputs.size(); o++) {
        const std::vector<double>&got = x.outputs[o], &want = reference.outputs[o];
        double squares = 0;
        for (const double v : want) squares += v * v;
        const double rms = std::sqrt(squares / double(want.size()));
        const double of_sums = 0x1p-24 * (16 * std::sqrt(double(K)) + double(K) / 8) * rms;
        for (size_t i = 0; i < want.size(); i++)
            if (std::bit_cast<uint64_t>(got[i]) != std::bit_cast<uint64_t>(want[i]) &&
                !(std::abs(got[i] - want[i]) <= of_sums + x.unit[o] * std::abs(want[i])))
                return fmt::format("{} in the place of {}", got[i], want[i]);
    }
    return "";
}

// Puts the fastest algorithm that repeats its bits, and agrees with an unsplit one, into the plan.
void choose_algorithm(Plan& p, const Key& k, const Gemm& g, Stream s) {
    struct Candidate {
        double ms;
        Algorithm algorithm;
    };
    std::vector<Candidate> timed;
    double best = std::numeric_limits<double>::infinity();
    std::vector<Algorithm> candidates = cuda::guesses(p, k, cuda::kMaxCandidates, &p.status);
    cuda::add_splits(candidates, p, k);
    for (const Algorithm& a : candidates) {
        if (&a - candidates.data() >= ptrdiff_t(kLongCandidates) && best > kLongMs && std::isfinite(best)) break;
        const double ms = time_of([&] { return cuda::multiply(g, p, a, true, s) == CUBLAS_STATUS_SUCCESS; }, best, s);
        if (ms < 0) continue;
        timed.push_back({ms, a});
        best = std::min(best, ms);
    }
    if (p.status != CUBLAS_STATUS_SUCCESS) return;
    Sample reference;
    const Algorithm* unsplit = nullptr;  // the library's first guess that does not split k and runs
    for (const Algorithm& a : candidates) {
        if (unsplit || cuda::is_split(a)) continue;
        reference = sample_of(g, p, a, s);
        if (!reference.outputs.empty()) unsplit = &a;
    }
    std::ranges::stable_sort(timed, {}, &Candidate::ms);
    for (const Candidate& c : timed) {
        p.algorithm = c.algorithm;
        std::string why = repeats(g, p, c.algorithm, s) ? "" : "other bits when it was repeated";
        if (why.empty() && !reference.outputs.empty())
            why = difference(sample_of(g, p, c.algorithm, s), reference, k.K);
        if (why.empty()) return;
        note(k, fmt::format("an algorithm of {:.1f} us is not used, it gave {}", 1e3 * c.ms, why));
    }
    if (unsplit && repeats(g, p, *unsplit, s)) {
        p.algorithm = *unsplit;
        return;
    }
    p.status = CUBLAS_STATUS_NOT_SUPPORTED;
    note(k, fmt::format("none of {} algorithms can be used", timed.size()));
}

void tune(Plan& p, const Key& k, const Gemm& g, Stream s, const std::function<void()>* apart) {
    choose_algorithm(p, k, g, s);
    p.chosen = p.status == CUBLAS_STATUS_SUCCESS || apart;
    p.apart = false;
    if (!apart) return;
    const bool outermost = !std::exchange(table().trying, true);
    const auto other_way = [&] { return (*apart)(), true; };
    other_way();  // tunes the products that it consists of
    const double none = std::numeric_limits<double>::infinity();
    p.apart = p.status != CUBLAS_STATUS_SUCCESS ||
              time_of(other_way, none, s) <
                  time_of([&] { return cuda::multiply(g, p, p.algorithm, true, s) == CUBLAS_STATUS_SUCCESS; }, none, s);
    if (outermost) table().trying = false;
}

// Takes the choice that was given for this kind, if there is one and it can be used.
void take_given(Plan& p, const Key& k, bool has_apart) {
    const auto given = table().given.by_kind.find(cuda::text_of(k));
    if (given == table().given.by_kind.end()) return;
    p.apart = given->second == kApart && has_apart;
    p.chosen = p.apart;
    if (p.apart) return;
    if (read(given->second, p.algorithm)) p.status = cuda::check_algorithm(p, p.algorithm);
    p.chosen = p.status == CUBLAS_STATUS_SUCCESS;
    if (!p.chosen)
        note(k, fmt::format("the choice that was kept cannot be used: {}", cuda::lt().GetStatusName(p.status)));
}

void take_first_guess(Plan& p, const Key& k) {
    // Without timing, sums are not fused: on some GPUs that does not pay.
    p.apart = k.epilogue == CUBLASLT_EPILOGUE_BGRADA || k.epilogue == CUBLASLT_EPILOGUE_BGRADB;
    if (p.apart) return;
    const std::vector<Algorithm> found = cuda::guesses(p, k, 8, &p.status);
    if (!found.empty()) p.algorithm = found[0];
}
}  // namespace

namespace cuda {
const GemmPlan& plan_of(const Gemm& g, const GemmKey& k, Stream s, const std::function<void()>* apart) {
    const auto [at, is_new] = table().plans.try_emplace(k);
    Plan& p = at->second;
    if (is_new) {
        p = describe(g, k);
        take_given(p, k, apart != nullptr);
    }
    p.used = p.used || !table().trying;
    if (p.chosen) return p;
    if (table().tuning && !is_captured(s)) {
        ::tune(p, k, g, s, apart);
    } else if (is_new) {
        take_first_guess(p, k);
        if (apart && p.status == CUBLAS_STATUS_NOT_SUPPORTED) p.apart = true;
    }
    return p;
}

std::string tune(bool on) {
    table().tuning = on;
    return std::exchange(table().notes, "");
}

std::string choices() {
    Choices c{.made_for = made_for(), .by_kind = {}};
    for (const auto& [k, p] : table().plans)
        if (p.chosen && p.used) c.by_kind[text_of(k)] = p.apart ? kApart : ::text_of(p.algorithm);
    return to_text(c);
}

std::string set_choices(const std::string& text) {
    Choices given{.made_for = made_for(), .by_kind = {}};
    if (!text.empty()) given = parse_choices(text, "the choices of matrix products");
    if (given.made_for != made_for()) return fmt::format("made for {}; this is {}", given.made_for, made_for());
    Table& t = table();
    for (const auto& [k, p] : t.plans) destroy(p);
    t.plans.clear();
    t.given = std::move(given);
    return "";
}
}  // namespace cuda
