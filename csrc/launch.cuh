// How kernels are launched, by nvcc on a GPU. With KVC_ON_HOST a C++ compiler builds the same
// kernels for a CPU, with the CUDA constructs they use supplied by that header
// (tests/kernels/cuda_on_host.h).
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
