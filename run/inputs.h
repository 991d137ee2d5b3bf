// The files that a command reads: token shards and the tokenizer.
#pragma once
#include <string>
#include <vector>

#include "data/loader.h"
#include "data/tokenizer.h"
#include "run/context.h"
#include "trainer/evaluate.h"

// Every host opens its own copy of the data; other files would mean other tokens, or another number of steps.
constexpr const char* kOtherData = "data files other than rank 0's; give every host the same shards";

// `key` names the config's key in errors.
TokenStream open_data(const Context& x, const char* key, const std::vector<std::string>& patterns);
// data.tokenizer, checked against model.vocab_size.
Tokenizer open_tokenizer(const Config& c);
// The tokens that a model continues: the prompt's, or end-of-text where the prompt is empty.
std::vector<int32_t> prompt_tokens(const Tokenizer& tokenizer, const std::string& prompt);
// Loss and accuracy on the first eval.tokens tokens of `val`.
EvalResult evaluate_on(const Context& x, Session& model, const TokenStream& val);
