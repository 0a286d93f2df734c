// Which table a channel takes, found by a warp: the same choice as Encoder's in encode.cpp.
#pragma once

#include "codec/warp.cuh"

namespace kvc {

// A channel's integers; for lossless values, their exponents.
struct Integers {
  const int16_t* q;
  int tokens, mantissa;  // 0: not lossless

  __device__ int operator[](int t) const {
    if (!mantissa) return q[t];
    return uint16_t(q[t]) >> mantissa & ((1 << (15 - mantissa)) - 1);
  }
  __device__ int16_t residual(int t, int centre, bool delta) const {
    return int16_t((*this)[t] - (delta && t ? (*this)[t - 1] : centre));
  }
};

// How a channel's integers become symbols, the same in all threads.
struct Coding {
  Channel record;
  uint32_t freq;  // of this thread's symbol
  int64_t cost;   // in 1/kCostUnit bits

  __device__ int half() const { return (1 << record.shift()) >> 1; }
  __device__ int16_t biased(const Integers& q, int t) const {
    return int16_t(q.residual(t, record.centre + half(), record.delta()) + half());
  }
};

__device__ inline int symbol_of(int16_t biased, int shift) {
  const int w = biased >> shift;
  return w >= -kReach && w <= kReach ? w + kCentre : kEscape;
}

__device__ inline int64_t sum_of(int64_t value) {
  for (int far = kWarp / 2; far; far /= 2) value += __shfl_xor_sync(kAll, value, far);
  return value;
}

// How often this thread's symbol occurs.
__device__ inline int count_symbols(const Integers& q, const Coding& coding, int* counts) {
  __syncwarp();
  counts[threadIdx.x] = 0;
  __syncwarp();
  for (int t = threadIdx.x; t < q.tokens; t += kWarp)
    atomicAdd(&counts[symbol_of(coding.biased(q, t), coding.record.shift())], 1);
  __syncwarp();
  return counts[threadIdx.x];
}

// What this thread's symbol costs, an escape's value included.
__device__ inline int cost_of(const DeviceTables& tables, uint32_t freq) {
  const uint32_t escape = __shfl_sync(kAll, freq, kEscape);
  const bool escapes = threadIdx.x == kEscape || !freq;
  return tables.symbol_costs[escapes ? escape : freq] + (escapes ? kEscapeBits * kCostUnit : 0);
}

__device__ inline uint32_t normalised(int count, int tokens) {
  int freq = int(int64_t(count) * kProbScale / tokens);
  if (freq == 0 && (count || threadIdx.x == kEscape)) freq = 1;
  const int sum = __reduce_add_sync(kAll, freq);
  const int first_largest = __reduce_max_sync(kAll, count << 5 | (kWarp - 1 - threadIdx.x));
  const int largest = kWarp - 1 - (first_largest & (kWarp - 1));
  if (int(threadIdx.x) == largest) freq += kProbScale - sum;
  const bool alone = __ballot_sync(kAll, freq == kProbScale);
  if (alone) freq += (threadIdx.x == kCentre) - (int(threadIdx.x) == largest);
  return uint32_t(freq);
}

// The channel's own choice: centre, delta, shift, and the best of six tables of the codebook or
// one made for it.
__device__ inline Coding adapt(const DeviceTables& tables, const Integers& q, int* shared) {
  const bool lossless = q.mantissa;
  const int tokens = q.tokens;
  int sum = 0, magnitude = 0, steps = 0;
  for (int t = threadIdx.x; t < tokens; t += kWarp) sum += q[t];
  sum = __reduce_add_sync(kAll, sum);
  const int twice = 2 * sum + tokens, width = 2 * tokens;
  const int centre = twice >= 0 ? twice / width : -((width - 1 - twice) / width);
  for (int t = threadIdx.x; t < tokens; t += kWarp) {
    magnitude += abs(q[t] - centre);
    if (t) steps += abs(q[t] - q[t - 1]);
  }
  magnitude = __reduce_add_sync(kAll, magnitude);
  steps = __reduce_add_sync(kAll, steps);
  const bool delta = !lossless && 8 * int64_t(steps) < 7 * int64_t(magnitude);

  int shift = 0, count = 0;
  Coding coding{};
  for (;; ++shift) {
    const int half = (1 << shift) >> 1;
    coding.record = {0, uint8_t(shift | (delta ? 128 : 0)), int16_t(centre - half)};
    count = count_symbols(q, coding, shared);
    const int escapes = __shfl_sync(kAll, count, kEscape);
    if (lossless || shift == kMaxShift || escapes * 256 <= tokens) break;
  }

  int offset = kOffsets / 2;
  if (!delta && !shift) {
    const int64_t excess = sum - int64_t(centre) * tokens;
    offset = int((2 * kOffsets * excess + kOffsets * tokens) / (2 * tokens));
    offset = min(max(offset, 0), kOffsets - 1);
  }
  const int64_t deviation = int64_t(delta ? steps : magnitude) * 256;
  const uint16_t* spreads = tables.book.spreads[lossless][offset];
  int spread = 0;
  while (spread < kSpreads - 1 && deviation > (int64_t(spreads[spread]) * tokens << shift))
    ++spread;
  int best = -1, best_cost = 0;
  for (int shape = 0; shape < kShapes; ++shape)
    for (int i = max(0, spread - 1); i <= min(kSpreads - 1, spread + 1); ++i) {
      const int index = Codebook::index(shape, offset, i);
      const int cost = __reduce_add_sync(
          kAll, count * tables.book.tables[lossless][index].costs[threadIdx.x]);
      if (best < 0 || cost < best_cost) best = index, best_cost = cost;
    }
  coding.cost = best_cost;
  coding.freq = tables.book.tables[lossless][best].table.freq[threadIdx.x];

  const unsigned counted = __ballot_sync(kAll, count > 0);
  const int64_t own_cost = int64_t(4 + 2 * __popc(counted)) * 8 * kCostUnit;
  const int64_t logs = sum_of(count ? int64_t(count) * tables.count_logs[count] : 0);
  const int64_t entropy = (int64_t(tokens) * tables.count_logs[tokens] - logs) >> 8;
  if (best_cost - entropy > own_cost) {
    const uint32_t own = normalised(count, tokens);
    const int64_t cost = __reduce_add_sync(kAll, count * cost_of(tables, own)) + own_cost;
    if (cost < coding.cost) {
      coding.cost = cost;
      coding.freq = own;
      best = kOwnTable;
    }
  }
  coding.cost += int64_t(shift) * tokens * kCostUnit;
  coding.record.table = uint8_t(best);
  return coding;
}

// The profile's choice.
__device__ inline Coding follow(const DeviceTables& tables, const Integers& q, Channel record,
                         uint32_t freq, int* shared) {
  Coding coding{record, freq, 0};
  coding.record.table = kFromProfile;
  const int count = count_symbols(q, coding, shared);
  coding.cost = __reduce_add_sync(kAll, count * cost_of(tables, freq)) +
                int64_t(record.shift()) * q.tokens * kCostUnit;
  return coding;
}

}  // namespace kvc
