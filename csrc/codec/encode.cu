// Values to sections, kernel after kernel: measure the scales, quantise and turn tokens into
// channels (again for sections that proved lossless), choose each channel's table, run the coder,
// find where sections end, write.
#include "codec/choice.cuh"

namespace kvc {
namespace {

constexpr int kTile = 32, kTileThreads = 256, kMeasureThreads = 128;

// How much of a section's parts a channel takes, and later how much it and all after it take.
struct Amounts {
  uint32_t escapes, raw, own, own_tables;
};

struct Section {
  SectionHeader header;
  uint32_t states[kMaxLanes];
  int lossless;
};

// A call and where its intermediate results lie.
struct Job : kvc_encoding {
  int16_t* q;         // [S, C, T]: integers, or the upper halves of lossless values
  uint8_t* symbols;   // [S, C, T]
  uint16_t* words;    // [S, C * T], filled from the end
  uint16_t* freq;     // [S, C, 32]
  Amounts* amounts;   // [S, C]
  uint32_t* scales;   // [S, max(heads, T)]: the bits of steps, or of tokens' largest magnitudes
  Section* found;     // [S]

  __host__ __device__ size_t scales_of(int section) const {
    return size_t(section) * (heads > tokens ? heads : tokens);
  }
  __device__ size_t row(int section, int channel) const {
    return size_t(section) * channels + channel;
  }
  __device__ Quantiser quantiser(int section) const {
    return found[section].lossless ? Quantiser::lossless : Quantiser(quantisers[section]);
  }
  __device__ int half_bins(int section) const {
    return int(parameters[size_t(section) * heads]);
  }
  __device__ Channel* channels_out() const { return reinterpret_cast<Channel*>(records); }
};

size_t lay_out(Job& j) {
  Carver carver{static_cast<char*>(j.scratch), 0};
  const size_t rows = size_t(j.sections) * j.channels;
  carver.take(j.q, rows * j.tokens);
  carver.take(j.symbols, rows * j.tokens);
  carver.take(j.words, rows * j.tokens);
  carver.take(j.freq, rows * kSymbols);
  carver.take(j.amounts, rows);
  carver.take(j.scales, j.scales_of(j.sections));
  carver.take(j.found, j.sections);
  return carver.at;
}

__device__ float value_of(const Job& j, size_t at) {
  return as_float(load_bits(j.values, at, Dtype(j.dtype)), Dtype(j.dtype));
}

// In eight interleaved sums, as every instruction set of the CPU adds.
__device__ double sum_squares(const Job& j, size_t at, int n) {
  double sums[8] = {};
  for (int i = 0; i < n; i += 8)
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (i + k < n) {
        const double x = value_of(j, at + i + k);
        sums[k] = __dadd_rn(sums[k], __dmul_rn(x, x));
      }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

__device__ float step_of(const Job& j, int section, int head, double* shared) {
  const float step = j.parameters[size_t(section) * j.heads + head];
  if (!j.relative) return step;
  const int size = j.channels / j.heads;
  double sum = 0;
  for (int first = 0; first < j.tokens; first += kMeasureThreads) {
    const int t = first + threadIdx.x;
    if (t < j.tokens)
      shared[threadIdx.x] =
          sum_squares(j, (size_t(section) * j.tokens + t) * j.channels + head * size, size);
    __syncthreads();
    for (int i = 0; i < kMeasureThreads && first + i < j.tokens; ++i) sum += shared[i];
    __syncthreads();
  }
  return float(__dmul_rn(double(step), sqrt(sum / (double(size) * j.tokens))));
}

// A block per section and head; tokens' scales are the first block's.
__global__ void __launch_bounds__(kMeasureThreads) measure(Job j) {
  __shared__ double sums[kMeasureThreads];
  const int section = blockIdx.x, head = blockIdx.y;
  uint32_t* scales = j.scales + j.scales_of(section);
  const Quantiser quantiser = Quantiser(j.quantisers[section]);
  if (head == 0 && threadIdx.x == 0)
    j.found[section].lossless = quantiser == Quantiser::lossless;
  if (quantiser == Quantiser::fixed_step) {
    const float step = step_of(j, section, head, sums);
    if (threadIdx.x == 0) scales[head] = __float_as_uint(step > 0 ? step : 1.0f);
  } else if (quantiser == Quantiser::per_token && head == 0) {
    const uint32_t magnitude = Dtype(j.dtype) == Dtype::fp32 ? 0x7fffffffu : 0x7fffu;
    for (int t = threadIdx.x; t < j.tokens; t += kMeasureThreads) {
      const size_t at = (size_t(section) * j.tokens + t) * j.channels;
      uint32_t most = 0;
      for (int c = 0; c < j.channels; ++c)
        most = max(most, load_bits(j.values, at + c, Dtype(j.dtype)) & magnitude);
      scales[t] = most;
    }
  }
}

// What is multiplied with a value before it is rounded.
__device__ float inverse_scale(const Job& j, int section, int c, int t, int divisor) {
  const uint32_t* scales = j.scales + j.scales_of(section);
  if (!divisor) return 1.0f / __uint_as_float(scales[c / (j.channels / j.heads)]);
  const float most = as_float(scales[t], Dtype(j.dtype));
  return most == 0 ? 0.0f : float(divisor) / most;
}

template <bool Lossless>
__device__ void turn_tile(const Job& j) {
  __shared__ int16_t tile[kTile][kTile + 2];
  const int across = (j.channels + kTile - 1) / kTile;
  const int section = blockIdx.x / across;
  const int channel = blockIdx.x % across * kTile, token = blockIdx.y * kTile;
  const int x = threadIdx.x % kTile;
  const bool wanted = Lossless ? j.found[section].lossless
                               : Quantiser(j.quantisers[section]) != Quantiser::lossless;
  if (!wanted) return;
  const bool per_token = Quantiser(j.quantisers[section]) == Quantiser::per_token;
  const int divisor = per_token ? j.half_bins(section) : 0;
  const float rounder = kRounder + float(divisor);
  for (int y = threadIdx.x / kTile; y < kTile; y += kTileThreads / kTile) {
    const int c = channel + x, t = token + y;
    if (c >= j.channels || t >= j.tokens) continue;
    const size_t at = (size_t(section) * j.tokens + t) * j.channels + c;
    if (Lossless) {
      const uint32_t bits = load_bits(j.values, at, Dtype(j.dtype));
      tile[y][x] = int16_t(Dtype(j.dtype) == Dtype::fp32 ? bits >> 16 : bits);
    } else {
      const float scaled = __fmul_rn(value_of(j, at), inverse_scale(j, section, c, t, divisor));
      if (!(fabsf(scaled) <= kMaxQuantised)) j.found[section].lossless = 1;
      tile[y][x] = int16_t(__float_as_uint(__fadd_rn(scaled, rounder)) - __float_as_uint(rounder));
    }
  }
  __syncthreads();
  for (int y = threadIdx.x / kTile; y < kTile; y += kTileThreads / kTile)
    if (channel + y < j.channels && token + x < j.tokens)
      j.q[j.row(section, channel + y) * j.tokens + token + x] = tile[x][y];
}

__global__ void __launch_bounds__(kTileThreads) quantise(Job j) { turn_tile<false>(j); }
__global__ void __launch_bounds__(kTileThreads) take_halves(Job j) { turn_tile<true>(j); }

__device__ Integers integers_of(const Job& j, int section, int channel) {
  const bool lossless = j.quantiser(section) == Quantiser::lossless;
  return {j.q + j.row(section, channel) * j.tokens, j.tokens,
          lossless ? mantissa_bits(Dtype(j.dtype)) : 0};
}

// A warp per channel.
__global__ void __launch_bounds__(kWarp) choose(Job j) {
  __shared__ int counts[kSymbols];
  __shared__ uint16_t freq[kSymbols];
  const int section = blockIdx.y;
  const size_t row = j.row(section, blockIdx.x);
  const auto& tables = *static_cast<const DeviceTables*>(j.tables);
  const Integers q = integers_of(j, section, blockIdx.x);
  Coding coding = adapt(tables, q, counts);
  const bool asked_lossless = Quantiser(j.quantisers[section]) == Quantiser::lossless;
  if (j.profile_frequencies && asked_lossless == (q.mantissa > 0)) {  // else it fits other values
    constexpr int64_t kRecordCost = 16 * kCostUnit;  // a record's four bytes, packed
    const Coding offline =
        follow(tables, q, reinterpret_cast<const Channel*>(j.profile_channels)[row],
               j.profile_frequencies[row * kSymbols + threadIdx.x], counts);
    if (offline.cost <= coding.cost + kRecordCost) coding = offline;
  }
  freq[threadIdx.x] = uint16_t(coding.freq);
  __syncwarp();
  int escapes = 0;
  for (int t = threadIdx.x; t < j.tokens; t += kWarp) {
    int symbol = symbol_of(coding.biased(q, t), coding.record.shift());
    if (!freq[symbol]) symbol = kEscape;
    escapes += symbol == kEscape;
    j.symbols[row * j.tokens + t] = uint8_t(symbol);
  }
  escapes = __reduce_add_sync(kAll, escapes);
  const bool own = coding.record.table == kOwnTable;
  const int present = __popc(__ballot_sync(kAll, coding.freq > 0));
  size_t raw = raw_bytes(q.mantissa ? q.mantissa + 1 : coding.record.shift(), j.tokens);
  if (q.mantissa && Dtype(j.dtype) == Dtype::fp32) raw += 2 * size_t(j.tokens);
  j.freq[row * kSymbols + threadIdx.x] = uint16_t(coding.freq);
  if (threadIdx.x == 0) {
    j.channels_out()[row] = coding.record;
    j.amounts[row] = {uint32_t(escapes), uint32_t(raw), own ? 4 + 2 * uint32_t(present) : 0, own};
  }
}

// A warp per section: the coder, from the last channel to the first.
__global__ void __launch_bounds__(kWarp) code_symbols(Job j) {
  __shared__ SharedTable table;
  const int section = blockIdx.x, count = lanes_for(size_t(j.tokens) * j.channels);
  const Lanes lanes(count);
  const size_t n = size_t(j.tokens) * j.channels;
  uint16_t* const words = j.words + section * n;
  uint32_t states[kMaxLanes / kWarp] = {kStateLow, kStateLow};
  uint32_t at = uint32_t(n);
  Amounts total{};
  for (int c = j.channels - 1; c >= 0; --c) {
    const size_t row = j.row(section, c);
    table.fill(j.freq[row * kSymbols + threadIdx.x]);
    for (int group = (j.tokens - 1) / count * count; group >= 0; group -= count)
#pragma unroll
      for (int u = 1; u >= 0; --u) {
        if (u >= lanes.units) continue;
        const int t = lanes.token(group, u);
        const bool real = lanes.has() && t < j.tokens;
        const int symbol = real ? j.symbols[row * j.tokens + t] : kEscape;
        const uint32_t freq = table.freq[symbol];
        uint32_t state = states[u];
        const bool full = real && state >> 20 >= freq;
        const unsigned all_full = __ballot_sync(kAll, full);
        at -= __popc(all_full);
        if (full) {
          words[at + __popc(all_full & below())] = uint16_t(state);
          state >>= 16;
        }
        if (real) states[u] = (state / freq << kProbBits) + state % freq + table.start[symbol];
      }
    const Amounts own = j.amounts[row];
    total = {total.escapes + own.escapes, total.raw + own.raw, total.own + own.own,
             total.own_tables + own.own_tables};
    if (threadIdx.x == 0) j.amounts[row] = total;
  }
  Section& found = j.found[section];
#pragma unroll
  for (int u = 0; u < 2; ++u)
    if (u < lanes.units && lanes.has()) found.states[u * lanes.width + threadIdx.x] = states[u];
  if (threadIdx.x == 0) {
    const Quantiser quantiser = j.quantiser(section);
    const int divisor = quantiser == Quantiser::fixed_step  ? j.heads
                        : quantiser == Quantiser::per_token ? j.half_bins(section)
                                                            : 0;
    found.header = {uint32_t(n) - at, total.raw, total.escapes, uint16_t(total.own_tables),
                    uint8_t(count), uint8_t(quantiser), uint16_t(divisor), 0};
  }
}

// Where a section's parts begin, from its first byte on.
struct Places {
  uint32_t words, escapes, raw, own, scales, scale_bytes;

  __device__ Places(const Job& j, int section) {
    const SectionHeader& h = j.found[section].header;
    const Quantiser quantiser = Quantiser(h.quantiser);
    words = sizeof h + h.lanes * 4u;
    escapes = words + h.words * 2;
    raw = escapes + h.escapes * 2;
    own = raw + h.raw_bytes;
    scales = own + j.amounts[j.row(section, 0)].own;
    scale_bytes = quantiser == Quantiser::fixed_step ? h.divisor * 4
                  : quantiser == Quantiser::per_token
                      ? uint32_t(j.tokens * dtype_bytes(Dtype(j.dtype)))
                      : 0;
  }
  __device__ uint32_t end() const { return (scales + scale_bytes + 7) & ~7u; }
};

__global__ void __launch_bounds__(kWarp) find_ends(Job j) {
  uint64_t before = 0;
  for (int first = 0; first < j.sections; first += kWarp) {
    const int section = first + threadIdx.x;
    uint64_t end = section < j.sections ? Places(j, section).end() : 0;
    end = before + running_sum(end);
    if (section < j.sections) j.ends[section] = end;
    before = __shfl_sync(kAll, end, kWarp - 1);
  }
}

__device__ void store16(uint8_t* p, uint32_t v) { p[0] = uint8_t(v), p[1] = uint8_t(v >> 8); }
__device__ void store32(uint8_t* p, uint32_t v) { store16(p, v), store16(p + 2, v >> 16); }

// The channel's bits below its symbols.
__device__ uint32_t raw_of(const Coding& coding, const Integers& q, int t) {
  if (!q.mantissa) return coding.biased(q, t) & ((1u << coding.record.shift()) - 1);
  const uint32_t upper = uint16_t(q.q[t]);
  return upper >> 15 << q.mantissa | (upper & ((1u << q.mantissa) - 1));
}

__device__ void write_raw(const Job& j, int section, int channel, const Coding& coding,
                          const Integers& q, uint8_t* out) {
  const int width = q.mantissa ? q.mantissa + 1 : coding.record.shift();
  const int size = int(raw_bytes(width, q.tokens));
  for (int i = threadIdx.x; i < size; i += kWarp) {
    uint32_t byte = 0;
    for (int t = 8 * i / width; t < q.tokens && t * width < 8 * i + 8; ++t) {
      const uint32_t bits = raw_of(coding, q, t);
      byte |= t * width < 8 * i ? bits >> (8 * i - t * width) : bits << (t * width - 8 * i);
    }
    out[i] = uint8_t(byte);
  }
  if (q.mantissa && Dtype(j.dtype) == Dtype::fp32)
    for (int t = threadIdx.x; t < q.tokens; t += kWarp) {
      const size_t at = (size_t(section) * q.tokens + t) * j.channels + channel;
      store16(out + size + 2 * t, load_bits(j.values, at, Dtype::fp32) & 0xffffu);
    }
}

// What a section has once.
__device__ void write_frame(const Job& j, int section, const Places& places, uint8_t* out) {
  const Section& found = j.found[section];
  const SectionHeader& h = found.header;
  if (threadIdx.x == 0) memcpy(out, &h, sizeof h);
  for (int lane = threadIdx.x; lane < h.lanes; lane += kWarp)
    store32(out + sizeof h + 4 * lane, found.states[lane]);
  const uint32_t* scales = j.scales + j.scales_of(section);
  const bool wide =
      Quantiser(h.quantiser) == Quantiser::fixed_step || Dtype(j.dtype) == Dtype::fp32;
  const int width = wide ? 4 : 2;
  for (int i = threadIdx.x; i < int(places.scale_bytes) / width; i += kWarp)
    if (wide) store32(out + places.scales + 4 * i, scales[i]);
    else store16(out + places.scales + 2 * i, scales[i]);
  const uint32_t padding = places.scales + places.scale_bytes + threadIdx.x;
  if (padding < places.end()) out[padding] = 0;
}

// A warp per channel, and of each section's words a share.
__global__ void __launch_bounds__(kWarp) write_sections(Job j) {
  const int section = blockIdx.y, channel = blockIdx.x;
  if (j.ends[j.sections - 1] > j.capacity) return;
  const Places places(j, section);
  uint8_t* const out = j.out + (section ? j.ends[section - 1] : 0);
  const SectionHeader& h = j.found[section].header;
  if (channel == 0) write_frame(j, section, places, out);
  const uint16_t* words =
      j.words + size_t(section + 1) * j.tokens * j.channels - h.words;
  for (uint32_t i = channel * kWarp + threadIdx.x; i < h.words; i += j.channels * kWarp)
    store16(out + places.words + 2 * i, words[i]);

  const size_t row = j.row(section, channel);
  const Amounts here = j.amounts[row], whole = j.amounts[j.row(section, 0)];
  const Integers q = integers_of(j, section, channel);
  const Coding coding{j.channels_out()[row], j.freq[row * kSymbols + threadIdx.x], 0};
  write_raw(j, section, channel, coding, q, out + places.raw + (whole.raw - here.raw));
  if (coding.record.table == kOwnTable) {
    uint8_t* own = out + places.own + (whole.own - here.own);
    const unsigned present = __ballot_sync(kAll, coding.freq > 0);
    if (threadIdx.x == 0) store32(own, present);
    if (coding.freq) store16(own + 4 + 2 * __popc(present & below()), coding.freq);
  }
  uint8_t* escapes = out + places.escapes + 2 * size_t(whole.escapes - here.escapes);
  for (int first = 0; first < j.tokens; first += kWarp) {
    const int t = first + threadIdx.x;
    const bool escaped = t < j.tokens && j.symbols[row * j.tokens + t] == kEscape;
    const unsigned all_escaped = __ballot_sync(kAll, escaped);
    if (escaped)
      store16(escapes + 2 * __popc(all_escaped & below()), uint16_t(coding.biased(q, t)));
    escapes += 2 * __popc(all_escaped);
  }
}

}  // namespace
}  // namespace kvc

using namespace kvc;

extern "C" size_t kvc_tables_bytes() { return sizeof(DeviceTables); }

extern "C" int kvc_fill_tables(const uint16_t* frequencies, const uint16_t* spreads, void* filled) {
  const auto book = make_codebook(frequencies, spreads);
  if (!book) return 0;
  auto& tables = *static_cast<DeviceTables*>(filled);
  tables.book = *book;
  memcpy(tables.symbol_costs, symbol_costs, sizeof symbol_costs);
  memcpy(tables.count_logs, count_logs, sizeof count_logs);
  return 1;
}

extern "C" size_t kvc_encoding_scratch(const kvc_encoding* arguments) {
  Job job{*arguments};
  return lay_out(job);
}

extern "C" int kvc_encode(const kvc_encoding* arguments, void* stream) {
  Job job{*arguments};
  const auto misplaced = [](const void* p, int to) { return reinterpret_cast<uintptr_t>(p) % to; };
  if (!takes(job.sections, job.tokens, job.channels, job.dtype) || job.heads < 1 ||
      job.channels % job.heads || misplaced(job.out, 8) || misplaced(job.scratch, 16) ||
      !job.profile_frequencies != !job.profile_channels)
    return cudaErrorInvalidValue;
  lay_out(job);
  const dim3 tiles(job.sections * blocks(job.channels, kTile), blocks(job.tokens, kTile));
  const dim3 channels(job.channels, job.sections);
  int error = launch(measure, dim3(job.sections, job.heads), kMeasureThreads, stream, job);
  if (!error) error = launch(quantise, tiles, kTileThreads, stream, job);
  if (!error) error = launch(take_halves, tiles, kTileThreads, stream, job);
  if (!error) error = launch(choose, channels, kWarp, stream, job);
  if (!error) error = launch(code_symbols, dim3(job.sections), kWarp, stream, job);
  if (!error) error = launch(find_ends, dim3(1), kWarp, stream, job);
  if (!error) error = launch(write_sections, channels, kWarp, stream, job);
  return error;
}
