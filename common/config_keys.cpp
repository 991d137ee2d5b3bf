#include "common/config_keys.h"

#include <fmt/format.h>

#include "common/architecture_names.h"
#include "common/text.h"

namespace {
#define KEY(path) .name = #path, .member = [](Config& c) -> Member { return &c.path; }

constexpr double kMaxSteps = 1e9,
                 kMaxSeed = 9007199254740991.0;  // 2^53 - 1: JSON holds it, and the top byte stays free

// One line for each key of the public interface, in the order of config.yaml; defaults are in config.h.
std::vector<Key> table() {
    return {
        {KEY(run.name), .required = true, .form = Form::component},
        {KEY(run.out_dir), .may_change = true},
        {KEY(run.seed), .low = 0, .high = kMaxSeed},
        {KEY(run.max_minutes), .may_change = true, .low = 0, .high = 1e9},
        {KEY(run.on_bad_step), .later = {"rewind"}},
        {"run.timeout_seconds"},
        {"run.spike_factor"},
        {"run.replica_check_interval"},
        {KEY(device.kind), .may_change = true},
        {KEY(device.dtype), .may_change = true},
        {KEY(device.threads), .may_change = true, .low = 1, .high = 4096, .zero_word = "auto"},
        {KEY(device.attention), .may_change = true},
        {KEY(device.graph), .may_change = true},
        {KEY(model.architecture), .values = architecture_names()},
        {KEY(model.n_layer), .required = true, .low = 1, .high = 1024},
        {KEY(model.n_head), .required = true, .low = 1, .high = 4096},
        {KEY(model.n_embd), .required = true, .low = 1, .high = 1 << 20},
        {KEY(model.context_length), .required = true, .low = 1, .high = 1 << 20},
        {KEY(model.vocab_size), .required = true, .low = 1, .high = 1 << 24},
        {KEY(model.dropout), .low = 0, .high = 0.99},
        {KEY(model.bias)},
        {KEY(model.init_from)},
        {KEY(data.train), .required = true},
        {KEY(data.val)},
        {KEY(data.shuffle)},
        {KEY(data.tokenizer), .may_change = true},
        {KEY(data.format)},
        {KEY(train.max_steps), .may_change = true, .low = 1, .high = kMaxSteps, .one_of_two = true},
        {KEY(train.max_epochs), .may_change = true, .low = 0, .high = kMaxSteps, .exclusive_low = true,
         .one_of_two = true},
        {KEY(train.global_batch_size), .required = true, .low = 1, .high = 1 << 24},
        {KEY(train.micro_batch_size), .required = true, .may_change = true, .low = 1, .high = 1 << 24},
        {KEY(train.grad_clip), .low = 0, .high = 1e9},
        {KEY(train.recompute), .may_change = true},
        {KEY(optimizer.name)},
        {KEY(optimizer.learning_rate), .required = true, .low = 0, .high = 1000, .exclusive_low = true},
        {KEY(optimizer.beta1), .low = 0, .high = 0.999999},
        {KEY(optimizer.beta2), .low = 0, .high = 0.999999},
        {KEY(optimizer.eps), .low = 1.2e-38, .high = 1},
        {KEY(optimizer.weight_decay), .low = 0, .high = 1000},
        {KEY(optimizer.momentum), .low = 0, .high = 0.999999},
        {KEY(schedule.name)},
        {KEY(schedule.warmup_steps), .low = 0, .high = kMaxSteps},
        {KEY(schedule.decay_steps), .low = 1, .high = kMaxSteps, .zero_word = "all"},
        {KEY(schedule.min_learning_rate), .low = 0, .high = 1000},
        {KEY(eval.interval), .may_change = true, .low = 0, .high = kMaxSteps},
        {KEY(eval.tokens), .low = 1, .high = 1e15, .zero_word = "all"},
        {KEY(eval.sample_prompts), .form = Form::any},
        {KEY(checkpoint.interval), .may_change = true, .low = 0, .high = kMaxSteps},
        {KEY(checkpoint.keep), .may_change = true, .low = 1, .high = 1e6},
        {"checkpoint.async"},
        {"checkpoint.on_error"},
        {KEY(log.interval), .may_change = true, .low = 1, .high = kMaxSteps},
        {KEY(parallel.allreduce), .may_change = true},
        {"parallel.tensor"},
        {"parallel.pipeline"},
        {"parallel.schedule"},
        {"parallel.zero"},
        {"parallel.overlap"},
        {"parallel.reduce_dtype"},
        {"parallel.method"},
        {"parallel.servers"},
        {"parallel.staleness"},
        {"parallel.sync_interval"},
        {"parallel.outer_learning_rate"},
        {"parallel.outer_momentum"},
    };
}
}  // namespace

const std::vector<Key>& config_keys() {
    static const std::vector<Key> keys = table();
    return keys;
}

std::vector<std::string> section_names() {
    std::vector<std::string> names;
    for (const Key& key : config_keys())
        if (names.empty() || names.back() != key.section()) names.push_back(key.section());
    return names;
}

std::vector<std::string> words_of(const Key& key) {
    Config any;
    const Member member = key.member(any);
    const WordMember* word = std::get_if<WordMember>(&member);
    return word ? *word->words : key.values;
}

std::string allowed_values(const Key& key) {
    if (const std::vector<std::string> words = words_of(key); !words.empty()) return joined(words, "or");
    Config any;
    const Member member = key.member(any);  // only its type
    if (std::holds_alternative<bool*>(member)) return "true or false";
    if (std::holds_alternative<std::vector<std::string>*>(member))
        return key.form == Form::any ? "a list of texts, as in [\"a\", \"b\"]"
                                     : "a list of file patterns, as in [\"a*.bin\", \"b.bin\"]";
    if (std::holds_alternative<std::string*>(member))
        return key.form == Form::component ? "one path component without /, not . or .." : "a path";
    const bool whole = !std::holds_alternative<double*>(member);
    const std::string low = key.exclusive_low ? fmt::format("above {} and", key.low) : fmt::format("from {}", key.low);
    const std::string range =
        fmt::format("{} {} {} {}", whole ? "an integer" : "a number", low, key.exclusive_low ? "at most" : "to",
                    whole ? fmt::format("{}", uint64_t(key.high)) : fmt::format("{}", key.high));
    return *key.zero_word ? range + ", or " + key.zero_word : range;
}
