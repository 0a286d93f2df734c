#include "tables.h"

#include <cmath>
#include <cstring>
#include <mutex>

namespace kvc {

uint64_t reciprocals[kProbScale];
int16_t symbol_costs[kProbScale + 1];
int32_t count_logs[kMaxTokens + 1];

namespace {

void fill_constants() {
  for (int f = 1; f < kProbScale; ++f) {
    reciprocals[f] = ((uint64_t(1) << 44) + f - 1) / f;
    symbol_costs[f] = int16_t(std::lround(kCostUnit * (kProbBits - std::log2(double(f)))));
  }
  for (int n = 1; n <= kMaxTokens; ++n)
    count_logs[n] = int32_t(std::lround(65536 * std::log2(double(n))));
}

}  // namespace

void prepare_constants() {
  static std::once_flag once;
  std::call_once(once, fill_constants);
}

bool valid_frequencies(const uint16_t* freq) {
  int sum = 0;
  for (int s = 0; s < kSymbols; ++s) {
    if (freq[s] >= kProbScale) return false;
    sum += freq[s];
  }
  return sum == kProbScale && freq[kEscape] > 0;
}

void fill_table(const uint16_t* freq, Table& t) {
  std::memcpy(t.freq, freq, sizeof t.freq);
  int sum = 0;
  for (int s = 0; s < kSymbols; ++s) {
    t.start[s] = uint16_t(sum);
    sum += freq[s];
  }
  t.first = 1;
  t.last = kSymbols - 1;
  while (t.first < kSymbols - 1 && !freq[t.first]) ++t.first;
  while (t.last > t.first && !freq[t.last]) --t.last;
}

void fill_costs(const Table& t, int16_t* costs) {
  const int16_t escape = int16_t(symbol_costs[t.freq[kEscape]] + kEscapeBits * kCostUnit);
  costs[kEscape] = escape;
  for (int s = 1; s < kSymbols; ++s) costs[s] = t.freq[s] ? symbol_costs[t.freq[s]] : escape;
}

void normalise(const int16_t* counts, int tokens, uint16_t* freq) {
  int sum = 0, largest = 0;
  for (int s = 0; s < kSymbols; ++s) {
    int f = int(int64_t(counts[s]) * kProbScale / tokens);
    if (f == 0 && (counts[s] || s == kEscape)) f = 1;
    freq[s] = uint16_t(f);
    sum += f;
    if (counts[s] > counts[largest]) largest = s;
  }
  freq[largest] = uint16_t(freq[largest] + kProbScale - sum);
  if (freq[largest] == kProbScale) {  // the escape alone
    --freq[largest];
    ++freq[kCentre];
  }
}

int64_t entropy(const int16_t* counts, int tokens) {
  int64_t bits = int64_t(tokens) * count_logs[tokens];
  for (int s = 0; s < kSymbols; ++s)
    if (counts[s]) bits -= int64_t(counts[s]) * count_logs[counts[s]];
  return bits >> 8;
}

std::unique_ptr<Codebook> make_codebook(const uint16_t* freq, const uint16_t* spreads) {
  prepare_constants();
  auto book = std::make_unique<Codebook>();
  std::memcpy(book->spreads, spreads, sizeof book->spreads);
  for (int kind = 0; kind < 2; ++kind)
    for (int i = 0; i < kTables; ++i) {
      const uint16_t* row = freq + (kind * kTables + i) * kSymbols;
      CostedTable& entry = book->tables[kind][i];
      const bool used = i >= 1 && i < Codebook::index(kShapes, 0, 0);
      if (!used) continue;
      if (!valid_frequencies(row)) return nullptr;
      fill_table(row, entry.table);
      fill_costs(entry.table, entry.costs);
    }
  return book;
}

}  // namespace kvc
