#include <algorithm>
#include <cstring>

#include "section.h"

namespace kvc {

namespace {

constexpr int kBlock = 32;

// Takes parts off the front of a buffer; null when too little is left.
struct Cursor {
  const uint8_t *at, *end;

  const uint8_t* take(size_t size) {
    if (size_t(end - at) < size) return nullptr;
    const uint8_t* part = at;
    at += size;
    return part;
  }
};

void unpack(const uint8_t* in, int bits, int tokens, uint16_t* values) {
  if (bits == 8) {
    for (int t = 0; t < tokens; ++t) values[t] = in[t];
    return;
  }
  if (bits == 16) {
    std::memcpy(values, in, size_t(tokens) * 2);
    return;
  }
  const uint32_t mask = (1u << bits) - 1;
  uint64_t pending = 0;
  int have = 0;
  for (int t = 0; t < tokens; ++t) {
    for (; have < bits; have += 8) pending |= uint64_t(*in++) << have;
    values[t] = uint16_t(pending & mask);
    pending >>= bits;
    have -= bits;
  }
}

bool read_own_table(Cursor& own, Table& table) {
  uint16_t freq[kSymbols] = {};
  uint32_t present;
  const uint8_t* head = own.take(4);
  if (!head) return false;
  std::memcpy(&present, head, 4);
  for (int s = 0; s < kSymbols; ++s)
    if (present >> s & 1) {
      const uint8_t* entry = own.take(2);
      if (!entry) return false;
      std::memcpy(&freq[s], entry, 2);
    }
  if (!valid_frequencies(freq)) return false;
  fill_table(freq, table);
  return true;
}

// 16-bit arithmetic that wraps, so that bytes of no encoder's are still harmless.
int16_t wrap(int v) { return int16_t(uint16_t(unsigned(v))); }

void undo_residuals(int16_t* v, int tokens, Channel record) {
  if (!record.delta()) {
    for (int t = 0; t < tokens; ++t) v[t] = wrap(v[t] + record.centre);
    return;
  }
  const int half = (1 << record.shift()) >> 1;
  v[0] = wrap(v[0] + record.centre);
  for (int t = 1; t < tokens; ++t) v[t] = wrap(v[t - 1] + v[t] - half);
}

}  // namespace

const char* Decoder::decode(const uint8_t* data, size_t size, Shape s, ProfileSection profile,
                            const Channel* channels, void* x) {
  Cursor all{data, data + size};
  SectionHeader header;
  const uint8_t* head = all.take(sizeof header);
  if (!head) return "section cut short";
  std::memcpy(&header, head, sizeof header);
  const bool lossless = Quantiser(header.quantiser) == Quantiser::lossless;
  if (header.quantiser > uint8_t(Quantiser::lossless)) return "unknown quantiser";
  if (header.reserved) return "reserved bits set";
  if (header.lanes != lanes_for(size_t(s.tokens) * s.channels)) return "wrong number of lanes";
  uint32_t states[kMaxLanes];
  const uint8_t* state_bytes = all.take(header.lanes * 4u);
  const uint8_t* word_bytes = all.take(size_t(header.words) * 2);
  const uint8_t* escape_bytes = all.take(size_t(header.escapes) * 2);
  const uint8_t* raw_part = all.take(header.raw_bytes);
  if (!state_bytes || !word_bytes || !escape_bytes || !raw_part) return "section cut short";
  std::memcpy(states, state_bytes, header.lanes * 4u);
  if (uintptr_t(word_bytes) & 1) {
    words_.resize(header.words);
    std::memcpy(words_.data(), word_bytes, size_t(header.words) * 2);
    word_bytes = (const uint8_t*)words_.data();
  }
  RansReader rans{states, header.lanes, (const uint16_t*)word_bytes,
                  (const uint16_t*)word_bytes + header.words};
  Cursor escapes{escape_bytes, raw_part}, raw{raw_part, raw_part + header.raw_bytes};

  const int row = (s.tokens + 31) & ~31, mantissa = mantissa_bits(s.dtype);
  const int book = lossless;
  int own_tables = 0;
  q_.assign(size_t(kBlock) * row, 0);
  lower_.resize(size_t(kBlock) * row);
  biased_.resize(row);
  raw_.resize(row);
  symbols_.resize(row);

  // The scales stand last, after tables whose number is known only at the end: find them first.
  Cursor own = all;
  for (int i = 0; i < header.own_tables; ++i) {
    const uint8_t* bitmap = all.take(4);
    if (!bitmap) return "section cut short";
    uint32_t present;
    std::memcpy(&present, bitmap, 4);
    if (!all.take(2 * size_t(__builtin_popcount(present)))) return "section cut short";
  }
  own.end = all.at;
  step_.assign(row, header.step);
  if (Quantiser(header.quantiser) == Quantiser::per_token) {
    const size_t width = dtype_bytes(s.dtype);
    const uint8_t* scales = all.take(s.tokens * width);
    if (!scales) return "section cut short";
    if (!header.half || header.half > kReach) return "impossible number of bins";
    for (int t = 0; t < s.tokens; ++t) {
      uint32_t bits = 0;
      std::memcpy(&bits, scales + t * width, width);
      step_[t] = as_float(bits, s.dtype) / header.half;
    }
  }
  if (all.end - all.at >= 8) return "bytes left over";

  for (int first = 0; first < s.channels; first += kBlock) {
    const int count = std::min(kBlock, s.channels - first);
    for (int i = 0; i < count; ++i) {
      const int c = first + i;
      Channel record = channels[c];
      Table stored;
      const Table* table = &stored;
      if (record.table == kFromProfile) {
        if (!profile.freq) return "no profile given";
        record = profile.channels[c];
        fill_table(profile.freq + size_t(c) * kSymbols, stored);
      } else if (record.table == kOwnTable) {
        ++own_tables;
        if (!read_own_table(own, stored)) return "bad table";
      } else {
        table = &book_.tables[book][record.table].table;
        if (!table->freq[kEscape]) return "no such table";
      }
      const int shift = record.shift();
      if (shift > kMaxShift || (lossless && (shift || record.delta()))) return "bad channel record";
      if (!k_.decode(rans, symbols_.data(), s.tokens, *table)) return "coded words cut short";

      int16_t* v = lossless ? biased_.data() : &q_[size_t(i) * row];
      k_.values(symbols_.data(), s.tokens, shift, v);
      if (shift) {
        const uint8_t* bits = raw.take(raw_bytes(shift, s.tokens));
        if (!bits) return "raw bits cut short";
        unpack(bits, shift, s.tokens, raw_.data());
        for (int t = 0; t < s.tokens; ++t) v[t] = int16_t(v[t] | raw_[t]);
      }
      if (std::memchr(symbols_.data(), kEscape, size_t(s.tokens))) {
        for (int t = 0; t < s.tokens; ++t)
          if (symbols_[t] == kEscape) {
            const uint8_t* value = escapes.take(2);
            if (!value) return "escapes cut short";
            std::memcpy(&v[t], value, 2);
          }
      }
      undo_residuals(v, s.tokens, record);
      if (lossless) {
        const uint8_t* bits = raw.take(raw_bytes(mantissa + 1, s.tokens));
        if (!bits) return "raw bits cut short";
        unpack(bits, mantissa + 1, s.tokens, raw_.data());
        k_.join(v, raw_.data(), s.tokens, mantissa, &q_[size_t(i) * row]);
        if (s.dtype == Dtype::fp32) {
          const uint8_t* low = raw.take(size_t(s.tokens) * 2);
          if (!low) return "raw bits cut short";
          std::memcpy(&lower_[size_t(i) * row], low, size_t(s.tokens) * 2);
        }
      }
    }
    void* corner = (char*)x + first * dtype_bytes(s.dtype);
    if (lossless)
      k_.write_halves(corner, s.dtype, s.tokens, s.channels, count, q_.data(), lower_.data(), row);
    else
      k_.dequantise(corner, s.dtype, s.tokens, s.channels, count, step_.data(), q_.data(), row);
  }
  if (rans.in != rans.end || escapes.at != escapes.end || raw.at != raw.end ||
      own_tables != header.own_tables)
    return "bytes left over";
  for (int lane = 0; lane < header.lanes; ++lane)
    if (states[lane] != kStateLow) return "coder did not end where it began";
  return nullptr;
}

}  // namespace kvc
