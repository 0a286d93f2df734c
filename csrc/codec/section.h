// One section: the K or the V of one layer, [tokens, channels], as bytes and back.
#pragma once
#include <vector>

#include "tables.h"

namespace kvc {

struct Shape {
  int tokens, channels;
  Dtype dtype;
};

// A profile's part for one section: [channels][kSymbols] frequencies and [channels] records.
struct ProfileSection {
  const uint16_t* freq = nullptr;
  const Channel* channels = nullptr;
};

struct Request {
  Quantiser quantiser;
  float parameter;  // fixed_step: the step, or if relative, the step per root mean square
  bool relative;    //             per_token: bins // 2 - 1
};

// Appends a section's bytes to `out` and its records to `channels`. Values that the quantiser
// cannot take (not finite, or beyond its range) make the section lossless.
class Encoder {
 public:
  Encoder(const Kernels& k, const Codebook& book) : k_(k), book_(book) {}
  void encode(const void* x, Shape, Request, ProfileSection, std::vector<uint8_t>& out,
              Channel* channels);

 private:
  struct Choice;
  void prepare(const void* x, Shape, Request, SectionHeader&);
  bool read_block(const void* x, Shape, const SectionHeader&, int first, int count);
  void encode_channel(int tokens, const SectionHeader&, const int16_t* q, const uint16_t* raw,
                      const int16_t* lower, const uint16_t* profile_freq, const Channel* profile,
                      Channel& record);
  Choice adapt(const int16_t* q, int tokens, bool lossless);
  Choice follow(const int16_t* q, int tokens, const uint16_t* freq, Channel);
  void put_raw(const uint16_t* values, int bits, int tokens);

  const Kernels& k_;
  const Codebook& book_;
  RansWriter rans_{};
  uint32_t states_[kMaxLanes];
  std::vector<float> inverse_, step_;
  std::vector<uint8_t> scales_;
  std::vector<int16_t> q_, lower_, exponents_, residuals_, biased_[2];
  std::vector<uint16_t> raw_bits_;
  std::vector<uint8_t> symbols_[2];
  // Filled from the end, since the coder runs backwards.
  std::vector<uint16_t> words_;
  std::vector<uint8_t> raw_, own_;
  std::vector<int16_t> escapes_;
  size_t raw_at_, own_at_, escape_at_;
  int own_tables_, raw_width_;
};

// Fills x from a section's bytes. Returns what is wrong with them, or null. Reads nothing outside.
class Decoder {
 public:
  Decoder(const Kernels& k, const Codebook& book) : k_(k), book_(book) {}
  const char* decode(const uint8_t* data, size_t size, Shape, ProfileSection,
                     const Channel* channels, void* x);

 private:
  const Kernels& k_;
  const Codebook& book_;
  std::vector<float> step_;
  std::vector<int16_t> q_, lower_, biased_;
  std::vector<uint16_t> raw_, words_;
  std::vector<uint8_t> symbols_;
};

}  // namespace kvc
