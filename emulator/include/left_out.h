// For mutate.py: whether the statement with this number is left out in this run.
#pragma once
#include <cstdlib>

namespace emulator {
inline bool left_out(int statement) {
    static const char* chosen = std::getenv("KILN_LEAVE_OUT");
    static const int number = chosen ? std::atoi(chosen) : 0;
    return statement == number;
}
}  // namespace emulator
