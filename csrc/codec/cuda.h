// C interface of the codec's CUDA kernels: the bytes of section.h's Encoder and Decoder.
//
// All pointers are device memory unless a name says host. The two coding functions only enqueue
// work on `stream` (a cudaStream_t) and return a cudaError_t: 0, or cudaErrorInvalidValue for
// arguments that the kernels do not take. S sections, T tokens, C channels; a profile is given
// whole or not at all.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// The codebook and its costs as the kernels read them: fill them once, copy them to the device.
// Returns 0 if the codebook ([2, 256, 32] frequencies, [2, 5, 24] spreads) does not add up.
size_t kvc_tables_bytes(void);
int kvc_fill_tables(const uint16_t* host_frequencies, const uint16_t* host_spreads,
                    void* host_tables);

// Sections one after another into out, ends[s] where each ends. ends[S - 1] > capacity: nothing
// was written to out, which needs so much room.
struct kvc_encoding {
  const void* values;                   // [S, T, C]
  const uint8_t* quantisers;            // [S]
  const float* parameters;              // [S, heads]
  const uint16_t* profile_frequencies;  // [S, C, 32]
  const uint8_t* profile_channels;      // [S, C, 4]
  const void* tables;
  void* scratch;                        // of kvc_encoding_scratch bytes, aligned to 16
  uint8_t* records;                     // [S, C, 4]
  uint8_t* out;                         // aligned to 8
  uint64_t* ends;                       // [S]
  uint64_t capacity;
  int32_t sections, tokens, channels, heads;
  int32_t dtype, relative;
};
size_t kvc_encoding_scratch(const struct kvc_encoding* arguments);
int kvc_encode(const struct kvc_encoding* arguments, void* stream);

// faults[s] is 1 for a section that no encoder wrote; its values are then undefined.
struct kvc_decoding {
  const uint8_t* data;   // aligned to 8
  const uint64_t* ends;  // [S]
  const uint8_t* records;
  const uint16_t* profile_frequencies;
  const uint8_t* profile_channels;
  const void* tables;
  void* scratch;         // of kvc_decoding_scratch bytes, aligned to 16
  void* values;          // [S, T, C]
  int32_t* faults;       // [S]
  uint64_t bytes;        // of data
  int32_t sections, tokens, channels;
  int32_t dtype;
};
size_t kvc_decoding_scratch(const struct kvc_decoding* arguments);
int kvc_decode(const struct kvc_decoding* arguments, void* stream);

#ifdef __cplusplus
}
#endif
