// Copies kept tokens into their arena, one block of threads per arena page, 16 bytes at a time.
#include "pages/device.cuh"
#include "pages/pages.h"

namespace {

constexpr int THREADS = 128;
constexpr int MOST_PAGE_TOKENS = 256;

__global__ void __launch_bounds__(THREADS) copy_page(kvc_compaction a) {
    __shared__ int64_t key_from[MOST_PAGE_TOKENS];  // bytes
    __shared__ int64_t value_from[MOST_PAGE_TOKENS];
    const int64_t arena_page = blockIdx.x;
    const int64_t target = a.arena_blocks[arena_page / a.lanes] * a.lanes + arena_page % a.lanes;
    for (int slot = threadIdx.x; slot < a.page_tokens; slot += THREADS) {
        const int64_t index = a.kept[arena_page * a.page_tokens + slot];
        const int64_t lane = index / a.tokens, token = index % a.tokens;
        const int64_t page = a.candidates[lane * a.pages + token / a.page_tokens];
        const int64_t offset = token % a.page_tokens;
        key_from[slot] = page * a.key_page_stride + offset * a.key_token_stride;
        value_from[slot] = page * a.value_page_stride + offset * a.value_token_stride;
    }
    __syncthreads();
    const int vectors = a.head_size * a.element_bytes / 16;  // per row
    char* keys = static_cast<char*>(a.keys);
    char* values = static_cast<char*>(a.values);
    const int64_t key_to = target * a.key_page_stride;
    const int64_t value_to = target * a.value_page_stride;
    for (int item = threadIdx.x; item < a.page_tokens * vectors; item += THREADS) {
        const int slot = item / vectors, at = item % vectors * 16;
        const uint4 key =
            *reinterpret_cast<const uint4*>(keys + key_from[slot] * a.element_bytes + at);
        const uint4 value =
            *reinterpret_cast<const uint4*>(values + value_from[slot] * a.element_bytes + at);
        const int64_t key_slot = key_to + slot * a.key_token_stride;
        const int64_t value_slot = value_to + slot * a.value_token_stride;
        *reinterpret_cast<uint4*>(keys + key_slot * a.element_bytes + at) = key;
        *reinterpret_cast<uint4*>(values + value_slot * a.element_bytes + at) = value;
    }
}

bool takes(const kvc_compaction& a) {
    const int64_t strides[] = {
        a.key_page_stride, a.key_token_stride, a.value_page_stride, a.value_token_stride, a.head_size
    };
    for (int64_t stride : strides)
        if (stride * a.element_bytes % 16 != 0) return false;
    const int64_t grid = static_cast<int64_t>(a.blocks) * a.lanes;
    return aligned(a.keys) && aligned(a.values) && a.blocks >= 0 && a.lanes > 0 && a.tokens > 0 &&
           grid <= INT32_MAX && a.page_tokens > 0 && a.page_tokens <= MOST_PAGE_TOKENS;
}

}  // namespace

extern "C" int kvc_compact(const kvc_compaction* arguments, void* stream) {
    if (!takes(*arguments)) return cudaErrorInvalidValue;
    const unsigned pages = static_cast<unsigned>(arguments->blocks) * arguments->lanes;
    if (pages == 0) return cudaSuccess;
    return launch(copy_page, dim3(pages), THREADS, stream, *arguments);
}
