// Thirty-two lanes at a time: a whole table of 16-bit entries is one register, found by permutes.

KVC_INLINE __m512i widen_lower(__m512i v) {
  return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(v));
}
KVC_INLINE __m512i widen_upper(__m512i v) {
  return _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1));
}
KVC_INLINE __m512i narrow(__m512i a, __m512i b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)),
                            _mm512_cvtepi32_epi16(b), 1);
}

KVC_INLINE __m512i encode_sixteen(__m512i x, __m512i freq, __m512i start, uint16_t*& out) {
  const __mmask16 full = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(x, 20), freq);
  const int n = __builtin_popcount(uint32_t(full));
  const __m256i words = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(full, x));
  out -= n;
  _mm256_mask_storeu_epi16(out, __mmask16((1u << n) - 1), words);
  x = _mm512_mask_srli_epi32(x, full, x, 16);
  // A float quotient is off by one at most: the states are below freq * 2^20 now.
  __m512i quotient =
      _mm512_cvttps_epi32(_mm512_div_ps(_mm512_cvtepu32_ps(x), _mm512_cvtepu32_ps(freq)));
  __m512i rest = _mm512_sub_epi32(x, _mm512_mullo_epi32(quotient, freq));
  const __m512i one = _mm512_set1_epi32(1);
  const __mmask16 under = _mm512_cmplt_epi32_mask(rest, _mm512_setzero_si512());
  quotient = _mm512_mask_sub_epi32(quotient, under, quotient, one);
  rest = _mm512_mask_add_epi32(rest, under, rest, freq);
  const __mmask16 over = _mm512_cmpge_epi32_mask(rest, freq);
  quotient = _mm512_mask_add_epi32(quotient, over, quotient, one);
  rest = _mm512_mask_sub_epi32(rest, over, rest, freq);
  return _mm512_add_epi32(_mm512_slli_epi32(quotient, kProbBits), _mm512_add_epi32(rest, start));
}

void encode(RansWriter& w, const uint8_t* symbols, int tokens, const Table& table) {
  int at = w.lanes == 16 ? 0 : tokens - tokens % w.lanes;
  encode_from(at, w, symbols, tokens, table);
  const __m512i freqs = _mm512_loadu_si512(table.freq), starts = _mm512_loadu_si512(table.start);
  uint16_t* out = w.out;
  for (; at > 0; at -= 32) {
    uint32_t* states = w.states + (at - 32) % w.lanes;
    const __m512i s =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(symbols + at - 32)));
    const __m512i freq = _mm512_permutexvar_epi16(s, freqs);
    const __m512i start = _mm512_permutexvar_epi16(s, starts);
    _mm512_storeu_si512(states + 16, encode_sixteen(_mm512_loadu_si512(states + 16),
                                                    widen_upper(freq), widen_upper(start), out));
    _mm512_storeu_si512(states, encode_sixteen(_mm512_loadu_si512(states), widen_lower(freq),
                                               widen_lower(start), out));
  }
  w.out = out;
}

KVC_INLINE __m512i refill(__m512i x, const uint16_t*& in) {
  const __mmask16 empty = _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32(kStateLow));
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)in));
  in += __builtin_popcount(uint32_t(empty));
  return _mm512_mask_or_epi32(x, empty, _mm512_slli_epi32(x, 16),
                              _mm512_maskz_expand_epi32(empty, words));
}

// The largest symbol whose start is not above the slot, by five halvings.
KVC_INLINE __m512i find(__m512i slots, __m512i starts) {
  __m512i found = _mm512_setzero_si512();
  for (int step = 16; step; step >>= 1) {
    const __m512i candidate = _mm512_add_epi16(found, _mm512_set1_epi16(short(step)));
    const __mmask32 reached =
        _mm512_cmple_epu16_mask(_mm512_permutexvar_epi16(candidate, starts), slots);
    found = _mm512_mask_mov_epi16(found, reached, candidate);
  }
  return found;
}

template <int Units>
bool decode_units(RansReader& r, uint8_t* symbols, int tokens, const Table& table) {
  constexpr int kLanes = 32 * Units;
  const __m512i freqs = _mm512_loadu_si512(table.freq), starts = _mm512_loadu_si512(table.start);
  const __m512i slot_mask = _mm512_set1_epi32(kProbScale - 1);
  __m512i x[2 * Units];
  for (int i = 0; i < 2 * Units; ++i) x[i] = _mm512_loadu_si512(r.states + 16 * i);
  int at = 0;
  for (; at + kLanes <= tokens && r.end - r.in >= kLanes + 16; at += kLanes) {
    __m512i rests[Units], freq[Units];
    for (int u = 0; u < Units; ++u) {
      const __m512i slots = narrow(_mm512_and_si512(x[2 * u], slot_mask),
                                   _mm512_and_si512(x[2 * u + 1], slot_mask));
      const __m512i s = find(slots, starts);
      _mm256_storeu_si256((__m256i*)(symbols + at + 32 * u), _mm512_cvtepi16_epi8(s));
      freq[u] = _mm512_permutexvar_epi16(s, freqs);
      rests[u] = _mm512_sub_epi16(slots, _mm512_permutexvar_epi16(s, starts));
    }
    for (int u = 0; u < Units; ++u) {
      const __m512i a =
          _mm512_mullo_epi32(widen_lower(freq[u]), _mm512_srli_epi32(x[2 * u], kProbBits));
      const __m512i b =
          _mm512_mullo_epi32(widen_upper(freq[u]), _mm512_srli_epi32(x[2 * u + 1], kProbBits));
      x[2 * u] = refill(_mm512_add_epi32(a, widen_lower(rests[u])), r.in);
      x[2 * u + 1] = refill(_mm512_add_epi32(b, widen_upper(rests[u])), r.in);
    }
  }
  for (int i = 0; i < 2 * Units; ++i) _mm512_storeu_si512(r.states + 16 * i, x[i]);
  for (; at + kLanes <= tokens; at += kLanes)
    if (!decode_lanes(r, symbols + at, kLanes, table)) return false;
  return decode_lanes(r, symbols + at, tokens - at, table);
}

bool decode(RansReader& r, uint8_t* symbols, int tokens, const Table& table) {
  if (r.lanes == 64) return decode_units<2>(r, symbols, tokens, table);
  if (r.lanes == 32) return decode_units<1>(r, symbols, tokens, table);
  int at = 0;
  for (; at + 16 <= tokens; at += 16)
    if (!decode_lanes(r, symbols + at, 16, table)) return false;
  return decode_lanes(r, symbols + at, tokens - at, table);
}
