// The CPU backend: one function per op, templates on float and double; the double instance is the tests' reference.
// Every op splits its work by shape alone, so the bits of a result do not depend on the number of threads.
#pragma once
#include <exception>
#include <initializer_list>
#include <mutex>

#include "kernels/ops.h"

namespace cpu {
#define OP_FUNCTION(function, Op) void function(const Op&, Stream);
KILN_OPS(OP_FUNCTION)
#undef OP_FUNCTION

// Calls f.operator()<float>() or <double>() by the dtype of an op's `real` tensors: the only dtype switch of an op.
template <class F>
void with_real(DType t, F&& f) {
    switch (t) {
        case DType::f32:
            return f.template operator()<float>();
        case DType::f64:
            return f.template operator()<double>();
        default:
            fail(Exit::usage, "the CPU backend computes in fp32, not {}; set device.dtype: fp32",
                 t == DType::bf16 ? "bf16" : dtype_name(t));
    }
}

// Throws unless every buffer that is given holds T.  Called before a parallel loop, because nothing may throw inside.
template <class T>
void expect_dtype(std::initializer_list<Buf> buffers) {
    for (const Buf& b : buffers) b.as<T>();
}

// Carries the first exception out of a parallel region, where none may escape: run() inside, rethrow() after it.
class FirstError {
  public:
    template <class F>
    void run(F&& f) noexcept {
        try {
            f();
        } catch (...) {
            const std::lock_guard lock(mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }
    void rethrow() {
        if (error_) std::rethrow_exception(error_);
    }

  private:
    std::mutex mutex_;
    std::exception_ptr error_;
};

// Below this many elements an elementwise loop is left to one thread: starting a team costs about as much as the loop.
constexpr size_t kParallelFrom = size_t(1) << 14;
}  // namespace cpu
