// The least work of an op, by its sizes alone.
//
// Bytes are what an op cannot avoid moving between memory and chip: every operand once, twice where it is read and
// written, and for the two products of a linear layer's gradient dy twice.  Vectors over the width are left out.  FLOP
// are the useful ones of the matrix products: 2 per multiply-add, attention's causal half, with the scores computed
// again in its backward.
#pragma once
#include "kernels/recorder.h"

struct Cost {
    double n_bytes = 0, flop = 0;
    int launches = 1;  // of kernels on a GPU, about: a library's product counts as one
};
#define OP_COST(function, Op) Cost cost(const Op&);
KILN_OPS(OP_COST)
#undef OP_COST
Cost cost(const AnyOp&);

// The gradient of an embedding adds to a row of dwte for each different token; above all tokens are different.
Cost cost(const EmbeddingGrad&, size_t n_different);
