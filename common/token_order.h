// The order in which the embedding's backward meets the rows of a batch.
#pragma once
#include <cstddef>
#include <cstdint>

// order (n) =  the rows of tokens (n) sorted by token, equal tokens in row order.  Tokens outside [0, V) are an
// Error(Exit::data).
void sort_rows_by_token(const int32_t* tokens, int32_t* order, size_t n, int V);
