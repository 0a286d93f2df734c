// What the page kernels share: numbers in 16-byte vectors, and the launch.
//
// Compiled by nvcc for a GPU. With KVC_ON_HOST a C++ compiler builds the same kernels for a CPU,
// with the CUDA constructs they use supplied by that header (see tests/kernels/cuda_on_host.h).
#pragma once

#include <stdint.h>

#ifdef KVC_ON_HOST
#include KVC_ON_HOST
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

template <typename Arguments>
int launch(void (*kernel)(Arguments), dim3 grid, int threads, void* stream, Arguments arguments) {
    kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
    return cudaGetLastError();
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ uint16_t float_to_half(float number) {
    return __half_as_ushort(__float2half_rn(number));
}
#endif

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
