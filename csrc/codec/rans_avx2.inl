// Sixteen lanes at a time: 16-bit slots and table values in one register, states in two.

// For each mask of 8 lanes: `expand` puts the next words where the mask is set,
// `compress` puts the masked words at the upper end, in order.
struct Shuffles {
  alignas(16) uint8_t expand[256][16], compress[256][16];
  constexpr Shuffles() : expand(), compress() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const bool set = mask >> lane & 1;
        expand[mask][2 * lane] = set ? 2 * next : 0x80;
        expand[mask][2 * lane + 1] = set ? 2 * next + 1 : 0x80;
        next += set;
      }
      int at = 8;
      for (int lane = 7; lane >= 0; --lane)
        if (mask >> lane & 1) {
          --at;
          compress[mask][2 * at] = 2 * lane;
          compress[mask][2 * at + 1] = 2 * lane + 1;
        }
      while (--at >= 0) compress[mask][2 * at] = compress[mask][2 * at + 1] = 0x80;
    }
  }
};
constexpr Shuffles kShuffles;

// 32 entries of 16 bits, as bytes, looked up by 16 symbols at once.
struct Lookup {
  __m128i low[2], high[2];

  KVC_INLINE Lookup of(const uint16_t* entries) {
    Lookup l;
    const __m128i byte = _mm_set1_epi16(0xff);
    for (int i = 0; i < 2; ++i) {
      __m128i a = _mm_loadu_si128((const __m128i*)(entries + 16 * i));
      __m128i b = _mm_loadu_si128((const __m128i*)(entries + 16 * i + 8));
      l.low[i] = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
      l.high[i] = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
    }
    return l;
  }

  __attribute__((always_inline)) __m256i operator()(__m128i symbols) const {
    const __m128i upper = _mm_slli_epi16(symbols, 3);  // bit 4 to the sign
    const __m128i a = _mm_blendv_epi8(_mm_shuffle_epi8(low[0], symbols),
                                      _mm_shuffle_epi8(low[1], symbols), upper);
    const __m128i b = _mm_blendv_epi8(_mm_shuffle_epi8(high[0], symbols),
                                      _mm_shuffle_epi8(high[1], symbols), upper);
    return _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
  }
};

KVC_INLINE __m256i widen_lower(__m256i v) { return _mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)); }
KVC_INLINE __m256i widen_upper(__m256i v) {
  return _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1));
}
// Low 16 bits of two times eight 32-bit numbers, in order.
KVC_INLINE __m256i narrow(__m256i a, __m256i b) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
}

KVC_INLINE __m256i encode_eight(__m256i x, __m256i freq, __m256i start, uint16_t*& out) {
  const __m256i one = _mm256_set1_epi32(1);
  const __m256i full =
      _mm256_cmpgt_epi32(_mm256_srli_epi32(x, 20), _mm256_sub_epi32(freq, one));
  const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(full));
  const __m256i words = narrow(_mm256_and_si256(x, _mm256_set1_epi32(0xffff)), x);
  const __m128i packed = _mm_shuffle_epi8(_mm256_castsi256_si128(words),
                                          _mm_load_si128((const __m128i*)kShuffles.compress[mask]));
  _mm_storeu_si128((__m128i*)(out - 8), packed);
  out -= __builtin_popcount(mask);
  x = _mm256_blendv_epi8(x, _mm256_srli_epi32(x, 16), full);
  // A float quotient is off by one at most: the states are below freq * 2^20 now.
  const __m256 halved = _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 1));
  const __m256 ratio = _mm256_div_ps(halved, _mm256_cvtepi32_ps(freq));
  __m256i quotient = _mm256_cvttps_epi32(_mm256_add_ps(ratio, ratio));
  __m256i rest = _mm256_sub_epi32(x, _mm256_mullo_epi32(quotient, freq));
  const __m256i under = _mm256_srai_epi32(rest, 31);
  quotient = _mm256_add_epi32(quotient, under);
  rest = _mm256_add_epi32(rest, _mm256_and_si256(under, freq));
  const __m256i over = _mm256_cmpgt_epi32(rest, _mm256_sub_epi32(freq, one));
  quotient = _mm256_sub_epi32(quotient, over);
  rest = _mm256_sub_epi32(rest, _mm256_and_si256(over, freq));
  return _mm256_add_epi32(_mm256_slli_epi32(quotient, kProbBits), _mm256_add_epi32(rest, start));
}

