// Sections to values. The coder runs from channel to channel, so a warp takes a section; a second
// kernel turns channels into tokens.
#include "codec/warp.cuh"

namespace kvc {
namespace {

constexpr int kTile = 32, kTileThreads = 256;

// What the second kernel has to know of a section.
struct Section {
  Quantiser quantiser;
  int heads;
  uint64_t raw;  // where its raw bits begin
};

// A call and where its intermediate results lie.
struct Job : kvc_decoding {
  int16_t* q;         // [S, C, T]
  float* scales;      // [S, max(C, T)]: a step per head, or a scale per token
  Section* found;     // [S]

  __host__ __device__ size_t scales_of(int section) const {
    return size_t(section) * (channels > tokens ? channels : tokens);
  }
};

size_t lay_out(Job& j) {
  Carver carver{static_cast<char*>(j.scratch), 0};
  carver.take(j.q, size_t(j.sections) * j.channels * j.tokens);
  carver.take(j.scales, j.scales_of(j.sections));
  carver.take(j.found, j.sections);
  return carver.at;
}

struct Parts {
  SectionHeader header;
  const uint8_t *states, *words, *escapes, *raw, *own, *scales;
};

__device__ uint16_t load16(const uint8_t* p) { return uint16_t(p[0] | p[1] << 8); }
__device__ uint32_t load32(const uint8_t* p) { return load16(p) | uint32_t(load16(p + 2)) << 16; }

// `width` bits from bit `at` on; never reads a byte that has none of them.
__device__ uint32_t read_bits(const uint8_t* in, uint32_t at, int width) {
  uint32_t bits = 0;
  const int skip = at & 7;
  for (int have = 0; have < skip + width; have += 8) bits |= uint32_t(in[(at + have) >> 3]) << have;
  return bits >> skip & ((1u << width) - 1);
}

// False: these bytes are no section of this shape.
__device__ bool find_parts(const Job& j, const uint8_t* at, const uint8_t* end, Parts& p) {
  const auto take = [&](const uint8_t*& part, uint64_t size) {
    part = at;
    if (uint64_t(end - at) < size) return false;
    at += size;
    return true;
  };
  const uint8_t* head;
  if (!take(head, sizeof p.header)) return false;
  memcpy(&p.header, head, sizeof p.header);
  const SectionHeader& h = p.header;
  if (h.quantiser > uint8_t(Quantiser::lossless) || h.reserved ||
      h.lanes != lanes_for(size_t(j.tokens) * j.channels))
    return false;
  if (!take(p.states, h.lanes * 4u) || !take(p.words, uint64_t(h.words) * 2) ||
      !take(p.escapes, uint64_t(h.escapes) * 2) || !take(p.raw, h.raw_bytes))
    return false;
  p.own = at;
  for (int i = 0; i < h.own_tables; ++i) {
    const uint8_t *bitmap, *entries;
    if (!take(bitmap, 4) || !take(entries, 2 * __popc(load32(bitmap)))) return false;
  }
  if (Quantiser(h.quantiser) == Quantiser::fixed_step) {
    if (!h.divisor || j.channels % h.divisor || !take(p.scales, h.divisor * 4u)) return false;
  } else if (Quantiser(h.quantiser) == Quantiser::per_token) {
    if (!h.divisor || h.divisor > kReach) return false;
    if (!take(p.scales, j.tokens * dtype_bytes(Dtype(j.dtype)))) return false;
  }
  return end - at < 8;
}

__device__ void read_scales(const Job& j, const Parts& p, float* scales) {
  const Quantiser quantiser = Quantiser(p.header.quantiser);
  if (quantiser == Quantiser::fixed_step)
    for (int head = threadIdx.x; head < p.header.divisor; head += kWarp)
      scales[head] = __uint_as_float(load32(p.scales + 4 * head));
  if (quantiser == Quantiser::per_token)
    for (int t = threadIdx.x; t < j.tokens; t += kWarp) {
      const uint32_t bits = Dtype(j.dtype) == Dtype::fp32 ? load32(p.scales + 4 * t)
                                                          : load16(p.scales + 2 * t);
      scales[t] = as_float(bits, Dtype(j.dtype)) / p.header.divisor;
    }
}

// A section's way through its parts, the same in all threads.
struct Reader {
  const Job& j;
  const Parts& p;
  uint32_t states[kMaxLanes / kWarp];
  uint32_t word = 0, escape = 0, raw = 0;
  const uint8_t* own;
  int own_tables = 0;

