#include "kernels.h"

#define KVC_VECTOR_BYTES 16

namespace kvc {
namespace portable {
#include "loops.inl"

void encode(RansWriter& w, const uint8_t* symbols, int tokens, const Table& table) {
  encode_from(0, w, symbols, tokens, table);
}

bool decode(RansReader& r, uint8_t* symbols, int tokens, const Table& table) {
  uint8_t owners[kProbScale + sizeof(bytes_t)];  // the symbol of each slot; stores overshoot
  for (int s = 0; s < kSymbols; ++s)
    for (int slot = table.start[s]; slot < table.start[s] + table.freq[s]; slot += sizeof(bytes_t))
      store(owners + slot, bytes_t{} + uint8_t(s));
  int at = 0;
  for (; at + r.lanes <= tokens && r.end - r.in >= r.lanes; at += r.lanes) {
    uint32_t* const states = r.states;
    const uint16_t* in = r.in;
    for (int lane = 0; lane < r.lanes; ++lane) {
      const uint32_t slot = states[lane] & (kProbScale - 1);
      const uint8_t s = owners[slot];
      const uint32_t x = table.freq[s] * (states[lane] >> kProbBits) + slot - table.start[s];
      const uint32_t empty = x < kStateLow;  // no branch: it would be mispredicted
      states[lane] = x << 16 * empty | (*in & (0 - empty));
      in += empty;
      symbols[at + lane] = s;
    }
    r.in = in;
  }
  for (; at + r.lanes <= tokens; at += r.lanes)
    if (!decode_lanes(r, symbols + at, r.lanes, table)) return false;
  return decode_lanes(r, symbols + at, tokens - at, table);
}

}  // namespace portable

const Kernels kPortable = KVC_KERNELS(portable);

}  // namespace kvc
