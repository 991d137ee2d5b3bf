// What tests see of the emulated NCCL.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace emulator {
struct NcclCall {
    std::string name;  // "ncclAllReduce"
    size_t count;      // elements, as the call names them
    std::string type;  // "float32", "" where the call has none
    bool operator==(const NcclCall&) const = default;
};
// All calls of this process that move data, make or end a communicator; a test may clear it.
std::vector<NcclCall>& nccl_calls();
}  // namespace emulator
