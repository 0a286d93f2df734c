// C interface of the CUDA kernels on per-head pages. Shapes and meanings are those of the Triton
// kernels in kernels/attention.py and kernels/compaction.py, which they must equal.
//
// All pointers are device memory; strides count elements. Every function only enqueues work on
// `stream` (a cudaStream_t) and returns a cudaError_t: 0, or cudaErrorInvalidValue for arguments
// that the kernel does not take.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum kvc_dtype { KVC_FLOAT32 = 0, KVC_FLOAT16 = 1, KVC_BFLOAT16 = 2 };

// One query token per sequence: queries and out [S, G, D], keys and values [pages, B, D],
// tables [S, width], lengths [S]. Rows of D elements must be aligned to 16 bytes, B a power of
// two, G <= 8, D <= 256. With splits > 1 the kernel needs partial [splits, S, G, D] and
// weights [splits, S, G]. softcap 0 means none.
struct kvc_attention {
    const void* queries;
    const void* keys;
    const void* values;
    const int32_t* tables;
    const int32_t* lengths;
    void* out;
    float* partial;
    float* weights;
    int64_t query_stride, query_head_stride;
    int64_t key_page_stride, key_token_stride;
    int64_t value_page_stride, value_token_stride;
    int64_t table_stride;
    int64_t out_stride, out_head_stride;
    int32_t sequences, group, head_size, page_tokens, splits;
    int32_t dtype;  // of queries, keys, values and out
    float scale, softcap;
};

int kvc_attend_pages(const struct kvc_attention* arguments, void* stream);

// Copies kept token i of kept [arena_blocks * lanes * B], an index into [lanes, tokens], to slot
// i % B of arena page i / B. candidates [lanes, P], arena_blocks [K]. Rows of D elements must be
// aligned to 16 bytes, B <= 256.
struct kvc_compaction {
    void* keys;
    void* values;
    const int64_t* candidates;
    const int64_t* kept;
    const int64_t* arena_blocks;
    int64_t key_page_stride, key_token_stride;
    int64_t value_page_stride, value_token_stride;
    int64_t tokens;
    int32_t pages;  // P, candidates per lane
    int32_t blocks;  // K
    int32_t lanes;  // L * H
    int32_t page_tokens, head_size, element_bytes;
};

int kvc_compact(const struct kvc_compaction* arguments, void* stream);

#ifdef __cplusplus
}
#endif
