// The tensors of a run that a checkpoint stores, or the slices of them that a rank has.
#pragma once
#include <string>
#include <vector>

#include "model/architecture.h"

// A box of a tensor: along each axis the elements [offset, offset + extent).
struct Slice {
    std::vector<size_t> offset, extent;
    bool operator==(const Slice&) const = default;
};

struct StateTensor {
    std::string name;
    std::vector<size_t> global_shape;  // as saved: V rows of an embedding, not Vp
    Slice slice;                       // of it; today always the whole
    Buf data;                          // (product of slice.extent) f32, in backend or host memory
    bool on_host = false;              // in host memory; else in the backend's

    // All of a tensor.
    static StateTensor whole(std::string name, std::vector<size_t> shape, Buf data);
    bool is_whole() const;
    size_t count() const;  // elements of the slice
};

// `tensor` has a number for every element of the parameter: the parameter itself (prefix ""), a moment ("m.").
StateTensor state_tensor(const std::string& prefix, const ParamInfo& info, const Buf& tensor);
