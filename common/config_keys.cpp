#include "common/config_keys.h"

#include <fmt/format.h>

#include "common/architecture_names.h"
#include "common/text.h"

namespace {
#define KEY(path) .name = #path, .member = [](Config& c) -> Member { return &c.path; }

constexpr double kMaxSteps = 1e9,
                 kMaxSeed = 9007199254740991.0;  // 2^53 - 1: JSON holds it, and the top byte stays free
constexpr Key::Range from(double low, double high) { return {low, high, false}; }
constexpr Key::Range above(double low, double high) { return {low, high, true}; }

// Every key of the public interface, in the order of config.yaml.  Defaults are in config.h, words in config_words.h.
// `make readme` writes the table of README.md from this one.
std::vector<Key> table() {
    return {
        // clang-format off
        {KEY(run.name), .required = true, .form = Form::component,
         .meaning = "directory name of the run"},
        {KEY(run.out_dir), .may_change = true,
         .meaning = "where run directories are made"},
        {KEY(run.seed), .range = from(0, kMaxSeed),
         .meaning = "of initialisation, data order, dropout and samples"},
        {KEY(run.max_minutes), .may_change = true, .range = from(0, 1e9),
         .meaning = "save and stop with exit 85 after so many minutes; 0: no limit"},
        {KEY(run.timeout_seconds), .may_change = true, .range = above(0, 1e9),
         .meaning = "a rank that another one has waited for so long is lost: exit 75"},
        {KEY(run.on_bad_step), .later = {"rewind"},
         .meaning = "where a loss or gradient is not finite: `skip` the update, or `stop` with exit 6"},
        {"run.spike_factor"},
        {"run.replica_check_interval"},
        {KEY(device.kind), .may_change = true,
         .meaning = "auto: a GPU where every rank finds one, else the CPU"},
        {KEY(device.dtype), .may_change = true,
         .meaning = "of activations and matrix products; `bf16` on a GPU only. Masters, moments and gradients stay "
                    "fp32"},
        {KEY(device.threads), .may_change = true, .range = from(1, 4096), .zero_word = "auto",
         .meaning = "threads of each rank; auto: its share of the host's cores"},
        {KEY(device.attention), .may_change = true,
         .meaning = "attention kernels on a GPU. `sm90` (compute capability 9.0) and `cudnn` need bf16 and heads of 64 "
                    "or 128 elements, and leave dropout to `portable`; asked for where they cannot run, they are an "
                    "error. auto: `sm90` where it can run on every rank, else `portable`. The `run` record and the log "
                    "say which"},
        {KEY(device.graph), .may_change = true,
         .meaning = "record a GPU's step once as a CUDA graph and then replay it, with the same bits. auto: where that "
                    "can be done; `on`: an error where it cannot; `off`: never"},
        {KEY(device.tuning), .may_change = true,
         .meaning = "choose the algorithm of each matrix product on a GPU by timing, before the first step; a later run "
                    "takes the choices from a cache, a resumed one from its checkpoint. `off`: the library's first "
                    "guess; nothing is timed"},
        {KEY(model.architecture), .values = architecture_names(),
         .meaning = "the kind of model"},
        {KEY(model.n_layer), .required = true, .range = from(1, 1024),
         .meaning = "transformer blocks"},
        {KEY(model.n_head), .required = true, .range = from(1, 4096),
         .meaning = "attention heads; divides n_embd"},
        {KEY(model.n_embd), .required = true, .range = from(1, 1 << 20),
         .meaning = "width"},
        {KEY(model.context_length), .required = true, .range = from(1, 1 << 20),
         .meaning = "tokens of a sequence"},
        {KEY(model.vocab_size), .required = true, .range = from(1, 1 << 24),
         .meaning = "tokens; padded to a multiple of 128 in memory"},
        {KEY(model.dropout), .range = from(0, 0.99),
         .meaning = "probability of embedding, attention and residual dropout"},
        {KEY(model.bias),
         .meaning = "biases in Linear and LayerNorm"},
        {KEY(model.init_from),
         .meaning = "start from the weights in this directory (a kiln checkpoint, or Hugging Face GPT-2)"},
        {KEY(data.train), .required = true,
         .meaning = "shards to train on"},
        {KEY(data.val),
         .meaning = "shards to evaluate on"},
        {KEY(data.shuffle),
         .meaning = "a new order of sequences every epoch; false: as they lie"},
        {KEY(data.tokenizer), .may_change = true,
         .meaning = "tokenizer.json, for `generate` and samples; opened at every start"},
        {KEY(data.format),
         .meaning = "auto: shards with llm.c's headers; `nanogpt`: headerless uint16"},
        {KEY(train.max_steps), .may_change = true, .range = from(1, kMaxSteps), .one_of_two = true,
         .meaning = "length of the run in optimizer steps"},
        {KEY(train.max_epochs), .may_change = true, .range = above(0, kMaxSteps), .one_of_two = true,
         .meaning = "length of the run in passes over data.train"},
        {KEY(train.global_batch_size), .required = true, .range = from(1, 1 << 24),
         .meaning = "sequences of an optimizer step, over all ranks"},
        {KEY(train.micro_batch_size), .required = true, .may_change = true, .range = from(1, 1 << 24),
         .meaning = "sequences of a forward pass on one rank"},
        {KEY(train.grad_clip), .range = from(0, 1e9),
         .meaning = "largest global gradient norm; 0: off"},
        {KEY(train.recompute), .may_change = true,
         .meaning = "what the backward pass computes again instead of keeping it, to save memory: `gelu` (the GELU's "
                    "output, a quarter of the activations), `block` (all of a block but its output; the bits of "
                    "`none`). With `gelu` in bf16, GELU sees its input as it is stored"},
        {KEY(optimizer.name),
         .meaning = "the update rule; kernels/ops.h has the formulas"},
        {KEY(optimizer.learning_rate), .required = true, .range = above(0, 1000),
         .meaning = "the highest rate of the schedule"},
        {KEY(optimizer.beta1), .range = from(0, 0.999999),
         .meaning = "adamw, adam: decay of the first moment, per step; lion: weight of the moment in a step, beside "
                    "1 - beta1 of the gradient"},
        {KEY(optimizer.beta2), .range = from(0, 0.999999),
         .meaning = "adamw, adam: decay of the second moment, per step; lion: decay of its only moment (its paper uses "
                    "0.9 and 0.99)"},
        {KEY(optimizer.eps), .range = from(1.2e-38, 1),
         .meaning = "adamw, adam: added to the root of the second moment"},
        {KEY(optimizer.weight_decay), .range = from(0, 1000),
         .meaning = "on tensors of two dimensions. adamw and lion shrink them by learning_rate * weight_decay of their "
                    "size a step; adam and sgd add weight_decay times the tensor to its gradient"},
        {KEY(optimizer.momentum), .range = from(0, 0.999999),
         .meaning = "sgd: decay of the moment, per step"},
        {KEY(schedule.name),
         .meaning = "how the learning rate falls after the warm-up"},
        {KEY(schedule.warmup_steps), .range = from(0, kMaxSteps),
         .meaning = "steps of linear warm-up"},
        {KEY(schedule.decay_steps), .range = from(1, kMaxSteps), .zero_word = "all",
         .meaning = "cosine, linear: the step that reaches the minimum; wsd: length of the fall (all: a fifth of the "
                    "run)"},
        {KEY(schedule.min_learning_rate), .range = from(0, 1000),
         .meaning = "the lowest rate of cosine, linear and wsd"},
        {KEY(eval.interval), .may_change = true, .range = from(0, kMaxSteps),
         .meaning = "evaluate every so many steps and at the end; 0: never"},
        {KEY(eval.tokens), .range = from(1, 1e15), .zero_word = "all",
         .meaning = "how many tokens of data.val an evaluation reads"},
        {KEY(eval.sample_prompts), .form = Form::any,
         .meaning = "texts that the model continues at every evaluation"},
        {KEY(checkpoint.interval), .may_change = true, .range = from(0, kMaxSteps),
         .meaning = "save every so many steps and at the end; 0: never"},
        {KEY(checkpoint.keep), .may_change = true, .range = from(1, 1e6),
         .meaning = "newest checkpoints kept"},
        {"checkpoint.async"},
        {"checkpoint.on_error"},
        {KEY(log.interval), .may_change = true, .range = from(1, kMaxSteps),
         .meaning = "a step record every so many steps"},
        {KEY(parallel.method), .may_change = true,
         .meaning = "how ranks train one model together. `allreduce`: every rank gets the sum of all gradients in every "
                    "step. `parameter_server`: the last `parallel.servers` ranks own parameters and optimizer state, the "
                    "others send gradients to them. `diloco`: every rank trains a replica on its share of each batch, and "
                    "all exchange their parameters every sync_interval steps"},
        {KEY(parallel.servers), .may_change = true, .range = from(1, 4096),
         .meaning = "parameter_server: ranks that serve, the last ones; the others train"},
        {KEY(parallel.staleness), .may_change = true, .range = from(0, kMaxSteps),
         .meaning = "parameter_server: 0: synchronous, the bits of `allreduce: ordered`. s > 0: asynchronous; a share of "
                    "step t is begun when all gradients up to step t - s - 1 are applied, and each is applied when it "
                    "comes. A lost worker then leaves the others training"},
        {KEY(parallel.allreduce), .may_change = true,
         .meaning = "how ranks sum gradients. auto: `nccl` where every rank has a GPU of its own, else `ordered` where "
                    "the rank count allows it, else `mpi`. With 2^k * odd micro-batches a step, `ordered` keeps up to "
                    "k+1 gradient buffers"},
        {KEY(parallel.overlap), .may_change = true,
         .meaning = "sum the gradients of later blocks while the backward pass goes on, in buckets of whole blocks: by a "
                    "thread on CPUs, in a second stream where each rank has a GPU of its own. Results have the same bits; "
                    "with `ring`, `mpi` and `nccl` only on two ranks"},
        {KEY(parallel.reduce_dtype), .may_change = true,
         .meaning = "of gradients on the wire, with `ordered` and `ring` through the hosts. bf16: half the bytes; sums "
                    "stay fp32"},
        {KEY(parallel.zero), .may_change = true, .range = from(0, 3),
         .meaning = "ZeRO: each rank owns a shard of the optimizer state (1), also of the gradient (2), also of the "
                    "parameters, which are gathered block by block (3). With 1 `ordered` keeps the bits of one rank; "
                    "with 2 and 3 where each rank has one micro-batch a step"},
        {KEY(parallel.tensor), .may_change = true, .range = from(1, 4096),
         .meaning = "ranks that share each layer; this build has 1 only. Ranks = data x tensor x pipeline"},
        {KEY(parallel.pipeline), .may_change = true, .range = from(1, 4096),
         .meaning = "ranks that share the layers, as stages of a pipeline; this build has 1 only"},
        {"parallel.schedule"},
        {KEY(parallel.sync_interval), .may_change = true, .range = from(1, kMaxSteps),
         .meaning = "diloco: steps from one exchange to the next; with outer_learning_rate 1 and outer_momentum 0 it "
                    "averages parameters (local SGD)"},
        {KEY(parallel.outer_learning_rate), .may_change = true, .range = above(0, 10),
         .meaning = "diloco: of the outer optimizer, SGD with Nesterov momentum"},
        {KEY(parallel.outer_momentum), .may_change = true, .range = from(0, 0.999999),
         .meaning = "diloco: of the outer optimizer"},
        {KEY(parallel.outer_dtype), .may_change = true,
         .meaning = "diloco: how parameters travel. `bf16` and `int4`: as differences to the last exchange, with error "
                    "feedback; int4 takes an eighth of fp32's bytes"},
        {KEY(parallel.streaming), .may_change = true,
         .meaning = "diloco: exchange up to 8 fragments of the parameters in turn, each while a step computes"},
        // clang-format on
    };
}

// As README.md shows it.
std::string default_of(const Key& key) {
    if (key.required) return "required";
    if (key.one_of_two) return "one of the two";
    Config c;
    const Member member = key.member(c);
    if (const auto* text = std::get_if<std::string*>(&member)) return **text;
    const std::string value = value_of(c, key.name);
    return value == "[]" ? "" : value;
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
    const auto [low, high, exclusive_low] = key.range;
    const std::string range = fmt::format("{} {} {} {} {}", whole ? "an integer" : "a number",
                                          exclusive_low ? "above" : "from", low, exclusive_low ? "and at most" : "to",
                                          whole ? fmt::format("{}", uint64_t(high)) : fmt::format("{}", high));
    return *key.zero_word ? range + ", or " + key.zero_word : range;
}

std::string config_table() {
    std::string table =
        "| key | default | allowed | meaning | may change on resume |\n"
        "|---|---|---|---|---|";
    for (const Key& key : config_keys())
        if (key.member)
            table += fmt::format("\n| {} | {} | {} | {} | {} |", key.name, default_of(key), allowed_values(key),
                                 key.meaning, key.may_change ? "yes" : "");
    return table;
}
