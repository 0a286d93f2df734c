#include "kernels.h"

namespace kvc {
namespace portable {
#include "loops.inl"

void encode(RansWriter& w, const uint8_t* symbols, int tokens, const Table& table) {
  int at = tokens - tokens % w.lanes;
  encode_lanes(w, symbols + at, tokens - at, table);
  while ((at -= w.lanes) >= 0) encode_lanes(w, symbols + at, w.lanes, table);
}

bool decode(RansReader& r, uint8_t* symbols, int tokens, const Table& table) {
  int at = 0;
  for (; at + r.lanes <= tokens; at += r.lanes)
    if (!decode_lanes(r, symbols + at, r.lanes, table)) return false;
  return decode_lanes(r, symbols + at, tokens - at, table);
}

}  // namespace portable

const Kernels kPortable = KVC_KERNELS(portable);

}  // namespace kvc
