#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#if !defined(__clang__)
#pragma GCC target("avx2,bmi,bmi2,popcnt")
#else
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,popcnt"))), apply_to = function)
#endif

#define KVC_VECTOR_BYTES 32

namespace kvc {
namespace avx2 {
#include "loops.inl"
#include "rans_avx2.inl"
}  // namespace avx2

const Kernels kAvx2 = KVC_KERNELS(avx2);

}  // namespace kvc

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
