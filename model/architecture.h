// A model architecture: a constant table, as Backend is one for devices.
//
// An architecture has two lists, of its parameters and of its activations.  Weights, gradients and moments hold a
// number per parameter: each is a Tensors, a Buf for each line of the list, in the list's order.  Memory plans,
// optimizers and checkpoints work with lists and know no architecture.
#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "common/config_words.h"
#include "kernels/ops.h"
#include "model/init.h"

struct Architecture;

// The sizes of a model.
struct ModelConfig {
    const Architecture* architecture = nullptr;
    int L = 0, NH = 0, C = 0, T = 0, V = 0;  // layers, heads, width, context length, vocabulary
    bool bias = true;                        // false: no biases in Linear and LayerNorm
    float dropout = 0;
    int Vp() const { return (V + 127) / 128 * 128; }
    int HS() const { return C / NH; }
    bool operator==(const ModelConfig&) const = default;
};

// The axis that tensor parallelism (not built yet) divides; it stands here so that the list stays the only one.
enum class Split : uint8_t { none, rows, columns };

struct ParamInfo {
    std::string name;           // Hugging Face's
    std::vector<size_t> shape;  // in memory
    size_t n_rows_saved;        // rows on disk: V of Vp for an embedding, else shape[0]
    Init init;
    bool decay;  // AdamW decays tensors of two dimensions
    Split split;
    int block = -1;  // that it belongs to; -1: outside of blocks
    size_t count() const;
    size_t count_saved() const { return count() / shape[0] * n_rows_saved; }
    std::vector<size_t> shape_saved() const;
};

struct ActivationInfo {
    std::string name;
    size_t count;  // elements
    DType dtype;
};

// One Buf per line of an architecture's list of parameters or activations.  A pass through some of the blocks needs
// only the tensors of these: the others may be null.
using Tensors = std::vector<Buf>;

// The list and the sizes of the activations follow from these.
struct ActivationShape {
    int B = 0, T = 0;  // T may be shorter than the context length
    DType real = DType::f32;
    Recompute recompute = Recompute::none;
    bool backward = false;  // false: those that only a backward pass needs, which end the list, are left out
};

// One micro-batch and where its dropout masks come from.
struct Batch {
    Buf inputs;   // (B, T) i32
    Buf targets;  // (B, T) i32, or absent
    Buf order;    // (B*T)  i32: see EmbeddingGrad
    int B = 0, T = 0;
    Buf where;  // (2)    u32: step and place of sequence 0, for dropout
    uint64_t seed = 0;
};

// A pass of one micro-batch through the blocks [first_layer, last_layer), by default all.  The embedding belongs to the
// first block; the final norm, the classifier and the loss belong to the last.
//
//   forward    Ends with logits, loss and correct; without targets with the logits.  With grad_scale != 0 the logits
//              become their gradient.
//   backward   After a forward pass with `train` and grad_scale, and no other forward pass since: gradients of the sum
//              of losses times grad_scale.  Every parameter's gradient is written: =, or += when accumulate.
//
// Passes that together go through all blocks, in order (the backward ones in reverse order), give the bits of one pass.
// They may have memory of their own, which is what a pipeline needs.  These cross a cut below block l:
//
//   forward    the output of block l-1, an activation
//   backward   the gradient of that output, an activation
//   gradients  A pass writes the gradients of its own blocks' parameters, with two exceptions:
//              - The LayerNorm at the start of block l can take along the gradient of the bias before.  The pass that
//                begins with block l then writes that gradient, and the pass that ends with block l-1 does not: the
//                bias has a Buf in the gradients of the former.  Its sum over micro-batches is handed down once.
//              - A parameter that the embedding and the classifier share is written by the last pass, =, and then added
//                to by the first.  With memory of their own, the first one's begins as zero, and the two are summed.
struct Pass {
    const Backend& k;
    const ModelConfig& config;
    const Tensors& params;
    const Tensors& acts;             // as listed for this B, T and recompute
    const Tensors* grads = nullptr;  // backward only; stat
    Batch batch;
    Recompute recompute = Recompute::none;
    bool train = false;       // the config's dropout is on
    float grad_scale = 0;     // forward only
    bool accumulate = false;  // backward only
    int first_layer = 0;
    int last_layer = -1;  // -1: config.L
    Stream stream = nullptr;
    int end() const { return last_layer < 0 ? config.L : last_layer; }
    bool is_first() const { return first_layer == 0; }
    bool is_last() const { return end() == config.L; }
    // The same pass over another backend.
    Pass on(const Backend& other) const {
        return {other, config,     params,     acts,        grads,      batch, recompute,
                train, grad_scale, accumulate, first_layer, last_layer, stream};
    }
};

// How Hugging Face's library stores a model.
struct HuggingFace {
    const char* prefix;  // of every name where a file has the model with its classifier: "transformer."
    const char* head;    // name of the classifier's weights, which a file may repeat; null: the classifier is not tied
    const char* tied;    // name of the parameter that the classifier's weights equal; null likewise
    // A tensor beside the parameters that means nothing to kiln.
    bool (*is_buffer)(std::string_view name);
    // The config whose list model.safetensors has.  A parameter that the model has not is written as zeros.
    ModelConfig (*stored)(const ModelConfig&);
    nlohmann::ordered_json (*write_config)(const ModelConfig&);
    // Throws Error(Exit::checkpoint) naming `file` where the architecture computes something else, and
    // nlohmann::json::exception where a key is missing or of another type.
    ModelConfig (*read_config)(const nlohmann::json&, const std::string& file);
};

struct Architecture {
    const char* name;   // in model.architecture
    const char* title;  // in messages
    // Sizes that cannot be run, named before any memory is taken: Error(Exit::usage).
    void (*check)(const ModelConfig&, DType real);
    std::vector<ParamInfo> (*params)(const ModelConfig&);  // in the order of the forward pass
    // Among them, by these names: logits (BT, Vp), loss (BT) stat, correct (BT) i32.
    std::vector<ActivationInfo> (*activations)(const ModelConfig&, const ActivationShape&);
    void (*forward)(const Pass&);
    void (*backward)(const Pass&);
    double (*flops_per_token)(const ModelConfig&);  // of one training step
    HuggingFace hugging_face;
};

// The architecture of that name; Error(Exit::usage) where there is none.  All names: common/architecture_names.h.
const Architecture& find_architecture(const std::string& name);
// The index of an activation in its list.
size_t activation_index(const std::vector<ActivationInfo>& list, std::string_view name);

// Parameters without the rows that only pad the vocabulary.
size_t count_params(const ModelConfig& c);

// Random parameters; rows that only pad the vocabulary become zero.
void init_params(const ModelConfig& c, const Backend& k, const Tensors& params, uint64_t seed, Stream s);
