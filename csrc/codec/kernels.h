// The loops that each instruction set has its own build of; all give the same bytes.
#pragma once
#include "format.h"

namespace kvc {

struct Table {
  uint16_t freq[kSymbols], start[kSymbols];
  int first, last;  // the outermost symbols above 0 that have a frequency
};

// ceil(2^44 / freq), by frequency: exact quotients of the coder's states.
extern uint64_t reciprocals[kProbScale];

struct ChannelSums {
  int64_t sum, magnitude, steps;  // of q; of |q - centre|; of |q[t] - q[t-1]|
  int32_t centre;
};

struct RansWriter {
  uint32_t* states;
  int lanes;
  uint16_t* out;  // grows downwards
};

struct RansReader {
  uint32_t* states;
  int lanes;
  const uint16_t *in, *end;
};

struct Kernels {
  const char* name;
  // sum of squares of n values, in eight interleaved double sums
  double (*sum_squares)(const void* x, Dtype, size_t n);
  // the bits of the largest magnitude of a row; a NaN counts as the largest
  uint32_t (*row_max)(const void* x, Dtype, size_t n);
  // q[c][t] = round(x[t][c] * inverse[t]), ties so that q + even is even; false if one is not
  // within kMaxQuantised
  bool (*quantise)(const void* x, Dtype, int tokens, int stride, int channels,
                   const float* inverse, int even, int16_t* q, int q_stride);
  // x[t][c] = q[c][t] * step[t]
  void (*dequantise)(void* x, Dtype, int tokens, int stride, int channels, const float* step,
                     const int16_t* q, int q_stride);
  // 16-bit halves, transposed: the value itself, or for fp32 its upper and lower half
  void (*read_halves)(const void* x, Dtype, int tokens, int stride, int channels, int16_t* upper,
                      int16_t* lower, int q_stride);
  void (*write_halves)(void* x, Dtype, int tokens, int stride, int channels,
                       const int16_t* upper, const int16_t* lower, int q_stride);
  ChannelSums (*sums)(const int16_t* q, int tokens);
  // v = q - centre, or for delta the differences of neighbours and q[0] - centre
  void (*residuals)(const int16_t* q, int tokens, int centre, bool delta, int16_t* v);
  // how many v have no symbol at this shift
  int (*escapes)(const int16_t* v, int tokens, int shift);
  // symbols of v + half a bin, which is also written to `biased`
  void (*symbols)(const int16_t* v, int tokens, int shift, int16_t* biased, uint8_t* symbols);
  // biased = (symbol - kCentre) << shift
  void (*values)(const uint8_t* symbols, int tokens, int shift, int16_t* biased);
  // upper halves to exponents and raw bits (sign, mantissa), and back
  void (*split)(const int16_t* upper, int tokens, int mantissa, int16_t* exponents, uint16_t* raw);
  void (*join)(const int16_t* exponents, const uint16_t* raw, int tokens, int mantissa,
               int16_t* upper);
  void (*histogram)(const uint8_t* symbols, int tokens, int16_t* counts);
  int (*cost)(const int16_t* counts, const int16_t* costs);  // sum of 32 products
  void (*encode)(RansWriter&, const uint8_t* symbols, int tokens, const Table&);
  bool (*decode)(RansReader&, uint8_t* symbols, int tokens, const Table&);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
#endif

#define KVC_KERNELS(isa)                                                                        \
  {#isa,             isa::sum_squares,  isa::row_max, isa::quantise,  isa::dequantise,            \
   isa::read_halves, isa::write_halves, isa::sums,    isa::residuals, isa::escapes,               \
   isa::symbols,     isa::values,       isa::split,   isa::join,      isa::histogram, isa::cost,  \
   isa::encode,      isa::decode}

// The best this machine can run, or the named one. Null: unknown, or not for this machine.
const Kernels* kernels_named(const char* name);
bool runs_here(const Kernels&);

}  // namespace kvc
