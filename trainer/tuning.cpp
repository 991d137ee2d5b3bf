#include "trainer/tuning.h"

#include <algorithm>
#include <array>
#include <sstream>
#include <vector>

#include "common/clock.h"
#include "common/hash.h"
#include "common/token_order.h"
#include "common/tuning_cache.h"

namespace {
Choices of(const Backend& k) { return parse_choices(k.choices(), "the choices in use"); }

bool has(const Choices& c, const std::string& kind, const std::string& choice) {
    const auto at = c.by_kind.find(kind);
    return at != c.by_kind.end() && at->second == choice;
}

// The checkpoint's, unless they are for another GPU or library.
Choices usable(const std::string& saved, const std::string& made_for, Log& log) {
    Choices c{.made_for = made_for, .by_kind = {}};
    if (saved.empty()) return c;
    Choices theirs = parse_choices(saved, "state.json: choices");
    if (theirs.made_for == made_for) return theirs;
    log.warn(
        "the checkpoint's choices for matrix products were made for {}; this is {}: they are made anew, the run goes "
        "on, but not bit for bit",
        theirs.made_for, made_for);
    return c;
}

std::string decide(const Backend& k, Log& log, const std::string& saved_text,
                   const std::function<std::string()>& tune) {
    const Stopwatch clock;
    const std::string made_for = of(k).made_for;
    const ChoiceCache cache(ChoiceCache::directory(), made_for, log);
    const Choices saved = usable(saved_text, made_for, log), cached = cache.read();
    Choices known = saved;
    known.by_kind.insert(cached.by_kind.begin(), cached.by_kind.end());
    k.set_choices(to_text(known));
    std::istringstream notes(tune());
    for (std::string line; std::getline(notes, line);) log.info("matrix product {}", line);

    const Choices used = of(k);
    Choices made{.made_for = made_for, .by_kind = {}};
    size_t n_saved = 0, n_cached = 0;
    for (const auto& [kind, choice] : used.by_kind) {
        if (has(saved, kind, choice))
            n_saved++;
        else if (has(cached, kind, choice))
            n_cached++;
        else
            made.by_kind[kind] = choice;
    }
    log.info(
        "matrix products: {} kinds, {} computed as the checkpoint has it, {} as {} has it, {} chosen by timing; {:.1f} "
        "s",
        used.by_kind.size(), n_saved, n_cached, cache.path().empty() ? "no cache" : cache.path().string(),
        made.by_kind.size(), clock.ms() / 1e3);
    if (!made.by_kind.empty()) cache.add(made);
    return to_text(used);
}
}  // namespace

std::string tune_on_random_tokens(const Pass& training, bool accumulates) {
    const Backend& k = training.k;
    const Batch& batch = training.batch;
    const int V = training.config.V;
    const Stream s = training.stream;
    std::vector<int32_t> inputs(batch.inputs.count), targets(batch.targets.count), order(batch.order.count);
    for (size_t i = 0; i < inputs.size(); i++) {
        inputs[i] = int32_t(hash_word(i, 0) % uint64_t(V));
        targets[i] = int32_t(hash_word(i, 1) % uint64_t(V));
    }
    sort_rows_by_token(inputs.data(), order.data(), inputs.size(), V);
    const uint32_t where[2] = {0, 0};
    k.upload(batch.inputs.data, inputs.data(), batch.inputs.n_bytes(), s);
    k.upload(batch.targets.data, targets.data(), batch.targets.n_bytes(), s);
    k.upload(batch.order.data, order.data(), batch.order.n_bytes(), s);
    k.upload(batch.where.data, where, batch.where.n_bytes(), s);
    const Architecture& model = *training.config.architecture;
    k.tune(true);
    for (const bool accumulate : {false, true}) {
        if (accumulate && !accumulates) break;
        Pass step = training;
        step.accumulate = accumulate;
        model.forward(step);
        model.backward(step);
    }
    Pass evaluation = training;
    evaluation.grads = nullptr;
    evaluation.train = false;
    evaluation.grad_scale = 0;
    model.forward(evaluation);
    k.synchronize(s);
    return k.tune(false);
}

std::string agree_on_choices(const Backend& k, Comm& comm, Log& log, const std::string& saved,
                             const std::function<std::string()>& tune) {
    if (k.choices().empty()) return "";
    std::string text;
    if (comm.rank() == 0) text = decide(k, log, saved, tune);
    uint64_t size = text.size();
    comm.broadcast(&size, sizeof size, 0);
    text.resize(size);
    comm.broadcast(text.data(), size, 0);

    using Reason = std::array<char, 256>;
    Reason mine{};
    k.set_choices(text).copy(mine.data(), mine.size() - 1);
    std::vector<Reason> all(size_t(comm.size()));  // (ranks) why not
    comm.all_gather(mine.data(), all.data(), sizeof mine);
    for (size_t r = 0; r < all.size(); r++)
        if (all[r][0])
            log.warn("rank {} cannot use rank 0's choices for matrix products, {}: it takes the library's guesses", r,
                     all[r].data());
    return text;
}
