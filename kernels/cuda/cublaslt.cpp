#include "kernels/cuda/cublaslt.h"

#include "common/error.h"

#ifdef CUBLASLT_STAND_IN  // the emulator's functions are part of this program
namespace cuda {
const CublasLt& lt() {
#define ADDRESS(function) .function = &::cublasLt##function,
    static constexpr CublasLt all = {KILN_CUBLASLT(ADDRESS)};
#undef ADDRESS
    return all;
}
}  // namespace cuda
#else
#include <dlfcn.h>

namespace {
// Stays loaded: when the process ends the library's own threads may still run.
cuda::CublasLt load() {
    const std::string name = fmt::format("libcublasLt.so.{}", CUBLAS_VER_MAJOR);
    void* const library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library)
        fail(Exit::usage, "cuBLASLt cannot be loaded: {}; name the folder of {} in LD_LIBRARY_PATH", ::dlerror(), name);
    cuda::CublasLt all;
    const auto find = [&]<class F>(F& function, const char* symbol) {
        function = reinterpret_cast<F>(::dlsym(library, symbol));
        if (!function) fail(Exit::usage, "{} has no {}; kiln needs CUDA 13 or newer", name, symbol);
    };
#define FIND(function) find(all.function, "cublasLt" #function);
    KILN_CUBLASLT(FIND)
#undef FIND
    return all;
}
}  // namespace

namespace cuda {
const CublasLt& lt() {
    static const CublasLt all = load();
    return all;
}
}  // namespace cuda
#endif
