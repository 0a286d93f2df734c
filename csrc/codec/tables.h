// Probability tables and what symbols cost under them.
#pragma once
#include <memory>

#include "kernels.h"

namespace kvc {

constexpr int kSpreads = 24, kOffsets = 5, kShapes = 2;

struct CostedTable {
  Table table;
  int16_t costs[kSymbols];  // in 1/kCostUnit bits; an escape's value included
};

// The tables that every stream may name: for quantised values and for exponents.
struct Codebook {
  CostedTable tables[2][kTables];
  uint16_t spreads[2][kOffsets][kSpreads];  // mean |residual| * 256 of each column, ascending

  KVC_BOTH static int index(int shape, int offset, int spread) {
    return 1 + (shape * kOffsets + offset) * kSpreads + spread;
  }
};

extern int16_t symbol_costs[kProbScale + 1];  // by frequency
extern int32_t count_logs[kMaxTokens + 1];    // log2(n) * 2^16

void prepare_constants();  // idempotent, thread-safe
bool valid_frequencies(const uint16_t* freq);
void fill_table(const uint16_t* freq, Table&);
void fill_costs(const Table&, int16_t* costs);
// Frequencies for the symbols counted, at least one each and one for the escape.
void normalise(const int16_t* counts, int tokens, uint16_t* freq);
// Entropy of the counts, in 1/kCostUnit bits.
int64_t entropy(const int16_t* counts, int tokens);
// Null if a table is not valid. freq is [2][kTables][kSymbols]; rows of zeros are unused.
std::unique_ptr<Codebook> make_codebook(const uint16_t* freq, const uint16_t* spreads);

}  // namespace kvc
