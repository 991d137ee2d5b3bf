// The words of the config file as enums: parsing, config.yaml, messages and the code that obeys a word share one list.
// A new word does not compile until every switch over its enum handles it (-Wswitch; these switches have no default).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

// WORDS(Sort, up, down) is enum class Sort : uint8_t { up, down }, and the names of its values are their words:
//     word_of(Sort::down)    "down"
//     words_of<Sort>()       {"up", "down"}
//     values_of<Sort>()      {Sort::up, Sort::down}
// The value `automatic` is the word "auto", which C++ keeps for itself.
#define WORDS(Enum, ...)                       \
    enum class Enum : uint8_t { __VA_ARGS__ }; \
    constexpr const char* names_of(Enum) { return #__VA_ARGS__; }

WORDS(OnBadStep, skip, stop)             // run.on_bad_step
WORDS(DeviceKind, automatic, cpu, cuda)  // device.kind
WORDS(Precision, fp32, bf16)             // device.dtype
WORDS(ShardFormat, automatic, nanogpt)   // data.format

// device.attention: the kernels that are asked for; AttentionKernel (kernels/ops.h) has those that a run gets.
WORDS(UseAttention, automatic, portable, sm90, cudnn)

// device.graph
WORDS(UseGraph,
      automatic,  // where the backend can record, unless a step has so many launches that recording does not pay
      on,         // Error(Exit::usage) where the backend cannot record
      off)

// device.tuning
WORDS(UseTuning,
      on,  // time the algorithms of each matrix product on a GPU and keep the fastest
      off  // take the library's first guess
)

// train.recompute: values that the backward pass computes again, instead of keeping them from the forward pass.
WORDS(Recompute,
      none,  // nothing
      gelu,  // the GELU's output.  In bf16 GELU then sees its input as stored, never the sum before rounding
      block  // all of a block but its output: one more forward pass, but for the last block.  The bits of none
)

WORDS(OptimizerKind, adamw, adam, sgd, lion)        // optimizer.name: OptimizerUpdate (kernels/ops.h) has the formulas
WORDS(ScheduleKind, constant, cosine, linear, wsd)  // schedule.name: trainer/schedule.h has the formulas

// parallel.method: how ranks train one model together.
WORDS(ParallelMethod,
      allreduce,         // every rank has the sum of all gradients in every step
      parameter_server,  // the last ranks own parameters and optimizer, and the others send gradients to them
      diloco             // ranks train replicas, and exchange parameters every so many steps (trainer/local_sgd.h)
)

WORDS(OuterDtype, fp32, bf16, int4)  // parallel.outer_dtype: comm/quantized.h has the formats

// parallel.allreduce: the algorithm that is asked for; AllReduce (comm/all_reduce.h) has the one that a run gets.
WORDS(UseAllReduce, automatic, ordered, nccl, mpi, ring)

#undef WORDS

// The words in a text of names: "automatic, on" gives {"auto", "on"}.
std::vector<std::string> split_words(const char* names);

template <class E>
const std::vector<std::string>& words_of() {
    static const std::vector<std::string> words = split_words(names_of(E()));
    return words;
}
template <class E>
const std::string& word_of(E value) {
    return words_of<E>()[size_t(value)];
}
template <class E>
std::vector<E> values_of() {
    std::vector<E> values;
    for (size_t i = 0; i < words_of<E>().size(); i++) values.push_back(E(i));
    return values;
}
