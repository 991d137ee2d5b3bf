#include "run/inputs.h"

#include <algorithm>

namespace {
uint64_t eval_sequences(const Config& c, const TokenStream& val) {
    const uint64_t wanted = uint64_t(c.eval.tokens) / uint64_t(c.model.context_length);
    return c.eval.tokens == 0 ? val.n_sequences() : std::clamp<uint64_t>(wanted, 1, val.n_sequences());
}
}  // namespace

TokenStream open_data(const Context& x, const char* key, const std::vector<std::string>& patterns) {
    return TokenStream(key, patterns, x.config.data.format, x.config.model.context_length, x.config.model.vocab_size,
                       x.log);
}

Tokenizer open_tokenizer(const Config& c) {
    if (c.data.tokenizer.empty()) fail(Exit::usage, "data.tokenizer is not set; generate and samples need it");
    const Tokenizer tokenizer = [&] {
        try {
            return Tokenizer::load(c.data.tokenizer);
        } catch (const Error& e) { fail(e.code, "data.tokenizer: {}", e.what()); }
    }();
    if (tokenizer.vocab_size() > c.model.vocab_size)
        fail(Exit::data, "{}: {} tokens, but model.vocab_size = {}", c.data.tokenizer, tokenizer.vocab_size(),
             c.model.vocab_size);
    return tokenizer;
}

std::vector<int32_t> prompt_tokens(const Tokenizer& tokenizer, const std::string& prompt) {
    std::vector<int32_t> tokens = tokenizer.encode(prompt);
    if (tokens.empty() && tokenizer.end_of_text() < 0)
        fail(Exit::usage, "an empty prompt, and the tokenizer has no end-of-text to start from");
    if (tokens.empty()) tokens.push_back(tokenizer.end_of_text());
    return tokens;
}

EvalResult evaluate_on(const Context& x, Session& model, const TokenStream& val) {
    return evaluate(model, x.device.world.host(), eval_sequences(x.config, val),
                    [&](uint64_t i, std::span<int32_t> in, std::span<int32_t> out) { val.read(i, in, out); });
}
