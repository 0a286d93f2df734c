// Work on the OpenMP threads of the process: torch's, which vLLM has bound to their cores. New
// threads would all run on the one core that the caller is bound to.
#pragma once
#include <dlfcn.h>

#include <atomic>
#include <cstddef>

namespace kvc {
namespace cpu {

// Runs work(thread, i) for i in [0, n) on threads 0 .. `threads` - 1; on the caller's alone where
// the process has no OpenMP with GCC's interface.
template <class Work>
void spread(size_t n, int threads, const Work& work) {
  struct Shared {
    const Work& work;
    const size_t n;
    std::atomic<size_t> next{0};
    std::atomic<int> entered{0};

    static void run(void* self) {
      Shared& shared = *static_cast<Shared*>(self);
      const int thread = shared.entered++;
      for (size_t i; (i = shared.next++) < shared.n;) shared.work(thread, i);
    }
  } shared{work, n};
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (parallel && threads > 1 && n > 1)
    parallel(Shared::run, &shared, threads, 0);
  else
    Shared::run(&shared);
}

}  // namespace cpu
}  // namespace kvc
