// What the page kernels share: numbers in 16-byte vectors.
#pragma once

#include "launch.cuh"

struct Half {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

__device__ __forceinline__ float widen(float number) { return number; }
__device__ __forceinline__ float widen(Half number) { return half_to_float(number.bits); }
__device__ __forceinline__ float widen(BFloat16 number) {
    return __uint_as_float(static_cast<uint32_t>(number.bits) << 16);
}

__device__ __forceinline__ void narrow(float number, float* to) { *to = number; }
__device__ __forceinline__ void narrow(float number, Half* to) { to->bits = float_to_half(number); }
__device__ __forceinline__ void narrow(float number, BFloat16* to) {  // to nearest, ties to even
    uint32_t bits = __float_as_uint(number);
    bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to->bits = is_nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

template <typename T>
union Vector {
    static constexpr int SIZE = 16 / sizeof(T);
    uint4 whole;
    T part[SIZE];
};

inline bool is_power_of_two(int32_t number) { return number > 0 && !(number & (number - 1)); }

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
