// A tensor of the training state that a checkpoint keeps.
#pragma once
#include <string>
#include <vector>

#include "model/architecture.h"

struct StateTensor {
    std::string name;
    std::vector<size_t> shape;  // as saved: V rows of wte, not Vp
    Buf data;                   // (product of shape)  in backend memory
};

// `tensor` holds a number for every element of the parameter: the parameter itself (prefix ""), a moment ("m.").
inline StateTensor state_tensor(const std::string& prefix, const ParamInfo& info, const Buf& tensor) {
    return {prefix + info.name, info.shape_saved(), tensor.slice(0, info.count_saved())};
}
