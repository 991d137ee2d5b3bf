#include "common/error.h"

#include <cstring>

void fail_check(const char* condition, const std::string& message, const char* file, int line) {
    throw Error(Exit::internal, fmt::format("{}:{}: {}  [{}]", file, line, message, condition));
}

std::string errno_text(int error_number) { return std::strerror(error_number); }
