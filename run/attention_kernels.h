// Chooses a GPU's attention kernels by device.attention.  The caller says which kernels the devices can run.
#pragma once
#include <string>

#include "common/config.h"
#include "kernels/ops.h"

struct SelectedAttention {
    AttentionKernel kernel = AttentionKernel::portable;
    std::string note;  // the part of the run that other kernels compute; empty: none
};

// The kernels' name, as in device.attention: "sm90".
const char* attention_name(AttentionKernel kernel);
// The kernels that device.attention asks for: the named ones, or for `auto` the fastest (sm90).  With
// KILN_CUDNN_FASTEST=1, which a benchmark sets, `cudnn` means cuDNN's fastest kernels, whose bits may differ from run
// to run.
AttentionKernel preferred_attention(const Config& config);
// `refusal`: why some rank's device cannot run preferred_attention(); empty: all can.  Where a device, the dtype or the
// head size rules them out, `auto` takes `portable`, and kernels asked for by name are Error(Exit::usage).
// Dropout rules out none: in `training` the portable kernels compute attention with dropout, and `note` says so.
SelectedAttention select_attention(const Config& config, const std::string& refusal, bool training);
