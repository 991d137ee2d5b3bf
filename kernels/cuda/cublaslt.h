// libcublasLt, loaded at the first call.  A run on the CPU then starts without the library, and 0.08 s sooner: loading
// takes 400,000 relocations.
#pragma once
#include <cublasLt.h>

// Each function of cuBLASLt that kiln calls, without the prefix cublasLt.
#define KILN_CUBLASLT(FUNCTION)            \
    FUNCTION(Create)                       \
    FUNCTION(GetStatusName)                \
    FUNCTION(GetVersion)                   \
    FUNCTION(Matmul)                       \
    FUNCTION(MatmulAlgoCapGetAttribute)    \
    FUNCTION(MatmulAlgoCheck)              \
    FUNCTION(MatmulAlgoConfigGetAttribute) \
    FUNCTION(MatmulAlgoConfigSetAttribute) \
    FUNCTION(MatmulAlgoGetHeuristic)       \
    FUNCTION(MatmulDescCreate)             \
    FUNCTION(MatmulDescDestroy)            \
    FUNCTION(MatmulDescSetAttribute)       \
    FUNCTION(MatmulPreferenceCreate)       \
    FUNCTION(MatmulPreferenceDestroy)      \
    FUNCTION(MatmulPreferenceSetAttribute) \
    FUNCTION(MatrixLayoutCreate)           \
    FUNCTION(MatrixLayoutDestroy)

namespace cuda {
struct CublasLt {
#define POINTER(function) decltype(&::cublasLt##function) function;
    KILN_CUBLASLT(POINTER)
#undef POINTER
};
// Throws Error(Exit::usage) where the library is missing or lacks a function.
const CublasLt& lt();
}  // namespace cuda
