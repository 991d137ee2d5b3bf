#include "run/attention_kernels.h"

#include <cstdlib>
#include <string_view>

#include "common/error.h"

namespace {
constexpr Precision kPrecision = Precision::bf16;  // needed, with kFastHeadSizes, by all kernels but portable

// Why sm90 and cudnn cannot compute this config, with the values that they expect; empty: they can.
std::string misfit(const Config& c) {
    if (c.device.dtype != kPrecision)
        return fmt::format("device.dtype = {}, expected {}; set device.dtype: {}", word_of(c.device.dtype),
                           word_of(kPrecision), word_of(kPrecision));
    const int head_size = c.model.n_embd / c.model.n_head;
    if (is_fast_head(head_size)) return "";
    return fmt::format("model.n_embd / model.n_head = {} / {} = {}, expected {}; change these", c.model.n_embd,
                       c.model.n_head, head_size, fmt::join(kFastHeadSizes, " or "));
}
}  // namespace

const char* attention_name(AttentionKernel kernel) {
    switch (kernel) {
        case AttentionKernel::portable:
            return "portable";
        case AttentionKernel::sm90:
            return "sm90";
        case AttentionKernel::cudnn:
            return "cudnn";
        case AttentionKernel::cudnn_fastest:
            return "cudnn_fastest";
    }
    return "";
}

AttentionKernel preferred_attention(const Config& config) {
    switch (config.device.attention) {
        case UseAttention::portable:
            return AttentionKernel::portable;
        case UseAttention::automatic:
        case UseAttention::sm90:
            return AttentionKernel::sm90;
        case UseAttention::cudnn:
            break;
    }
    const char* fastest = std::getenv("KILN_CUDNN_FASTEST");
    return fastest && std::string_view(fastest) == "1" ? AttentionKernel::cudnn_fastest : AttentionKernel::cudnn;
}

SelectedAttention select_attention(const Config& config, const std::string& refusal, bool training) {
    const AttentionKernel preferred = preferred_attention(config);
    if (preferred == AttentionKernel::portable) return {};
    const char* name = attention_name(preferred);
    const std::string unfit = misfit(config);
    const bool asked_for = config.device.attention != UseAttention::automatic;
    if (asked_for && !refusal.empty())
        fail(Exit::usage, "device.attention: {} cannot be used: {}; use device.attention: auto", name, refusal);
    if (asked_for && !unfit.empty())
        fail(Exit::usage, "device.attention: {} cannot be used: {}, or use device.attention: auto", name, unfit);
    if (!refusal.empty() || !unfit.empty()) return {};
    SelectedAttention selected{.kernel = preferred};
    if (training && config.model.dropout > 0)
        selected.note = fmt::format(
            "attention with dropout uses the portable kernels: with model.dropout = {} training does, and evaluation, "
            "without dropout, uses {}",
            config.model.dropout, name);
    return selected;
}
