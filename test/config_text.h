// Configs that several tests start from, and the message of a refusal.
#pragma once
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "common/config.h"
#include "common/error.h"

// Line numbers in the tests count from here.
inline const std::string kSmall = R"(run:
  name: tiny
model:
  n_layer: 2
  n_head: 4
  n_embd: 64
  context_length: 32
  vocab_size: 257
data:
  train: [a*.bin, b.bin]
train:
  max_steps: 100
  global_batch_size: 32
  micro_batch_size: 8
optimizer:
  learning_rate: 0.0003
)";

// Keys with other values than in kSmall, in the forms of YAML that a user may choose.
inline const std::string kLarge = R"(# comment
run: {name: "a \"b\" \\ é: #1", out_dir: /tmp/x y, seed: 9007199254740991, max_minutes: 0.1, on_bad_step: stop}
device: {kind: cpu, dtype: fp32, threads: 3, attention: portable, graph: off}
model:
  architecture: gpt2
  n_layer: 3
  n_head: 5
  n_embd: 35
  context_length: 33
  vocab_size: 50257
  dropout: 0.1
  bias: false
  init_from: "weights/gpt2 # 1"
data:
  train:
    - "*.bin"
    - b, c.bin
  val: ['it''s.bin']
  shuffle: false
  tokenizer: t.json
  format: nanogpt
train: {max_epochs: 2.5, global_batch_size: 12, micro_batch_size: 6, grad_clip: 0, recompute: block}
optimizer:
  {name: sgd, learning_rate: 0.00030000000000000003, beta1: 0, beta2: 0.999, eps: 1e-9, weight_decay: 0, momentum: 0.9}
schedule: {name: wsd, warmup_steps: 10, decay_steps: 50, min_learning_rate: 1e-300}
eval:
  interval: 7
  tokens: 1000
  sample_prompts: ["def f(x):\n\treturn", '', "\0\x7f", "true", "- 'a'"]
checkpoint: {interval: 9, keep: 1}
log: {interval: 2}
parallel: {allreduce: ordered}
)";

template <class F>
std::string refusal_of(const F& f) {
    try {
        f();
    } catch (const Error& e) {
        CHECK(e.code == Exit::usage);
        return e.what();
    }
    return "";
}
// The message with which a config is refused; "" when it is accepted.
inline std::string refusal(const std::string& yaml, const std::vector<std::string>& overrides = {}) {
    return refusal_of([&] { parse_config(yaml, "f.yaml", overrides); });
}
// kSmall with one piece of its text replaced, or with more lines from line 17 on.
inline std::string replaced(const std::string& from, const std::string& to) {
    std::string s = kSmall;
    const size_t at = s.find(from);
    REQUIRE(at != s.npos);
    return s.replace(at, from.size(), to);
}
inline std::string with(const std::string& lines) { return kSmall + lines + "\n"; }