void encode(RansWriter& w, const uint8_t* symbols, int tokens, const Table& table) {
  const Lookup freqs = Lookup::of(table.freq), starts = Lookup::of(table.start);
  int at = tokens - tokens % w.lanes;
  encode_from(at, w, symbols, tokens, table);
  uint16_t* out = w.out;
  for (; at > 0; at -= 16) {
    uint32_t* states = w.states + (at - 16) % w.lanes;
    const __m128i s = _mm_loadu_si128((const __m128i*)(symbols + at - 16));
    const __m256i freq = freqs(s), start = starts(s);
    __m256i* x = (__m256i*)states;
    _mm256_storeu_si256(x + 1, encode_eight(_mm256_loadu_si256(x + 1), widen_upper(freq),
                                            widen_upper(start), out));
    _mm256_storeu_si256(x, encode_eight(_mm256_loadu_si256(x), widen_lower(freq),
                                        widen_lower(start), out));
  }
  w.out = out;
}

KVC_INLINE __m256i refill(__m256i x, const uint16_t*& in) {
  const __m256i empty = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256());
  const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(empty));
  const __m128i words =
      _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)in),
                       _mm_load_si128((const __m128i*)kShuffles.expand[mask]));
  in += __builtin_popcount(mask);
  const __m256i filled = _mm256_or_si256(_mm256_slli_epi32(x, 16), _mm256_cvtepu16_epi32(words));
  return _mm256_blendv_epi8(x, filled, empty);
}

template <int Units>
bool decode_units(RansReader& r, uint8_t* symbols, int tokens, const Table& table) {
  constexpr int kLanes = 16 * Units;
  const Lookup freqs = Lookup::of(table.freq), starts = Lookup::of(table.start);
  const __m256i slot_mask = _mm256_set1_epi32(kProbScale - 1);
  const __m256i escape = _mm256_set1_epi16(short(table.freq[kEscape] - 1));
  const __m256i first = _mm256_set1_epi16(short(table.first));
  __m256i x[2 * Units];
  for (int i = 0; i < 2 * Units; ++i) x[i] = _mm256_loadu_si256((const __m256i*)r.states + i);
  int at = 0;
  for (; at + kLanes <= tokens && r.end - r.in >= kLanes + 8; at += kLanes) {
    __m256i slots[Units], found[Units];
    for (int u = 0; u < Units; ++u) {
      slots[u] = narrow(_mm256_and_si256(x[2 * u], slot_mask),
                        _mm256_and_si256(x[2 * u + 1], slot_mask));
      found[u] = _mm256_and_si256(_mm256_cmpgt_epi16(slots[u], escape), first);
    }
    for (int s = table.first + 1; s <= table.last; ++s) {
      const __m256i below = _mm256_set1_epi16(short(table.start[s] - 1));
      for (int u = 0; u < Units; ++u)
        found[u] = _mm256_sub_epi16(found[u], _mm256_cmpgt_epi16(slots[u], below));
    }
    for (int u = 0; u < Units; ++u) {
      const __m128i s = _mm_packus_epi16(_mm256_castsi256_si128(found[u]),
                                         _mm256_extracti128_si256(found[u], 1));
      _mm_storeu_si128((__m128i*)(symbols + at + 16 * u), s);
      const __m256i freq = freqs(s), rest = _mm256_sub_epi16(slots[u], starts(s));
      const __m256i a = _mm256_mullo_epi32(widen_lower(freq), _mm256_srli_epi32(x[2 * u], kProbBits));
      const __m256i b =
          _mm256_mullo_epi32(widen_upper(freq), _mm256_srli_epi32(x[2 * u + 1], kProbBits));
      x[2 * u] = refill(_mm256_add_epi32(a, widen_lower(rest)), r.in);
      x[2 * u + 1] = refill(_mm256_add_epi32(b, widen_upper(rest)), r.in);
    }
  }
  for (int i = 0; i < 2 * Units; ++i) _mm256_storeu_si256((__m256i*)r.states + i, x[i]);
  for (; at + kLanes <= tokens; at += kLanes)
    if (!decode_lanes(r, symbols + at, kLanes, table)) return false;
  return decode_lanes(r, symbols + at, tokens - at, table);
}

bool decode(RansReader& r, uint8_t* symbols, int tokens, const Table& table) {
  return r.lanes == 64   ? decode_units<4>(r, symbols, tokens, table)
         : r.lanes == 32 ? decode_units<2>(r, symbols, tokens, table)
                         : decode_units<1>(r, symbols, tokens, table);
}
