// A tensor that starts some elements into its allocation, off the boundaries that vector accesses need, with numbers
// before it that nobody may write.  It ends where the allocation ends.
#pragma once
#include "test/cpu_check.h"

class Slice {
  public:
    Slice(const Target& t, DType dtype, const Doubles& values, size_t offset)
        : all_(t, dtype, join({Doubles(offset, kGuard), values})), offset_(offset), n_(values.size()) {}
    operator Buf() const { return Buf(all_).slice(offset_, n_); }
    Doubles host() const {
        Doubles v = all_.host();
        for (size_t i = 0; i < offset_; i++) CHECK(v[i] == kGuard);
        v.erase(v.begin(), v.begin() + std::ptrdiff_t(offset_));
        return v;
    }

  private:
    static constexpr double kGuard = 77;  // a number of every dtype
    Dev all_;
    size_t offset_, n_;
};

// The rounding of a result to the target's dtype, relative: none beyond the op's own in fp32.
inline double store_error(const Target& t) { return t.real == DType::bf16 ? 0x1p-8 : 0; }
