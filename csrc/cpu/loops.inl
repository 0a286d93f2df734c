// Included once per instruction set, inside a namespace of its own, and compiled for it.
// No standard library here: a shared inline function could leak instructions to other machines.

constexpr int kLanes = KVC_LANES;  // floats in a vector: GCC's pragma sets no macro to ask
typedef float floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t ints __attribute__((vector_size(4 * kLanes)));

#define KVC_INLINE static inline __attribute__((always_inline))

constexpr float kInfinity = __builtin_inff();

KVC_INLINE floats load(const float* p) {
  floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
KVC_INLINE void store(float* p, floats v) { __builtin_memcpy(p, &v, sizeof v); }
KVC_INLINE floats larger(floats a, floats b) { return a > b ? a : b; }

// exp(x) of x <= 0, within 2 ulp; 0 where that would be subnormal, and of NaN.
KVC_INLINE floats exponential(floats x) {
  const floats rounder = floats{} + 12582912.0f;  // 1.5 * 2^23
  const floats shifted = x * 1.44269504f + rounder, n = shifted - rounder;
  const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts
  floats p = floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return (floats)(((ints)p + ((ints)shifted << 23)) & (x > -87.0f));
}

template <Dtype T>
KVC_INLINE float value_of(const void* x, size_t i) {
  uint32_t bits;
  if constexpr (T == Dtype::fp32) {
    bits = ((const uint32_t*)x)[i];
  } else if constexpr (T == Dtype::bf16) {
    bits = uint32_t(((const uint16_t*)x)[i]) << 16;
  } else {
    const uint32_t half = ((const uint16_t*)x)[i];
    float magnitude;
    bits = (half & 0x7fffu) << 13;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude *= 0x1p112f;
    __builtin_memcpy(&bits, &magnitude, 4);
    bits |= ((half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0) | (half & 0x8000u) << 16;
  }
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Keys `first ...` of a page as [D, kChunk]; those beyond `count` are zero.
template <Dtype T>
void unpack(const Pool& pool, const char* page, int first, int count, float* __restrict tile) {
  const int32_t* where = pool.keys + first;
  const bool whole_rows = pool.keys_by_lane && count == kChunk;
  for (int lane = pool.head_size; lane > 0; --lane, tile += kChunk, where += pool.page_tokens) {
    if (whole_rows) {
      const size_t row = where[0];
      for (int t = 0; t < kChunk; ++t) tile[t] = value_of<T>(page, row + t);
    } else {
      for (int t = 0; t < count; ++t) tile[t] = value_of<T>(page, where[t]);
      for (int t = count; t < kChunk; ++t) tile[t] = 0;
    }
  }
}

// logits[rows, kChunk] = queries[rows, D] . tile[D, kChunk]
KVC_INLINE void multiply(const float* queries, int rows, int head_size, const float* tile,
                         float* logits) {
  constexpr int R = kLanes == 16 ? 8 : 4;  // twice as many sums fill the registers
  static_assert(kRows % R == 0);
  for (; rows > 0; rows -= R, queries += size_t(R) * head_size, logits += R * kChunk)
    for (int t = 0; t < kChunk; t += 2 * kLanes) {
      floats left[R] = {}, right[R] = {};
      for (int lane = 0; lane < head_size; ++lane) {
        const float* at = tile + lane * kChunk + t;
        const floats a = load(at), b = load(at + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const float q = queries[size_t(r) * head_size + lane];
          left[r] += a * q;
          right[r] += b * q;
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        store(logits + r * kChunk + t, left[r]);
        store(logits + r * kChunk + t + kLanes, right[r]);
      }
    }
}

// What stands in a chunk from `end` on becomes `value`.
KVC_INLINE void hide(float* chunk, int end, float value) {
  for (int t = end > 0 ? end : 0; t < kChunk; ++t) chunk[t] = value;
}

// Where chunk c begins among the candidates, and how many it has.
struct Span {
  int page, offset, first, count;
};
KVC_INLINE Span span(const Pool& pool, const Scratch& sizes, int c) {
  const int page = c / sizes.page_chunks, offset = c % sizes.page_chunks * kChunk;
  const int left = pool.page_tokens - offset;
  return {page, offset, page * pool.page_tokens + offset, left < kChunk ? left : kChunk};
}

// Logits [chunks, rows, kChunk] of the first `used` rows, and each row's largest by lane,
// [rows, kLanes].
template <Dtype T>
void find_logits(const Pool& pool, const Window& w, const Scratch& sizes, const float* queries,
                 int used, float* tile, float* peaks, float* logits) {
  for (int row = 0; row < used; ++row) store(peaks + row * kLanes, floats{} - kInfinity);
  for (int c = 0; c < sizes.chunks; ++c, logits += sizes.lanes) {
    const Span at = span(pool, sizes, c);
    const char* page = pool.data + w.pages[at.page] * pool.page_elements * dtype_bytes(T);
    unpack<T>(pool, page, at.offset, at.count, tile);
    multiply(queries, sizes.rows, pool.head_size, tile, logits);
    for (int row = 0; row < used; ++row) {
      float* chunk = logits + row * kChunk;
      const int seen = w.seen[row % w.window] - at.first;
      if (seen < kChunk || at.count < kChunk) hide(chunk, seen < at.count ? seen : at.count, -kInfinity);
      floats peak = load(peaks + row * kLanes);
      for (int t = 0; t < kChunk; t += kLanes) peak = larger(peak, load(chunk + t));
      store(peaks + row * kLanes, peak);
    }
  }
}

// Logits to exponentials, in place, and what one counts in each row: fade / sum.
KVC_INLINE void soften(const Pool& pool, const Window& w, const Scratch& sizes, int used,
                       float* peaks, float* sums, float* logits, float* weights) {
  for (int row = 0; row < used; ++row) {
    float peak = -kInfinity;
    for (int i = 0; i < kLanes; ++i) {
      const float one = peaks[row * kLanes + i];
      peak = one > peak ? one : peak;
    }
    store(peaks + row * kLanes, floats{} + peak);
    store(sums + row * kLanes, floats{});
  }
  for (int c = 0; c < sizes.chunks; ++c, logits += sizes.lanes) {
    const int first = span(pool, sizes, c).first;
    for (int row = 0; row < used; ++row) {
      float* chunk = logits + row * kChunk;
      const floats peak = load(peaks + row * kLanes);
      floats sum = load(sums + row * kLanes);
      for (int t = 0; t < kChunk; t += kLanes) {
        const floats e = exponential(load(chunk + t) - peak);
        sum += e;
        store(chunk + t, e);
      }
      store(sums + row * kLanes, sum);
      const int scored = w.scored[row % w.window] - first;
      if (scored < kChunk) hide(chunk, scored, 0);
    }
  }
  for (int row = 0; row < used; ++row) {
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += sums[row * kLanes + i];
    weights[row] = sum > 0 ? w.fade[row % w.window] / sum : 0;  // one that sees no key: nothing
  }
}

// What the queries of one query head pay each key.
KVC_INLINE void weigh(const Pool& pool, const Rule& rule, const Window& w, const Scratch& sizes,
                      const float* weights, const float* exponentials, float* mass) {
  for (int c = 0; c < sizes.chunks; ++c, exponentials += sizes.lanes) {
    float* paid = mass + span(pool, sizes, c).first;
    for (int t = 0; t < kChunk; t += kLanes) {
      floats found = {};
      for (int i = 0; i < w.window; ++i) {
        const floats a = load(exponentials + i * kChunk + t) * weights[i];
        if (rule.peak)
          found = larger(found, a);
        else
          found += rule.square ? a * a : a;
      }
      store(paid + t, rule.peak && rule.square ? found * found : found);
    }
  }
}

// Each key's mass joined with its neighbours', and that with the other query heads' in `scores`.
KVC_INLINE void join(const Rule& rule, const Window& w, const float* mass, bool first) {
  constexpr int kBlock = 256;
  float pooled[kBlock];
  for (int begin = 0; begin < w.tokens; begin += kBlock) {
    const int count = w.tokens - begin < kBlock ? w.tokens - begin : kBlock;
    const float* from = mass + begin - rule.pool_before;
    for (int t = 0; t < count; ++t) pooled[t] = from[t];
    for (int s = 1; s < rule.pool_tokens; ++s)
      if (rule.pool_mean)
        for (int t = 0; t < count; ++t) pooled[t] += from[t + s];
      else
        for (int t = 0; t < count; ++t) pooled[t] = from[t + s] > pooled[t] ? from[t + s] : pooled[t];
    float* scores = w.scores + begin;
    const float factor = (rule.pool_mean ? 1.0f / rule.pool_tokens : 1.0f) * rule.group_factor;
    for (int t = 0; t < count; ++t) {
      const float one = pooled[t] * factor, other = first ? 0 : scores[t];
      scores[t] = rule.group_max ? (one > other ? one : other) : one + other;
    }
  }
}

template <Dtype T>
void score_pages(const Pool& pool, const Rule& rule, const Window& w, const Scratch& sizes,
                 float* scratch) {
  float* queries = scratch + sizes.tile;
  float* peaks = queries + sizes.queries;
  float* sums = peaks + sizes.lanes;
  float* logits = sums + sizes.lanes;
  float* mass = logits + sizes.logits;
  for (size_t i = 0; i < sizes.mass; ++i) mass[i] = 0;  // and so it stays around the keys
  mass += rule.pool_before;
  for (int g = 0; g < w.group; g += sizes.group) {
    const int heads = w.group - g < sizes.group ? w.group - g : sizes.group;
    const int used = heads * w.window, given = used * pool.head_size;
    const float* own = w.queries + size_t(g) * w.window * pool.head_size;
    for (int i = 0; i < sizes.rows * pool.head_size; ++i) queries[i] = i < given ? own[i] : 0;
    find_logits<T>(pool, w, sizes, queries, used, scratch, peaks, logits);
    soften(pool, w, sizes, used, peaks, sums, logits, queries);
    for (int h = 0; h < heads; ++h) {
      const int row = h * w.window;
      weigh(pool, rule, w, sizes, queries + row, logits + row * kChunk, mass);
      join(rule, w, mass, g + h == 0);
    }
  }
}

void score(const Pool& pool, const Rule& rule, const Window& w, const Scratch& sizes,
           float* scratch) {
  if (pool.dtype == Dtype::fp32) return score_pages<Dtype::fp32>(pool, rule, w, sizes, scratch);
  if (pool.dtype == Dtype::fp16) return score_pages<Dtype::fp16>(pool, rule, w, sizes, scratch);
  score_pages<Dtype::bf16>(pool, rule, w, sizes, scratch);
}

// One lane after the other of a token, from one page to another.
template <class Item>
KVC_INLINE void copy_lanes(const int32_t* where, int tokens, int lanes, const Item* from,
                           int offset, Item* __restrict to, int t) {
  for (; lanes > 0; --lanes, where += tokens) to[where[t]] = from[where[offset]];
}

template <class Item>
void copy_items(const Pool& pool, const int64_t* pages, const int* offsets, int64_t target) {
  const int B = pool.page_tokens, D = pool.head_size;
  Item* const data = (Item*)pool.data;
  Item* const to = data + target * pool.page_elements;
  for (int t = 0; t < B; ++t) {
    const Item* from = data + pages[t] * pool.page_elements;
    copy_lanes(pool.keys, B, D, from, offsets[t], to, t);
    if (pool.values_by_token)
      __builtin_memcpy(to + pool.values[t], from + pool.values[offsets[t]], D * sizeof(Item));
    else
      copy_lanes(pool.values, B, D, from, offsets[t], to, t);
  }
}

void copy(const Pool& pool, const int64_t* pages, const int* offsets, int64_t target) {
  if (pool.dtype == Dtype::fp32) return copy_items<uint32_t>(pool, pages, offsets, target);
  copy_items<uint16_t>(pool, pages, offsets, target);
}
