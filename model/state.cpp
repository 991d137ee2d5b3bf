#include "model/state.h"

#include <functional>
#include <numeric>
#include <utility>

StateTensor StateTensor::whole(std::string name, std::vector<size_t> shape, Buf data) {
    const std::vector<size_t> origin(shape.size());
    return {.name = std::move(name), .global_shape = shape, .slice = {origin, shape}, .data = data};
}

bool StateTensor::is_whole() const { return slice == Slice{std::vector<size_t>(global_shape.size()), global_shape}; }

size_t StateTensor::count() const {
    return std::accumulate(slice.extent.begin(), slice.extent.end(), size_t(1), std::multiplies<>());
}

StateTensor state_tensor(const std::string& prefix, const ParamInfo& info, const Buf& tensor) {
    return StateTensor::whole(prefix + info.name, info.shape_saved(), tensor.slice(0, info.count_saved()));
}
