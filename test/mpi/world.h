// The ranks that the tests of this folder run on.
#pragma once
#include <cstddef>

#include "comm/comm.h"

Comm& world();
// Every rank holds the same bytes.
bool same_everywhere(const void* data, size_t n_bytes);
