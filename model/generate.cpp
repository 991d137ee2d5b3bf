#include "model/generate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/rng.h"

int32_t sample_token(std::span<const float> logits, const SampleOptions& o, uint64_t position) {
    if (o.temperature == 0) return int32_t(std::max_element(logits.begin(), logits.end()) - logits.begin());
    std::vector<int32_t> order(logits.size());  // tokens, most likely first; ties by number
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return logits[size_t(a)] > logits[size_t(b)]; });
    if (o.top_k > 0 && size_t(o.top_k) < order.size()) order.resize(size_t(o.top_k));

    std::vector<double> weight(order.size());
    const double top = logits[size_t(order[0])];
    for (size_t i = 0; i < order.size(); i++) weight[i] = std::exp((logits[size_t(order[i])] - top) / o.temperature);
    double total = std::accumulate(weight.begin(), weight.end(), 0.0);
    if (o.top_p < 1) {
        double kept = 0;
        size_t n = 0;
        while (n < weight.size() && (n == 0 || kept < o.top_p * total)) kept += weight[n++];
        weight.resize(n);
        total = kept;
    }
    const Philox4 r = philox(stream_key(o.seed, RngStream::sample), uint32_t(position), uint32_t(position >> 32), 0, 0);
    double left = double(uniform_open0(r.v[0])) * total;
    for (size_t i = 0; i < weight.size(); i++)
        if ((left -= weight[i]) <= 0) return order[i];
    return order[weight.size() - 1];  // rounding
}

std::vector<int32_t> generate(Session& model, std::vector<int32_t> tokens, const SampleOptions& o,
                              const std::function<void(int32_t)>& on_token) {
    const size_t n_prompt = tokens.size(), context = size_t(model.shape().T);
    CHECK_THAT(n_prompt > 0, "generate() needs at least one token to start from");
    for (int i = 0; i < o.max_tokens; i++) {
        const std::span<const int32_t> all(tokens);
        const std::vector<float> logits = model.next_logits(all.last(std::min(context, all.size())));
        tokens.push_back(sample_token(logits, o, tokens.size()));
        on_token(tokens.back());
        if (tokens.back() == o.stop_token) break;
    }
    return {tokens.begin() + ptrdiff_t(n_prompt), tokens.end()};
}
