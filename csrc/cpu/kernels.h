// Compressing a prompt on a CPU: what its tokens are worth, and the copy of those that stay. Each
// instruction set has a build of its own.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kvc {
namespace cpu {

enum class Dtype : uint8_t { bf16 = 0, fp16 = 1, fp32 = 2 };

inline size_t dtype_bytes(Dtype d) { return d == Dtype::fp32 ? 4 : 2; }

// The pool, and where the elements of its pages stand.
struct Pool {
  char* data;
  Dtype dtype;
  size_t page_elements;
  int page_tokens, head_size;
  const int32_t *keys, *values;          // [D, B] of each
  bool keys_by_lane, values_by_token;    // a lane's tokens, or a token's lanes, side by side
};

// How attention becomes a score, in the words of `policy/attention.py`.
struct Rule {
  bool square, peak;                     // power 2; queries "max"
  int pool_tokens, pool_before;          // of them so many before the key
  bool pool_mean, group_max;
  float group_factor;                    // of the sum over the group
};

// The w queries of each of the G query heads of a KV head, and its n candidates.
struct Window {
  int window, group, tokens;
  const float *queries, *fade;           // [G, w, D], scaled; [w] what each query counts
  const int64_t* pages;                  // [ceil(n / B)]
  const int *seen, *scored;              // [w] how many candidates a query sees, and how many score
  float* scores;                         // [n]
};

constexpr int kChunk = 32;               // keys that are unpacked at once
constexpr int kRows = 8;                 // queries are multiplied in rows of it
constexpr size_t kMostLogits = size_t(1) << 22;  // at once, unless one query head has more

// Sizes of what `score` works in: logits of as many query heads at once as the bound allows.
struct Scratch {
  int page_chunks, chunks, group, rows;
  size_t tile, queries, lanes, logits, mass;  // floats of each, the one behind the other

  Scratch(const Pool& pool, const Rule& rule, const Window& w) {
    page_chunks = (pool.page_tokens + kChunk - 1) / kChunk;
    chunks = (w.tokens + pool.page_tokens - 1) / pool.page_tokens * page_chunks;
    const size_t fits = kMostLogits / (size_t(chunks) * kChunk * w.window + 1);
    group = fits < 1 ? 1 : fits < size_t(w.group) ? int(fits) : w.group;
    rows = (group * w.window + kRows - 1) / kRows * kRows;
    tile = size_t(kChunk) * pool.head_size;
    queries = size_t(rows) * pool.head_size;
    lanes = size_t(rows) * kChunk;
    logits = lanes * chunks;
    mass = size_t(chunks / page_chunks) * pool.page_tokens + kChunk + rule.pool_tokens;
  }
  size_t floats() const { return tile + queries + 2 * lanes + logits + mass; }
};

struct Kernels {
  const char* name;
  void (*score)(const Pool&, const Rule&, const Window&, const Scratch&, float* scratch);
  // Fills a page with B tokens; `pages` and `offsets`, [B], say where they stand.
  void (*copy)(const Pool&, const int64_t* pages, const int* offsets, int64_t target);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
#endif

// The best this machine can run, or the named one. Null: unknown, or not for this machine.
const Kernels* kernels_named(const char* name);

}  // namespace cpu
}  // namespace kvc