  __device__ Reader(const Job& j, const Parts& p) : j(j), p(p), own(p.own) {
    const Lanes lanes(p.header.lanes);
    for (int u = 0; u < 2; ++u)
      states[u] = u < lanes.units && lanes.has()
                      ? load32(p.states + 4 * (u * lanes.width + threadIdx.x))
                      : kStateLow;
  }

  // This thread's frequency in the channel's table; false if there is no such table.
  __device__ bool frequency(int section, int channel, Channel& record, uint32_t& freq) {
    const bool lossless = Quantiser(p.header.quantiser) == Quantiser::lossless;
    const size_t row = size_t(section) * j.channels + channel;
    if (record.table == kFromProfile) {
      if (!j.profile_frequencies) return false;
      record = reinterpret_cast<const Channel*>(j.profile_channels)[row];
      freq = j.profile_frequencies[row * kSymbols + threadIdx.x];
    } else if (record.table == kOwnTable) {
      if (own_tables++ == p.header.own_tables) return false;
      const uint32_t present = load32(own);
      const bool has = present >> threadIdx.x & 1;
      freq = has ? load16(own + 4 + 2 * __popc(present & below())) : 0;
      own += 4 + 2 * __popc(present);
    } else {
      const auto& tables = *static_cast<const DeviceTables*>(j.tables);
      freq = tables.book.tables[lossless][record.table].table.freq[threadIdx.x];
    }
    const bool escapes = __ballot_sync(kAll, freq > 0) & 1;
    const bool in_range = __ballot_sync(kAll, freq < kProbScale) == kAll;
    const bool adds_up = __reduce_add_sync(kAll, freq) == kProbScale;
    const int shift = record.shift();
    return escapes && in_range && adds_up && shift <= kMaxShift &&
           !(lossless && (shift || record.delta()));
  }

  // One channel's integers, or false.
  __device__ bool channel(const SharedTable& table, Channel record, int16_t* q) {
    const Lanes lanes(p.header.lanes);
    const bool lossless = Quantiser(p.header.quantiser) == Quantiser::lossless;
    const Dtype dtype = Dtype(j.dtype);
    const int shift = record.shift(), half = (1 << shift) >> 1;
    const uint64_t raw_size =
        lossless ? raw_bytes(mantissa_bits(dtype) + 1, j.tokens) +
                       (dtype == Dtype::fp32 ? 2 * size_t(j.tokens) : 0)
                 : raw_bytes(shift, j.tokens);
    if (p.header.raw_bytes - raw < raw_size) return false;
    int before = record.centre + (record.delta() ? half : 0);  // the first token has no half a bin
    for (int group = 0; group < j.tokens; group += p.header.lanes)
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        if (u >= lanes.units || group + u * lanes.width >= j.tokens) break;
        const int t = lanes.token(group, u);
        const bool real = lanes.has() && t < j.tokens;
        uint32_t state = states[u];
        const uint32_t slot = state & (kProbScale - 1);
        const int symbol = table.find(slot);
        state = table.freq[symbol] * (state >> kProbBits) + slot - table.start[symbol];
        const unsigned empty = __ballot_sync(kAll, real && state < kStateLow);
        if (p.header.words - word < unsigned(__popc(empty))) return false;
        if (empty >> threadIdx.x & 1)
          state = state << 16 | load16(p.words + 2 * size_t(word + __popc(empty & below())));
        word += __popc(empty);
        if (real) states[u] = state;

        int v = (symbol - kCentre) * (1 << shift);
        if (shift && real) v |= read_bits(p.raw + raw, t * shift, shift);
        const unsigned escaped = __ballot_sync(kAll, real && symbol == kEscape);
        if (p.header.escapes - escape < unsigned(__popc(escaped))) return false;
        if (escaped >> threadIdx.x & 1)
          v = int16_t(load16(p.escapes + 2 * size_t(escape + __popc(escaped & below()))));
        escape += __popc(escaped);
        if (record.delta()) {
          v = before + running_sum(real ? v - half : 0);
          before = __shfl_sync(kAll, v, lanes.width - 1);
        } else {
          v += record.centre;
        }
        if (real) q[t] = int16_t(v);
      }
    raw += uint32_t(raw_size);
    return true;
  }

