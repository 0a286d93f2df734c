#include <cstring>

#include "kernels.h"

namespace kvc {
namespace cpu {

static bool runs_here(const Kernels& k) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (&k == &kAvx2) return avx2;
  if (&k == &kAvx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return &k == &kPortable;
}

const Kernels* kernels_named(const char* name) {
  const Kernels* best_first[] = {
#if defined(__x86_64__)
      &kAvx512, &kAvx2,
#endif
      &kPortable};
  for (const Kernels* k : best_first)
    if ((!*name || !std::strcmp(name, k->name)) && runs_here(*k)) return k;
  return nullptr;
}

}  // namespace cpu
}  // namespace kvc
