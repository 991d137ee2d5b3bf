// The emulated NCCL as tests see it.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace emulator {
struct NcclCall {
    std::string name;  // "ncclAllReduce"
    size_t count;      // the call's count argument, in elements
    std::string type;  // "float32"; "" where the call has no type
    bool operator==(const NcclCall&) const = default;
};
// All calls of this process that move data, make or end a communicator; a test may clear the list.
std::vector<NcclCall>& nccl_calls();
}  // namespace emulator
