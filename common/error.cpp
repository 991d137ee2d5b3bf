#include "common/error.h"

#include <cstring>

void fail_check(const char* condition, const std::string& message, std::source_location at) {
    throw Error(Exit::internal, fmt::format("{}:{}: {}  [{}]", at.file_name(), at.line(), message, condition));
}

std::string errno_text(int error_number) { return std::strerror(error_number); }
