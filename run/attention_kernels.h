// Which kernels compute attention on a GPU, by device.attention.  What the devices can run is an argument.
#pragma once
#include <string>

#include "common/config.h"
#include "kernels/ops.h"

struct AttentionChoice {
    AttentionKernel kernel = AttentionKernel::portable;
    std::string note;  // what of the run these kernels do not compute; empty: nothing
};

// As in device.attention: "sm90".
const char* attention_name(AttentionKernel kernel);
// The kernels that device.attention would have: those it names, and for `auto` the fastest, sm90.  Under
// KILN_CUDNN_FASTEST=1 `cudnn` means the library's fastest, which may give other bits from run to run: a
// benchmark asks for it.
AttentionKernel preferred_attention(const Config& config);
// `refusal`: why some rank's device cannot run preferred_attention(); empty: all can.  `auto` then takes `portable`, as
// it does where dtype or head size do not fit; for kernels asked for by name both are Error(Exit::usage).
// Dropout is no obstacle: in `training` it is left to the portable kernels, and the note says so.
AttentionChoice choose_attention(const Config& config, const std::string& refusal, bool training);
