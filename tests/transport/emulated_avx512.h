// AVX-512 intrinsics for machines without them: SIMDe's, and what its version 0.7.4 lacks.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// Lane by lane: r[i] = expression of the arrays a, b, ... of their element types.
template <class R, class To, int N, class Lane>
static inline R emulated_lanes(Lane lane) {
  To out[N] = {};
  for (int i = 0; i < N; ++i) out[i] = To(lane(i));
  R r;
  static_assert(sizeof r == sizeof out, "all lanes of a register");
  __builtin_memcpy(&r, out, sizeof out);
  return r;
}
template <class From, int N, class V>
struct EmulatedArray {
  From at[N];
  explicit EmulatedArray(V v) { __builtin_memcpy(at, &v, sizeof at); }
  From operator[](int i) const { return at[i]; }
};

static inline __m512i emulated_cvtepu16_epi32(__m256i v) {
  EmulatedArray<uint16_t, 16, __m256i> a(v);
  return emulated_lanes<__m512i, uint32_t, 16>([&](int i) { return a[i]; });
}
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(a) emulated_cvtepu16_epi32(a)

static inline __m256i emulated_cvtepi32_epi16(__m512i v) {
  EmulatedArray<uint32_t, 16, __m512i> a(v);
  return emulated_lanes<__m256i, uint16_t, 16>([&](int i) { return a[i]; });
}
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16(a) emulated_cvtepi32_epi16(a)

static inline __m512i emulated_cvttps_epi32(__m512 v) {
  EmulatedArray<float, 16, __m512> a(v);
  return emulated_lanes<__m512i, int32_t, 16>([&](int i) { return a[i]; });
}
#undef _mm512_cvttps_epi32
#define _mm512_cvttps_epi32(a) emulated_cvttps_epi32(a)

static inline __m512 emulated_cvtepu32_ps(__m512i v) {
  EmulatedArray<uint32_t, 16, __m512i> a(v);
  return emulated_lanes<__m512, float, 16>([&](int i) { return a[i]; });
}
#undef _mm512_cvtepu32_ps
#define _mm512_cvtepu32_ps(a) emulated_cvtepu32_ps(a)

static inline __m512i emulated_cvtepu8_epi16(__m256i v) {
  EmulatedArray<uint8_t, 32, __m256i> a(v);
  return emulated_lanes<__m512i, uint16_t, 32>([&](int i) { return a[i]; });
}
#undef _mm512_cvtepu8_epi16
#define _mm512_cvtepu8_epi16(a) emulated_cvtepu8_epi16(a)

static inline __mmask16 emulated_cmplt_epi32_mask(__m512i v, __m512i w) {
  EmulatedArray<int32_t, 16, __m512i> a(v), b(w);
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask |= __mmask16((a[i] < b[i]) << i);
  return mask;
}
#undef _mm512_cmplt_epi32_mask
#define _mm512_cmplt_epi32_mask(a, b) emulated_cmplt_epi32_mask(a, b)

static inline __mmask16 emulated_cmplt_epu32_mask(__m512i v, __m512i w) {
  EmulatedArray<uint32_t, 16, __m512i> a(v), b(w);
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask |= __mmask16((a[i] < b[i]) << i);
  return mask;
}
#undef _mm512_cmplt_epu32_mask
#define _mm512_cmplt_epu32_mask(a, b) emulated_cmplt_epu32_mask(a, b)

static inline __m512i emulated_mask_srli_epi32(__m512i v, __mmask16 mask, __m512i w, int n) {
  EmulatedArray<uint32_t, 16, __m512i> a(v), b(w);
  return emulated_lanes<__m512i, uint32_t, 16>(
      [&](int i) { return mask >> i & 1 ? b[i] >> n : a[i]; });
}
#undef _mm512_mask_srli_epi32
#define _mm512_mask_srli_epi32(v, mask, w, n) emulated_mask_srli_epi32(v, mask, w, n)

static inline __m512i emulated_maskz_expand_epi32(__mmask16 mask, __m512i v) {
  EmulatedArray<uint32_t, 16, __m512i> a(v);
  int next = 0;
  return emulated_lanes<__m512i, uint32_t, 16>(
      [&](int i) { return mask >> i & 1 ? a[next++] : 0u; });
}
#undef _mm512_maskz_expand_epi32
#define _mm512_maskz_expand_epi32(mask, v) emulated_maskz_expand_epi32(mask, v)

static inline void emulated_mask_storeu_epi16(void* p, __mmask16 mask, __m256i v) {
  EmulatedArray<uint16_t, 16, __m256i> a(v);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) __builtin_memcpy((char*)p + 2 * i, &a.at[i], 2);
}
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16(p, mask, v) emulated_mask_storeu_epi16(p, mask, v)
