// Buf: a view of numbers in some backend's memory: pointer, element count, dtype.  No shape, no strides, no ownership.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>

#include "common/error.h"
#include "common/host_device.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#endif

// Storage type of two bytes; arithmetic is always in float.  Round to nearest even, NaN stays NaN.  No default member
// value: arrays of it live in registers and shared memory.
struct bf16 {
    uint16_t bits;
    bf16() = default;
    HOST_DEVICE explicit bf16(float f) {
#ifdef __CUDA_ARCH__
        bits = __bfloat16_as_ushort(__float2bfloat16_rn(f));
#else
        const uint32_t u = std::bit_cast<uint32_t>(f);
        bits = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
#endif
    }
    HOST_DEVICE explicit operator float() const {
#ifdef __CUDA_ARCH__
        return __uint_as_float(uint32_t(bits) << 16);
#else
        return std::bit_cast<float>(uint32_t(bits) << 16);
#endif
    }
};

enum class DType : uint8_t { f32, f64, bf16, i32, u32, u8 };

constexpr size_t dtype_bytes(DType t) {
    switch (t) {
        case DType::f32:
            return 4;
        case DType::f64:
            return 8;
        case DType::bf16:
            return 2;
        case DType::i32:
            return 4;
        case DType::u32:
            return 4;
        case DType::u8:
            return 1;
    }
    return 0;
}
constexpr const char* dtype_name(DType t) {
    switch (t) {
        case DType::f32:
            return "f32";
        case DType::f64:
            return "f64";
        case DType::bf16:
            return "bf16";
        case DType::i32:
            return "i32";
        case DType::u32:
            return "u32";
        case DType::u8:
            return "u8";
    }
    return "?";
}

template <class T>
struct dtype_of;
template <>
struct dtype_of<float> {
    static constexpr DType value = DType::f32;
};
template <>
struct dtype_of<double> {
    static constexpr DType value = DType::f64;
};
template <>
struct dtype_of<bf16> {
    static constexpr DType value = DType::bf16;
};
template <>
struct dtype_of<int32_t> {
    static constexpr DType value = DType::i32;
};
template <>
struct dtype_of<uint32_t> {
    static constexpr DType value = DType::u32;
};
template <>
struct dtype_of<uint8_t> {
    static constexpr DType value = DType::u8;
};

struct Buf {
    void* data = nullptr;
    size_t count = 0;  // elements
    DType dtype = DType::f32;

    Buf() = default;
    Buf(void* d, size_t n, DType t) : data(d), count(n), dtype(t) {}
    template <class T>
    Buf(T* d, size_t n) : data(d), count(n), dtype(dtype_of<T>::value) {}

    explicit operator bool() const { return data != nullptr; }
    size_t n_bytes() const { return count * dtype_bytes(dtype); }

    // The elements as T; refuses any other dtype.  Null for an absent (optional) buffer.
    template <class T>
    T* as() const {
        CHECK_THAT(!data || dtype == dtype_of<T>::value, "buffer holds {}, asked for {}", dtype_name(dtype),
                   dtype_name(dtype_of<T>::value));
        return static_cast<T*>(data);
    }
    // n elements from `offset` on.
    Buf slice(size_t offset, size_t n) const {
        CHECK_THAT(offset <= count && n <= count - offset, "slice [{}, {}+{}) of {} elements", offset, offset, n,
                   count);
        return {static_cast<char*>(data) + offset * dtype_bytes(dtype), n, dtype};
    }
};
