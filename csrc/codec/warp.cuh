// What the codec's kernels share. A warp works on one section or one channel: thread s holds what
// belongs to symbol s of a table, or to token s of thirty-two.
#pragma once

#include "codec/cuda.h"
#include "codec/tables.h"
#include "launch.cuh"

namespace kvc {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
static_assert(kSymbols == kWarp);

struct DeviceTables {
  Codebook book;
  int16_t symbol_costs[kProbScale + 1];
  int32_t count_logs[kMaxTokens + 1];
};

__device__ inline unsigned below() { return (1u << threadIdx.x) - 1; }  // threads before this one

// The sum of this thread's value and of those before it.
template <class T>
__device__ T running_sum(T value) {
  for (unsigned far = 1; far < kWarp; far *= 2) {
    const T other = __shfl_up_sync(kAll, value, far);
    if (threadIdx.x >= far) value += other;
  }
  return value;
}

// A probability table for look-ups by any thread.
struct SharedTable {
  uint16_t freq[kSymbols], start[kSymbols];

  __device__ void fill(uint32_t frequency) {
    const uint32_t end = running_sum(frequency);
    __syncwarp();  // nobody still looks up in the table before
    freq[threadIdx.x] = uint16_t(frequency);
    start[threadIdx.x] = uint16_t(end - frequency);
    __syncwarp();
  }

  // The symbol that has this slot.
  __device__ int find(uint32_t slot) const {
    int found = 0;
    for (int step = kSymbols / 2; step; step /= 2)
      if (start[found + step] <= slot) found += step;
    return found;
  }
};

// A section's lanes: two to a thread when there are 64, half the threads idle when there are 16.
struct Lanes {
  int width, units;

  __device__ explicit Lanes(int lanes) : width(min(lanes, kWarp)), units(lanes / width) {}
  __device__ bool has() const { return int(threadIdx.x) < width; }
  __device__ int token(int group, int unit) const { return group + unit * width + threadIdx.x; }
};

__device__ inline uint32_t load_bits(const void* x, size_t i, Dtype d) {
  return d == Dtype::fp32 ? static_cast<const uint32_t*>(x)[i] : static_cast<const uint16_t*>(x)[i];
}

__device__ inline void store_bits(void* x, size_t i, Dtype d, uint32_t bits) {
  if (d == Dtype::fp32) static_cast<uint32_t*>(x)[i] = bits;
  else static_cast<uint16_t*>(x)[i] = uint16_t(bits);
}

inline int blocks(int n, int size) { return (n + size - 1) / size; }

inline bool takes(int sections, int tokens, int channels, int dtype) {
  return sections >= 1 && sections <= 65535 && tokens >= 1 && tokens <= kMaxTokens &&
         channels >= 1 && channels <= 65535 && int64_t(tokens) * channels <= 1 << 26 &&
         dtype >= 0 && dtype <= 2;
}

// Parts of one allocation, each aligned to 16 bytes.
struct Carver {
  char* base;
  size_t at;

  template <class T>
  void take(T*& part, size_t count) {
    part = reinterpret_cast<T*>(base + at);
    at = (at + count * sizeof(T) + 15) & ~size_t(15);
  }
};

}  // namespace kvc
