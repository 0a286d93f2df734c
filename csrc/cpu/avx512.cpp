#if defined(__x86_64__)
#include "kernels.h"

#if !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#else
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#endif

#define KVC_LANES 16

namespace kvc {
namespace cpu {
namespace avx512 {
#include "loops.inl"
}  // namespace avx512

const Kernels kAvx512 = {"avx512", avx512::score, avx512::copy};

}  // namespace cpu
}  // namespace kvc

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
