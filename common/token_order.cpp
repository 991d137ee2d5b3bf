#include "common/token_order.h"

#include <vector>

#include "common/error.h"

void sort_rows_by_token(const int32_t* tokens, int32_t* order, size_t n, int V) {
    std::vector<int32_t> place(size_t(V) + 1);  // (V + 1) where the next row of a token goes: counting sort, stable
    for (size_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || tokens[i] >= V)
            fail(Exit::data, "token {} at position {} of the batch is not in [0, {})", tokens[i], i, V);
        place[size_t(tokens[i]) + 1]++;
    }
    for (size_t v = 0; v < size_t(V); v++) place[v + 1] += place[v];
    for (size_t i = 0; i < n; i++) order[place[size_t(tokens[i])]++] = int32_t(i);
}
