// What the bytes mean; docs/cachegen.md describes the format in full.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define KVC_BOTH __host__ __device__  // for the CPU's code and the GPU's
#else
#define KVC_BOTH
#endif

namespace kvc {

constexpr int kSymbols = 32;        // 0 escapes, 1..31 stand for -15..15
constexpr int kCentre = 16;         // the symbol of zero
constexpr int kReach = 15;          // the largest magnitude that has a symbol
constexpr int kProbBits = 12;
constexpr int kProbScale = 1 << kProbBits;
constexpr uint32_t kStateLow = 1u << 16;  // states live in [2^16, 2^32), words are 16 bits
constexpr int kMaxLanes = 64;
constexpr int kMaxTokens = 32767;
constexpr int kMaxQuantised = 8191;
constexpr int kMaxShift = 10;
constexpr int kEscape = 0, kEscapeBits = 16;
constexpr int kCostUnit = 256;      // costs are in 1/256 bits
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even

enum class Dtype : uint8_t { bf16 = 0, fp16 = 1, fp32 = 2 };
enum class Quantiser : uint8_t { fixed_step = 0, per_token = 1, lossless = 2 };

// Which table a channel uses, and how its integers become symbols.
struct Channel {
  uint8_t table;  // 0: the profile's, from 1 the codebook's, 255: stored in the section
  uint8_t flags;  // bits 0-3 shift, bit 7 delta
  int16_t centre;

  KVC_BOTH int shift() const { return flags & 15; }
  KVC_BOTH bool delta() const { return flags & 128; }
};
static_assert(sizeof(Channel) == 4);
constexpr int kFromProfile = 0, kOwnTable = 255, kTables = 256;

struct SectionHeader {
  uint32_t words, raw_bytes, escapes;
  uint16_t own_tables;
  uint8_t lanes, quantiser;
  uint16_t divisor;   // fixed_step: heads, a step each; per_token: bins // 2 - 1
  uint16_t reserved;  // 0
};
static_assert(sizeof(SectionHeader) == 20);

KVC_BOTH inline size_t dtype_bytes(Dtype d) { return d == Dtype::fp32 ? 4 : 2; }

// A value of this type by its bits.
KVC_BOTH inline float as_float(uint32_t bits, Dtype d) {
  if (d == Dtype::fp16) {
    const float magnitude = (bits & 0x3ff) / 1024.0f, exponent = float(bits >> 10 & 31);
    const uint32_t scale = bits >> 10 & 31 ? ((bits >> 10 & 31) + 112) << 23 : 113u << 23;
    float unit;
    std::memcpy(&unit, &scale, 4);
    if (exponent == 31) return __builtin_nanf("");
    return (bits & 0x8000 ? -unit : unit) * (magnitude + (exponent > 0));
  }
  if (d == Dtype::bf16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Bytes that one channel's raw bits take.
KVC_BOTH inline size_t raw_bytes(int bits, int tokens) { return (size_t(bits) * tokens + 7) / 8; }
// Bits below the exponent, kept raw: of the upper half for fp32, whose lower half follows whole.
KVC_BOTH inline int mantissa_bits(Dtype d) { return d == Dtype::fp16 ? 10 : 7; }

KVC_BOTH inline int lanes_for(size_t symbols) {
  return symbols >= (1u << 17) ? 64 : symbols >= (1u << 16) ? 32 : 16;
}

}  // namespace kvc
