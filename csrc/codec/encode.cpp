#include <algorithm>
#include <cstring>

#include "section.h"

namespace kvc {

namespace {
constexpr int kBlock = 32;  // channels that are transposed at once: they stay in the first cache
int padded(int tokens) { return (tokens + 31) & ~31; }
}  // namespace

// One way to write a channel, and what it costs in 1/kCostUnit bits.
struct Encoder::Choice {
  Channel record;
  Table table;
  int64_t cost;
  int side;         // which of the symbol buffers
  uint32_t counted;  // the symbols that occur, a bit each

  bool escapes() const {
    uint32_t coded = 0;
    for (int s = 1; s < kSymbols; ++s) coded |= uint32_t(table.freq[s] > 0) << s;
    return counted & ~coded;
  }
};

static uint32_t occurring(const int16_t* counts) {
  uint32_t found = 0;
  for (int s = 0; s < kSymbols; ++s) found |= uint32_t(counts[s] > 0) << s;
  return found;
}

void Encoder::prepare(const void* x, Shape shape, Request request, SectionHeader& header) {
  const int tokens = shape.tokens;
  const size_t row = shape.channels * dtype_bytes(shape.dtype);
  header.quantiser = uint8_t(request.quantiser);
  scales_.clear();
  by_token_.assign(padded(tokens), 1);
  by_channel_.assign(padded(shape.channels), 1);
  if (request.quantiser == Quantiser::fixed_step) {
    header.divisor = uint16_t(request.heads);
    const int size = shape.channels / request.heads;
    for (int head = 0; head < request.heads; ++head) {
      float step = request.parameters[head];
      if (request.relative) {
        double sum = 0;
        const char* part = (const char*)x + head * size * dtype_bytes(shape.dtype);
        for (int t = 0; t < tokens; ++t) sum += k_.sum_squares(part + t * row, shape.dtype, size);
        step = float(step * __builtin_sqrt(sum / (double(size) * tokens)));
      }
      if (!(step > 0)) step = 1;
      std::fill_n(by_channel_.begin() + head * size, size, 1 / step);
      scales_.insert(scales_.end(), (uint8_t*)&step, (uint8_t*)&step + sizeof step);
    }
  } else if (request.quantiser == Quantiser::per_token) {
    header.divisor = uint16_t(request.parameters[0]);
    scales_.resize(tokens * dtype_bytes(shape.dtype));
    for (int t = 0; t < tokens; ++t) {
      const uint32_t bits = k_.row_max((const char*)x + t * row, shape.dtype, shape.channels);
      const float most = as_float(bits, shape.dtype);
      by_token_[t] = most == 0 ? 0 : header.divisor / most;
      std::memcpy(&scales_[t * dtype_bytes(shape.dtype)], &bits, dtype_bytes(shape.dtype));
    }
  }
}

bool Encoder::read_block(const void* x, Shape s, const SectionHeader& h, int first, int count) {
  const void* corner = (const char*)x + first * dtype_bytes(s.dtype);
  if (Quantiser(h.quantiser) != Quantiser::lossless)
    return k_.quantise(corner, s.dtype, s.tokens, s.channels, count, by_token_.data(),
                       by_channel_.data() + first,
                       Quantiser(h.quantiser) == Quantiser::per_token ? h.divisor : 0, q_.data(),
                       padded(s.tokens));
  k_.read_halves(corner, s.dtype, s.tokens, s.channels, count, q_.data(), lower_.data(),
                 padded(s.tokens));
  return true;
}

Encoder::Choice Encoder::adapt(const int16_t* q, int tokens, bool lossless) {
  Choice c{};
  const ChannelSums sums = k_.sums(q, tokens);
  const bool delta = !lossless && 8 * sums.steps < 7 * sums.magnitude;
  int shift = 0;
  k_.residuals(q, tokens, sums.centre, delta, residuals_.data());
  k_.symbols(residuals_.data(), tokens, 0, biased_[0].data(), symbols_[0].data());
  int16_t counts[kSymbols];
  k_.histogram(symbols_[0].data(), tokens, counts);
  if (!lossless && counts[kEscape] * 256 > tokens) {
    do ++shift;
    while (shift < kMaxShift && k_.escapes(residuals_.data(), tokens, shift) * 256 > tokens);
    k_.symbols(residuals_.data(), tokens, shift, biased_[0].data(), symbols_[0].data());
    k_.histogram(symbols_[0].data(), tokens, counts);
  }

  int offset = kOffsets / 2;
  if (!delta && !shift) {
    const int64_t excess = sums.sum - int64_t(sums.centre) * tokens;
    offset = int((2 * kOffsets * excess + kOffsets * tokens) / (2 * tokens));
    offset = std::clamp(offset, 0, kOffsets - 1);
  }
  const int64_t deviation = (delta ? sums.steps : sums.magnitude) * 256;
  const uint16_t* spreads = book_.spreads[lossless][offset];
  int spread = 0;
  while (spread < kSpreads - 1 && deviation > (int64_t(spreads[spread]) * tokens << shift)) ++spread;
  int best = -1, best_cost = 0;
  for (int shape = 0; shape < kShapes; ++shape)
    for (int i = std::max(0, spread - 1); i <= std::min(kSpreads - 1, spread + 1); ++i) {
      const int index = Codebook::index(shape, offset, i);
      const int cost = k_.cost(counts, book_.tables[lossless][index].costs);
      if (best < 0 || cost < best_cost) best = index, best_cost = cost;
    }
  c.cost = best_cost;
  c.table = book_.tables[lossless][best].table;
  c.counted = occurring(counts);
  const int64_t own_cost = int64_t(4 + 2 * __builtin_popcount(c.counted)) * 8 * kCostUnit;
  if (best_cost - entropy(counts, tokens) > own_cost) {
    CostedTable own;
    uint16_t freq[kSymbols];
    normalise(counts, tokens, freq);
    fill_table(freq, own.table);
    fill_costs(own.table, own.costs);
    const int64_t cost = k_.cost(counts, own.costs) + own_cost;
    if (cost < c.cost) {
      c.cost = cost;
      c.table = own.table;
      best = kOwnTable;
    }
  }
  c.cost += int64_t(shift) * tokens * kCostUnit;
  const int half = (1 << shift) >> 1;
  c.record = {uint8_t(best), uint8_t(shift | (delta ? 128 : 0)), int16_t(sums.centre - half)};
  return c;
}

Encoder::Choice Encoder::follow(const int16_t* q, int tokens, const uint16_t* freq, Channel record) {
  Choice c{};
  const int shift = record.shift(), half = (1 << shift) >> 1;
  k_.residuals(q, tokens, record.centre + half, record.delta(), residuals_.data());
  k_.symbols(residuals_.data(), tokens, shift, biased_[1].data(), symbols_[1].data());
  int16_t counts[kSymbols], costs[kSymbols];
  k_.histogram(symbols_[1].data(), tokens, counts);
  fill_table(freq, c.table);
  fill_costs(c.table, costs);
  c.cost = k_.cost(counts, costs) + int64_t(shift) * tokens * kCostUnit;
  c.record = record;
  c.record.table = kFromProfile;
  c.counted = occurring(counts);
  c.side = 1;
  return c;
}

void Encoder::put_raw(const uint16_t* values, int bits, int tokens) {
  const size_t size = raw_bytes(bits, tokens);
  raw_at_ -= size;
  uint8_t* out = raw_.data() + raw_at_;
  if (bits == 8) {
    for (int t = 0; t < tokens; ++t) out[t] = uint8_t(values[t]);
    return;
  }
  if (bits == 16) {
    std::memcpy(out, values, size);
    return;
  }
  uint64_t pending = 0;
  int have = 0;
  for (int t = 0; t < tokens; ++t) {
    pending |= uint64_t(values[t]) << have;
    for (have += bits; have >= 8; have -= 8, pending >>= 8) *out++ = uint8_t(pending);
  }
  if (have) *out = uint8_t(pending);
}

void Encoder::encode_channel(int tokens, const SectionHeader& header, const int16_t* q,
                             const uint16_t* raw, const int16_t* lower,
                             const uint16_t* profile_freq, const Channel* profile,
                             Channel& record) {
  const bool lossless = Quantiser(header.quantiser) == Quantiser::lossless;
  constexpr int64_t kRecordCost = 16 * kCostUnit;  // a record's four bytes, packed
  Choice choice = adapt(q, tokens, lossless);
  if (profile_freq) {
    const Choice offline = follow(q, tokens, profile_freq, *profile);
    if (offline.cost <= choice.cost + kRecordCost) choice = offline;
  }
  record = choice.record;
  uint8_t* symbols = symbols_[choice.side].data();
  const int16_t* biased = biased_[choice.side].data();
  for (int t = choice.escapes() ? tokens - 1 : -1; t >= 0; --t) {
    if (!choice.table.freq[symbols[t]]) symbols[t] = kEscape;
    if (symbols[t] == kEscape) escapes_[--escape_at_] = biased[t];
  }
  if (record.table == kOwnTable) {
    uint32_t present = 0;
    for (int s = kSymbols - 1; s >= 0; --s)
      if (choice.table.freq[s]) {
        present |= 1u << s;
        own_at_ -= 2;
        std::memcpy(&own_[own_at_], &choice.table.freq[s], 2);
      }
    own_at_ -= 4;
    std::memcpy(&own_[own_at_], &present, 4);
    ++own_tables_;
  }
  if (lower) put_raw((const uint16_t*)lower, 16, tokens);
  if (raw) {
    put_raw(raw, raw_width_, tokens);
  } else if (const int shift = record.shift()) {
    for (int t = 0; t < tokens; ++t) raw_bits_[t] = uint16_t(biased[t] & ((1 << shift) - 1));
    put_raw(raw_bits_.data(), shift, tokens);
  }
  k_.encode(rans_, symbols, tokens, choice.table);
}

void Encoder::encode(const void* x, Shape s, Request request, ProfileSection profile,
                     std::vector<uint8_t>& out, Channel* channels) {
  const size_t row = padded(s.tokens), n = size_t(s.tokens) * s.channels;
  const bool lossless = request.quantiser == Quantiser::lossless;
  SectionHeader header{};
  header.lanes = uint8_t(lanes_for(n));
  prepare(x, s, request, header);
  raw_width_ = mantissa_bits(s.dtype) + 1;

  q_.resize(kBlock * row);
  lower_.resize(kBlock * row);
  for (auto* buffer : {&exponents_, &residuals_, &biased_[0], &biased_[1]}) buffer->resize(row);
  raw_bits_.resize(row);
  for (auto& buffer : symbols_) buffer.resize(row);
  constexpr size_t kHeadroom = 64;
  words_.resize(std::max(words_.size(), n + kHeadroom));
  escapes_.resize(std::max(escapes_.size(), n));
  raw_.resize(std::max(raw_.size(), n * 3 + s.channels));
  own_.resize(std::max(own_.size(), size_t(s.channels) * (4 + 2 * kSymbols)));
  raw_at_ = raw_.size();
  own_at_ = own_.size();
  escape_at_ = escapes_.size();
  own_tables_ = 0;
  std::fill_n(states_, kMaxLanes, kStateLow);
  uint16_t* const words_end = words_.data() + words_.size();
  rans_ = {states_, header.lanes, words_end};

  for (int first = (s.channels - 1) / kBlock * kBlock; first >= 0; first -= kBlock) {
    const int count = std::min(kBlock, s.channels - first);
    if (!read_block(x, s, header, first, count))
      return encode(x, s, {Quantiser::lossless, nullptr, 1, false}, {}, out, channels);
    for (int i = count - 1; i >= 0; --i) {
      const int c = first + i;
      const int16_t* q = &q_[i * row];
      if (lossless) {
        k_.split(q, s.tokens, raw_width_ - 1, exponents_.data(), raw_bits_.data());
        q = exponents_.data();
      }
      encode_channel(s.tokens, header, q, lossless ? raw_bits_.data() : nullptr,
                     lossless && s.dtype == Dtype::fp32 ? &lower_[i * row] : nullptr,
                     profile.freq ? profile.freq + size_t(c) * kSymbols : nullptr,
                     profile.channels ? profile.channels + c : nullptr, channels[c]);
    }
  }
  header.words = uint32_t(words_end - rans_.out);
  header.raw_bytes = uint32_t(raw_.size() - raw_at_);
  header.escapes = uint32_t(escapes_.size() - escape_at_);
  header.own_tables = uint16_t(own_tables_);

  auto put = [&](const void* p, size_t size) {
    out.insert(out.end(), (const uint8_t*)p, (const uint8_t*)p + size);
  };
  put(&header, sizeof header);
  put(states_, header.lanes * 4u);
  put(rans_.out, header.words * 2u);
  put(escapes_.data() + escape_at_, header.escapes * 2u);
  put(raw_.data() + raw_at_, header.raw_bytes);
  put(own_.data() + own_at_, own_.size() - own_at_);
  put(scales_.data(), scales_.size());
  out.resize((out.size() + 7) & ~size_t(7));
}

}  // namespace kvc
