// How the files of kernels give them to a stream.  Files without kernels need cuda.h alone, and no nvcc.
#pragma once
#include <utility>

#include "kernels/cuda/cuda.h"
#include "kernels/simt.h"

namespace cuda {
// Launches a kernel, notes it for the messages of later errors, and throws the error of the launch itself.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t n_shared_bytes, Stream s, A&&... arguments) {
    check_launch(simt::launch(kernel, grid, block, n_shared_bytes, s, std::forward<A>(arguments)...),
                 reinterpret_cast<const void*>(kernel));
}
}  // namespace cuda
