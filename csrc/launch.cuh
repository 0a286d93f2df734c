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

// Copies 16 bytes to shared memory in the background, or zeros without reading. The calling thread
// commits what it started as one group, and may read it once at most `LATER` younger groups are
// pending.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool real) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                 "r"(real ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_async() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int LATER>
__device__ __forceinline__ void wait_async() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ uint16_t float_to_half(float number) {
    return __half_as_ushort(__float2half_rn(number));
}
#endif
