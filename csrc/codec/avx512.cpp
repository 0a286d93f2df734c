#if defined(__x86_64__)
#if defined(KVC_EMULATE_AVX512)  // a header; a build for tests on machines without AVX-512
#include KVC_EMULATE_AVX512
#else
#include <immintrin.h>
#endif

#include "kernels.h"

#if defined(KVC_EMULATE_AVX512)
#elif !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi,bmi2,popcnt")
#else
#pragma clang attribute push(                                                       \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi,bmi2,popcnt"))), \
    apply_to = function)
#endif

#define KVC_VECTOR_BYTES 32

namespace kvc {
namespace avx512 {
#include "loops.inl"
#include "rans_avx512.inl"
}  // namespace avx512

const Kernels kAvx512 = KVC_KERNELS(avx512);

}  // namespace kvc

#if defined(__clang__) && !defined(KVC_EMULATE_AVX512)
#pragma clang attribute pop
#endif
#endif
