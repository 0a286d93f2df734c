// Included once per instruction set, inside a namespace of its own, and compiled for it.
// No standard library here: a shared inline function could leak instructions to other machines.

typedef float v8f __attribute__((vector_size(32)));
typedef float v4f __attribute__((vector_size(16)));
typedef double v4d __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint32_t v8u __attribute__((vector_size(32)));
constexpr int kVectorBytes = KVC_VECTOR_BYTES;
typedef uint8_t bytes_t __attribute__((vector_size(kVectorBytes)));
typedef uint64_t words_t __attribute__((vector_size(kVectorBytes)));
typedef int16_t v8s __attribute__((vector_size(16)));
typedef uint16_t v8h __attribute__((vector_size(16)));

#if defined(__clang__)
#define KVC_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KVC_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (v8s){__VA_ARGS__})
#endif
#define KVC_INLINE static inline __attribute__((always_inline))

constexpr uint64_t kEvenBytes = 0x00ff00ff00ff00ff, kOnes = 0x0001000100010001;

template <class To, class From>
KVC_INLINE To load(const From* p) {
  To v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class To, class V>
KVC_INLINE void store(To* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

KVC_INLINE v8u widen(v8h h) { return __builtin_convertvector(h, v8u); }

template <Dtype D>
KVC_INLINE v8f load_floats(const void* x, size_t i) {
  if constexpr (D == Dtype::fp32) return load<v8f>((const float*)x + i);
  v8u h = widen(load<v8h>((const uint16_t*)x + i));
  if constexpr (D == Dtype::bf16) return (v8f)(h << 16);
  const v8u scale = v8u{} + 0x77800000u;  // 2^112
  v8f magnitude = (v8f)((h & 0x7fffu) << 13) * (v8f)scale;
  v8u special = (v8u)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (v8f)((v8u)magnitude | special | ((h & 0x8000u) << 16));
}

template <Dtype D>
KVC_INLINE void store_floats(void* x, size_t i, v8f f) {
  if constexpr (D == Dtype::fp32) return store((float*)x + i, f);
  v8u u = (v8u)f;
  if constexpr (D == Dtype::bf16) {
    u = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  } else {
    v8u sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    v8u huge = (v8u)((v8i)u > 0x477fe000);  // 65504
    u = (huge & 0x477fe000u) | (~huge & u);
    v8u tiny = (v8u)((v8i)u < (113 << 23));
    v8u subnormal = (v8u)((v8f)u + 0.5f) - (126u << 23);
    v8u normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
    u = sign | (tiny & subnormal) | (~tiny & normal);
  }
  store((uint16_t*)x + i, __builtin_convertvector(u, v8h));
}

KVC_INLINE void interleave(v8s a, v8s b, v8s& low, v8s& high) {
  low = KVC_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = KVC_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}

KVC_INLINE void transpose(v8s r[8]) {
  for (int pass = 0; pass < 3; ++pass) {
    v8s t[8];
    for (int i = 0; i < 4; ++i) interleave(r[i], r[i + 4], t[2 * i], t[2 * i + 1]);
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
}

// Runs `tile(token, channel)` over 8 x 8 tiles; what is left over is padded by the callers' rows.
template <class Tile>
KVC_INLINE void over_tiles(int tokens, int channels, Tile tile) {
  for (int t = 0; t < tokens; t += 8)
    for (int c = 0; c < channels; c += 8) tile(t, c);
}

// Eight floats of a row that has n more; those beyond are zero.
template <Dtype D>
KVC_INLINE v8f load_row(const void* x, size_t i, size_t n) {
  if (n >= 8) return load_floats<D>(x, i);
  uint32_t rest[8] = {};
  __builtin_memcpy(rest, (const char*)x + i * dtype_bytes(D), n * dtype_bytes(D));
  return load_floats<D>(rest, 0);
}

template <Dtype D>
double sum_squares_of(const void* x, size_t n) {
  v4d a = {}, b = {};
  for (size_t i = 0; i < n; i += 8) {
    const v8f row = load_row<D>(x, i, n - i);
    const v4d low = __builtin_convertvector(load<v4f>((const float*)&row), v4d);
    const v4d high = __builtin_convertvector(load<v4f>((const float*)&row + 4), v4d);
    a += low * low;
    b += high * high;
  }
  return ((a[0] + a[1]) + (a[2] + a[3])) + ((b[0] + b[1]) + (b[2] + b[3]));
}

uint32_t row_max(const void* x, Dtype dtype, size_t n) {
  uint32_t most = 0;
  uint16_t top = 0;
  if (dtype == Dtype::fp32)
    for (size_t i = 0; i < n; ++i) {
      uint32_t u = ((const uint32_t*)x)[i] & 0x7fffffffu;
      most = u > most ? u : most;
    }
  else
    for (size_t i = 0; i < n; ++i) {
      uint16_t u = ((const uint16_t*)x)[i] & 0x7fffu;
      top = u > top ? u : top;
    }
  return dtype == Dtype::fp32 ? most : top;
}

template <Dtype D>
bool quantise_of(const void* x, int tokens, int stride, int channels, const float* by_token,
                 const float* by_channel, int even, int16_t* q, int q_stride) {
  v8i room = {};
  const v8f rounder = v8f{} + (kRounder + float(even));
  const v8i rounder_bits = (v8i)rounder;
  over_tiles(tokens, channels, [&](int t, int c) {
    v8s rows[8];
    const v8f scale = load<v8f>(by_channel + c);
    for (int i = 0; i < 8; ++i) {
      if (t + i >= tokens) {
        rows[i] = v8s{};
        continue;
      }
      if (c == 0) __builtin_prefetch((const char*)x + size_t(t + i + 16) * stride * dtype_bytes(D));
      v8f y = load_row<D>(x, size_t(t + i) * stride + c, size_t(channels - c));
      y = y * by_token[t + i] * scale;
      room |= 0x45fff800 - ((v8i)y & 0x7fffffff);  // to 8191: the sign stays once one is beyond
      rows[i] = __builtin_convertvector((v8i)(y + rounder) - rounder_bits, v8s);
    }
    transpose(rows);
    for (int i = 0; i < 8 && c + i < channels; ++i) store(q + size_t(c + i) * q_stride + t, rows[i]);
  });
  int any = 0;
  for (int i = 0; i < 8; ++i) any |= room[i];
  return any >= 0;
}

template <Dtype D>
void dequantise_of(void* x, int tokens, int stride, int channels, const float* by_token,
                   const float* by_channel, const int16_t* q, int q_stride) {
  over_tiles(tokens, channels, [&](int t, int c) {
    v8s rows[8];
    const v8f scale = load<v8f>(by_channel + c);
    for (int i = 0; i < 8; ++i)
      rows[i] = c + i < channels ? load<v8s>(q + size_t(c + i) * q_stride + t) : v8s{};
    transpose(rows);
    for (int i = 0; i < 8 && t + i < tokens; ++i) {
      v8f f = __builtin_convertvector(__builtin_convertvector(rows[i], v8i), v8f);
      f = f * by_token[t + i] * scale;
      size_t at = size_t(t + i) * stride + c;
      if (c + 8 <= channels) {
        store_floats<D>(x, at, f);
      } else {
        uint32_t rest[8];
        store_floats<D>(rest, 0, f);
        __builtin_memcpy((char*)x + at * dtype_bytes(D), rest, (channels - c) * dtype_bytes(D));
      }
    }
  });
}

void read_halves(const void* x, Dtype dtype, int tokens, int stride, int channels, int16_t* upper,
                 int16_t* lower, int q_stride) {
  const bool wide = dtype == Dtype::fp32;
  over_tiles(tokens, channels, [&](int t, int c) {
    const int n = channels - c < 8 ? channels - c : 8;
    v8s high[8] = {}, low[8] = {};
    for (int i = 0; i < 8 && t + i < tokens; ++i) {
      size_t at = size_t(t + i) * stride + c;
      uint32_t row[8] = {};
      __builtin_memcpy(row, (const char*)x + at * dtype_bytes(dtype), n * dtype_bytes(dtype));
      if (wide) {
        high[i] = (v8s)__builtin_convertvector(load<v8u>(row) >> 16, v8h);
        low[i] = (v8s)__builtin_convertvector(load<v8u>(row) & 0xffffu, v8h);
      } else {
        high[i] = load<v8s>(row);
      }
    }
    transpose(high);
    transpose(low);
    for (int i = 0; i < n; ++i) {
      store(upper + size_t(c + i) * q_stride + t, high[i]);
      if (wide) store(lower + size_t(c + i) * q_stride + t, low[i]);
    }
  });
}

void write_halves(void* x, Dtype dtype, int tokens, int stride, int channels, const int16_t* upper,
                  const int16_t* lower, int q_stride) {
  const bool wide = dtype == Dtype::fp32;
  over_tiles(tokens, channels, [&](int t, int c) {
    const int n = channels - c < 8 ? channels - c : 8;
    v8s high[8] = {}, low[8] = {};
    for (int i = 0; i < n; ++i) {
      high[i] = load<v8s>(upper + size_t(c + i) * q_stride + t);
      if (wide) low[i] = load<v8s>(lower + size_t(c + i) * q_stride + t);
    }
    transpose(high);
    transpose(low);
    for (int i = 0; i < 8 && t + i < tokens; ++i) {
      uint32_t row[8];
      if (wide)
        store(row, widen((v8h)high[i]) << 16 | widen((v8h)low[i]));
      else
        store(row, high[i]);
      size_t at = size_t(t + i) * stride + c;
      __builtin_memcpy((char*)x + at * dtype_bytes(dtype), row, n * dtype_bytes(dtype));
    }
  });
}

#define KVC_BY_DTYPE(function, ...)                                     \
  (d == Dtype::bf16   ? function<Dtype::bf16>(__VA_ARGS__)              \
   : d == Dtype::fp16 ? function<Dtype::fp16>(__VA_ARGS__)              \
                      : function<Dtype::fp32>(__VA_ARGS__))

double sum_squares(const void* x, Dtype d, size_t n) {
  return KVC_BY_DTYPE(sum_squares_of, x, n);
}
bool quantise(const void* x, Dtype d, int tokens, int stride, int channels, const float* by_token,
              const float* by_channel, int even, int16_t* q, int q_stride) {
  return KVC_BY_DTYPE(quantise_of, x, tokens, stride, channels, by_token, by_channel, even, q,
                      q_stride);
}
void dequantise(void* x, Dtype d, int tokens, int stride, int channels, const float* by_token,
                const float* by_channel, const int16_t* q, int q_stride) {
  KVC_BY_DTYPE(dequantise_of, x, tokens, stride, channels, by_token, by_channel, q, q_stride);
}

ChannelSums sums(const int16_t* q, int tokens) {
  int32_t sum = q[0], magnitude = 0, steps = 0;
  for (int t = 1; t < tokens; ++t) {
    const int32_t d = q[t] - q[t - 1];
    sum += q[t];
    steps += d < 0 ? -d : d;
  }
  const int32_t twice = 2 * sum + tokens, width = 2 * tokens;
  const int32_t centre = twice >= 0 ? twice / width : -((width - 1 - twice) / width);
  for (int t = 0; t < tokens; ++t) {
    const int32_t d = q[t] - centre;
    magnitude += d < 0 ? -d : d;
  }
  return {sum, magnitude, steps, centre};
}

void residuals(const int16_t* q, int tokens, int centre, bool delta, int16_t* v) {
  if (!delta) {
    for (int t = 0; t < tokens; ++t) v[t] = int16_t(q[t] - centre);
    return;
  }
  v[0] = int16_t(q[0] - centre);
  for (int t = 1; t < tokens; ++t) v[t] = int16_t(q[t] - q[t - 1]);
}

int escapes(const int16_t* v, int tokens, int shift) {
  const int half = (1 << shift) >> 1;
  int count = 0;
  for (int t = 0; t < tokens; ++t) {
    int16_t w = int16_t(v[t] + half) >> shift;
    count += (w < -kReach) | (w > kReach);
  }
  return count;
}

void symbols(const int16_t* v, int tokens, int shift, int16_t* biased, uint8_t* out) {
  const int half = (1 << shift) >> 1;
  for (int t = 0; t < tokens; ++t) {
    int16_t b = int16_t(v[t] + half), w = b >> shift;
    biased[t] = b;
    out[t] = uint8_t((w >= -kReach && w <= kReach) ? w + kCentre : 0);
  }
}

void values(const uint8_t* symbols, int tokens, int shift, int16_t* biased) {
  for (int t = 0; t < tokens; ++t) biased[t] = int16_t((symbols[t] - kCentre) * (1 << shift));
}

void split(const int16_t* upper, int tokens, int mantissa, int16_t* exponents, uint16_t* raw) {
  const uint16_t low = uint16_t((1u << mantissa) - 1), mask = uint16_t((1u << (15 - mantissa)) - 1);
  for (int t = 0; t < tokens; ++t) {
    uint16_t u = uint16_t(upper[t]);
    exponents[t] = int16_t((u >> mantissa) & mask);
    raw[t] = uint16_t((u >> 15) << mantissa | (u & low));
  }
}

void join(const int16_t* exponents, const uint16_t* raw, int tokens, int mantissa, int16_t* upper) {
  const uint16_t low = uint16_t((1u << mantissa) - 1), mask = uint16_t((1u << (15 - mantissa)) - 1);
  for (int t = 0; t < tokens; ++t) {
    uint16_t e = uint16_t(exponents[t]) & mask;
    upper[t] = int16_t(uint16_t((raw[t] >> mantissa) << 15 | e << mantissa | (raw[t] & low)));
  }
}

// Symbol by symbol from the centre outwards, until all tokens are counted: counters in memory would
// wait for one another, since most symbols are alike.
void histogram(const uint8_t* symbols, int tokens, int16_t* counts) {
  constexpr int kMost = 255 * kVectorBytes;  // what counters of a byte hold
  const int whole = tokens / kVectorBytes * kVectorBytes;
  for (int s = 0; s < kSymbols; ++s) counts[s] = 0;
  for (int first = 0; first < whole; first += kMost) {
    const int end = whole - first < kMost ? whole : first + kMost;
    for (int i = 0, left = end - first; left; ++i) {
      const int s = i % 2 ? kCentre - (i + 1) / 2 : kCentre + i / 2;
      bytes_t found = {};
      for (int t = first; t < end; t += kVectorBytes)
        found -= (bytes_t)(load<bytes_t>(symbols + t) == bytes_t{} + uint8_t(s));
      const words_t pairs =
          ((words_t)found & kEvenBytes) + ((words_t)found >> 8 & kEvenBytes);
      uint64_t sums = 0;
      for (int k = 0; k < kVectorBytes / 8; ++k) sums += pairs[k];
      const int count = int(sums * kOnes >> 48);
      counts[s] = int16_t(counts[s] + count);
      left -= count;
    }
  }
  for (int t = whole; t < tokens; ++t) ++counts[symbols[t]];
}

int cost(const int16_t* counts, const int16_t* costs) {
  int total = 0;
  for (int s = 0; s < kSymbols; ++s) total += counts[s] * costs[s];
  return total;
}

// What the coder needs of a symbol, in one place: the table of all reciprocals is a whole cache.
struct Step {
  uint64_t reciprocal;
  uint32_t freq, start;
};
// n lanes of one group, the last lane first. Without branches: whether a word leaves is random.
KVC_INLINE void encode_lanes(RansWriter& w, const uint8_t* symbols, int n, const Step* steps) {
  uint32_t* const states = w.states;
  uint16_t* out = w.out;
  for (int lane = n - 1; lane >= 0; --lane) {
    const Step& step = steps[symbols[lane]];
    uint32_t x = states[lane];
    const bool full = (x >> 20) >= step.freq;
    out[-1] = uint16_t(x);
    out -= full;
    x = full ? x >> 16 : x;
    const uint32_t quotient = uint32_t((x * step.reciprocal) >> 44);
    states[lane] = (quotient << kProbBits) + (x - quotient * step.freq) + step.start;
  }
  w.out = out;
}

// Tokens from `first`, a multiple of the lanes, to the end; the last group first.
KVC_INLINE void encode_from(int first, RansWriter& w, const uint8_t* symbols, int tokens,
                            const Table& table) {
  if (first == tokens) return;
  Step steps[kSymbols];
  for (int s = 0; s < kSymbols; ++s)
    steps[s] = {reciprocals[table.freq[s]], table.freq[s], table.start[s]};
  int at = tokens - tokens % w.lanes;
  encode_lanes(w, symbols + at, tokens - at, steps);
  while ((at -= w.lanes) >= first) encode_lanes(w, symbols + at, w.lanes, steps);
}

// Lanes [0, n) of one group, never reading past the end.
KVC_INLINE bool decode_lanes(RansReader& r, uint8_t* symbols, int n, const Table& table) {
  int16_t slots[kMaxLanes], found[kMaxLanes];
  for (int lane = 0; lane < n; ++lane) slots[lane] = int16_t(r.states[lane] & (kProbScale - 1));
  const int16_t escape = int16_t(table.freq[kEscape]), first = int16_t(table.first);
  for (int lane = 0; lane < n; ++lane) found[lane] = slots[lane] >= escape ? first : int16_t(0);
  for (int s = table.first + 1; s <= table.last; ++s) {
    const int16_t start = int16_t(table.start[s]);
    for (int lane = 0; lane < n; ++lane) found[lane] += slots[lane] >= start;
  }
  for (int lane = 0; lane < n; ++lane) {
    const int s = found[lane];
    uint32_t x = table.freq[s] * (r.states[lane] >> kProbBits) + slots[lane] - table.start[s];
    if (x < kStateLow) {
      if (r.in >= r.end) return false;
      x = x << 16 | *r.in++;
    }
    r.states[lane] = x;
    symbols[lane] = uint8_t(s);
  }
  return true;
}