  __device__ bool used_up() const {
    const bool home = states[0] == kStateLow && states[1] == kStateLow;
    return __ballot_sync(kAll, home) == kAll && word == p.header.words &&
           escape == p.header.escapes && raw == p.header.raw_bytes &&
           own_tables == p.header.own_tables;
  }
};

__device__ bool read_section(const Job& j, int section, SharedTable& table) {
  const uint64_t begin = section ? j.ends[section - 1] : 0, end = j.ends[section];
  Parts parts;
  if (begin % 8 || begin > end || end > j.bytes ||
      !find_parts(j, j.data + begin, j.data + end, parts))
    return false;
  if (threadIdx.x == 0)
    j.found[section] = {Quantiser(parts.header.quantiser), parts.header.divisor,
                        uint64_t(parts.raw - j.data)};
  read_scales(j, parts, j.scales + j.scales_of(section));
  Reader reader(j, parts);
  for (int c = 0; c < j.channels; ++c) {
    const size_t row = size_t(section) * j.channels + c;
    Channel record = reinterpret_cast<const Channel*>(j.records)[row];
    uint32_t freq;
    if (!reader.frequency(section, c, record, freq)) return false;
    table.fill(freq);
    if (!reader.channel(table, record, j.q + row * j.tokens)) return false;
  }
  return reader.used_up();
}

__global__ void __launch_bounds__(kWarp) read_sections(Job j) {
  __shared__ SharedTable table;
  const bool sound = read_section(j, blockIdx.x, table);
  if (threadIdx.x == 0) j.faults[blockIdx.x] = !sound;
}

// To nearest, ties to even; fp16 saturates.
__device__ uint32_t to_bits(float value, Dtype d) {
  const uint32_t u = __float_as_uint(value);
  if (d == Dtype::bf16) return (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  if (d == Dtype::fp32) return u;
  const uint32_t magnitude = min(u & 0x7fffffffu, 0x477fe000u);  // 65504
  return float_to_half(__uint_as_float((u & 0x80000000u) | magnitude));
}

__device__ uint32_t value_of(const Job& j, int section, int c, int t) {
  const Section& found = j.found[section];
  const int q = j.q[(size_t(section) * j.channels + c) * j.tokens + t];
  const float* scales = j.scales + j.scales_of(section);
  const Dtype dtype = Dtype(j.dtype);
  if (found.quantiser == Quantiser::fixed_step)
    return to_bits(float(q) * scales[c / (j.channels / found.heads)], dtype);
  if (found.quantiser == Quantiser::per_token) return to_bits(float(q) * scales[t], dtype);
  const int mantissa = mantissa_bits(dtype);
  const size_t plane = raw_bytes(mantissa + 1, j.tokens);
  const bool wide = dtype == Dtype::fp32;
  const uint8_t* raw = j.data + found.raw + c * (plane + (wide ? 2 * size_t(j.tokens) : 0));
  const uint32_t kept = read_bits(raw, t * (mantissa + 1), mantissa + 1);
  const uint32_t exponent = q & ((1 << (15 - mantissa)) - 1);
  const uint32_t upper =
      kept >> mantissa << 15 | exponent << mantissa | (kept & ((1u << mantissa) - 1));
  return wide ? upper << 16 | load16(raw + plane + 2 * t) : upper;
}

__global__ void __launch_bounds__(kTileThreads) place_values(Job j) {
  __shared__ uint32_t tile[kTile][kTile + 1];
  const int across = (j.channels + kTile - 1) / kTile;
  const int section = blockIdx.x / across;
  const int channel = blockIdx.x % across * kTile, token = blockIdx.y * kTile;
  const int x = threadIdx.x % kTile;
  if (j.faults[section]) return;
  for (int y = threadIdx.x / kTile; y < kTile; y += kTileThreads / kTile)
    if (channel + y < j.channels && token + x < j.tokens)
      tile[y][x] = value_of(j, section, channel + y, token + x);
  __syncthreads();
  for (int y = threadIdx.x / kTile; y < kTile; y += kTileThreads / kTile)
    if (channel + x < j.channels && token + y < j.tokens)
      store_bits(j.values, (size_t(section) * j.tokens + token + y) * j.channels + channel + x,
                 Dtype(j.dtype), tile[x][y]);
}

}  // namespace
}  // namespace kvc

using namespace kvc;

extern "C" size_t kvc_decoding_scratch(const kvc_decoding* arguments) {
  Job job{*arguments};
  return lay_out(job);
}

extern "C" int kvc_decode(const kvc_decoding* arguments, void* stream) {
  Job job{*arguments};
  const auto misplaced = [](const void* p, int to) { return reinterpret_cast<uintptr_t>(p) % to; };
  if (!takes(job.sections, job.tokens, job.channels, job.dtype) || misplaced(job.data, 8) ||
      misplaced(job.scratch, 16) || !job.profile_frequencies != !job.profile_channels)
    return cudaErrorInvalidValue;
  lay_out(job);
  if (int error = launch(read_sections, dim3(job.sections), kWarp, stream, job)) return error;
  const dim3 tiles(job.sections * blocks(job.channels, kTile), blocks(job.tokens, kTile));
  return launch(place_values, tiles, kTileThreads, stream, job);
}
