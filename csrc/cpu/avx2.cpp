#if defined(__x86_64__)
#include "kernels.h"

#if !defined(__clang__)
#pragma GCC target("avx2,fma")
#else
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#endif

#define KVC_LANES 8

namespace kvc {
namespace cpu {
namespace avx2 {
#include "loops.inl"
}  // namespace avx2

const Kernels kAvx2 = {"avx2", avx2::score, avx2::copy};

}  // namespace cpu
}  // namespace kvc

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
