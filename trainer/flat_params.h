// The places of parameters in flat buffers: masters, gradients and moments have each parameter at the same element.
#pragma once
#include <vector>

#include "model/architecture.h"

// Elements [first, first + count) of a flat buffer.
struct Range {
    size_t first = 0, count = 0;
    size_t end() const { return first + count; }
    bool operator==(const Range&) const = default;
};

struct FlatParam {
    ParamInfo info;
    Range range;  // its place in the flat buffers, up to the next parameter: whole blocks of kDecayBlock elements
};
// Parameters in the order of the list, as arenas that align tensors to kDecayBlock elements have them.
std::vector<FlatParam> flat_params(const std::vector<ParamInfo>& list);

// The parameters that lie in a part of the flat buffers, or the pieces of them: a piece has one dimension.  Ranges are of
// the part: its first element is 0.  The part begins on a boundary of kDecayBlock.
std::vector<FlatParam> cut_params(const std::vector<FlatParam>& flat, Range part);

// For each block the range whose gradients are final after the backward passes of this block and all later ones.  The
// first range begins with the embedding, the last one ends with the final norm.  Together they are the flat buffer.
std::vector<Range> block_ranges(const std::vector<FlatParam>& flat, int n_blocks);
