// Decode attention over per-head pages, split over the keys (Flash-Decoding).
//
// A block of threads has one split of one sequence. Its threads form teams of LANES; a team reads
// AHEAD tokens' keys and values in a step, 16 bytes per lane and load, and weighs them for all G
// query heads, so the cache is read once. Each thread copies what it will read itself into its own
// part of shared memory, STAGES - 1 steps ahead, so loads are under way while it computes and no
// barrier is needed. Teams join in shared memory, splits in a second kernel.
#include "pages/device.cuh"
#include "pages/pages.h"

namespace {

constexpr int THREADS = 128;
constexpr int MIN_SPLIT_TOKENS = 64;
constexpr float LOG2_E = 1.4426950408889634f;

struct Span {
    int begin, end;
};

// Split number `split` of `length` tokens: whole multiples of MIN_SPLIT_TOKENS, the last cut off.
__device__ __forceinline__ Span span_of(int length, int splits, int split) {
    const int parts = (length + MIN_SPLIT_TOKENS - 1) / MIN_SPLIT_TOKENS;
    const int tokens = (parts + splits - 1) / splits * MIN_SPLIT_TOKENS;
    const int64_t begin = static_cast<int64_t>(split) * tokens;
    return {static_cast<int>(min(begin, static_cast<int64_t>(length))),
            static_cast<int>(min(begin + tokens, static_cast<int64_t>(length)))};
}

__device__ __forceinline__ float faded(float peak, float new_peak) {
    return peak == -INFINITY ? 0.0f : exp2f(peak - new_peak);
}

template <typename T, int LANES, int VECTORS, int GROUP>
struct Shape {
    static constexpr int WIDTH = Vector<T>::SIZE * VECTORS;  // elements of a row that one lane has
    static constexpr int ROW = LANES * WIDTH;
    static constexpr int TEAMS = THREADS / LANES;
    static constexpr int AHEAD = GROUP > 4 || VECTORS > 1 ? 2 : 4;
    static constexpr int STAGES = AHEAD * VECTORS > 2 ? 3 : 4;  // 48 or 32 KiB

    union Shared {
        uint4 steps[STAGES][AHEAD][2][VECTORS][THREADS];
        struct {
            float mixed[TEAMS][GROUP][ROW], peak[TEAMS][GROUP], total[TEAMS][GROUP];
        } teams;
    };
};

template <typename T, int LANES, int VECTORS, int GROUP>
__global__ void __launch_bounds__(THREADS, GROUP > 4 ? 2 : GROUP > 2 ? 3 : 4) attend_split(kvc_attention a) {
    using Here = Shape<T, LANES, VECTORS, GROUP>;
    constexpr int SIZE = Vector<T>::SIZE, WIDTH = Here::WIDTH;
    constexpr int TEAMS = Here::TEAMS, AHEAD = Here::AHEAD, STAGES = Here::STAGES;
    __shared__ typename Here::Shared shared;

    const int64_t sequence = blockIdx.x;
    const int split = blockIdx.y;
    const int64_t split_row = (static_cast<int64_t>(split) * a.sequences + sequence) * a.group;
    const Span span = span_of(a.lengths[sequence], a.splits, split);
    T* const out = static_cast<T*>(a.out) + sequence * a.out_stride;
    if (span.begin >= span.end) {
        for (int item = threadIdx.x; item < a.group * a.head_size; item += THREADS) {
            const int head = item / a.head_size, at = item % a.head_size;
            if (a.splits == 1) narrow(0.0f, out + head * a.out_head_stride + at);
            else if (at == 0) a.weights[split_row + head] = -INFINITY;
        }
        return;
    }

    const int team = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const T* const queries = static_cast<const T*>(a.queries) + sequence * a.query_stride;
    const int32_t* const table = a.tables + sequence * a.table_stride;
    const int page_shift = 31 - __clz(a.page_tokens);
    float query[GROUP][WIDTH], mixed[GROUP][WIDTH], peak[GROUP], total[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        peak[g] = -INFINITY;
        total[g] = 0.0f;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            const int at = (i / SIZE * LANES + lane) * SIZE + i % SIZE;
            const bool real = g < a.group && at < a.head_size;
            query[g][i] = real ? widen(queries[g * a.query_head_stride + at]) * a.scale : 0.0f;
            mixed[g][i] = 0.0f;
        }
    }

    const auto token_of = [&](int step, int u) {
        return span.begin + (step * AHEAD + u) * TEAMS + team;
    };
    int32_t pages[AHEAD];  // of the step that is fetched next
    const auto look_up = [&](int step) {
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const int token = token_of(step, u);
            pages[u] = token < span.end ? table[token >> page_shift] : 0;
        }
    };
    const auto fetch = [&](int step) {
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            const int token = token_of(step, u);
            const int64_t page = pages[u], offset = token & (a.page_tokens - 1);
            const T* const key_row = static_cast<const T*>(a.keys) + page * a.key_page_stride +
                                     offset * a.key_token_stride;
            const T* const value_row = static_cast<const T*>(a.values) +
                                       page * a.value_page_stride + offset * a.value_token_stride;
            auto& room = shared.steps[step % STAGES][u];
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                const int at = (v * LANES + lane) * SIZE;
                const bool real = token < span.end && at < a.head_size;
                copy_async(&room[0][v][threadIdx.x], key_row + at, real);
                copy_async(&room[1][v][threadIdx.x], value_row + at, real);
            }
        }
        commit_async();
        look_up(step + 1);
    };

    const int steps = (span.end - span.begin + TEAMS * AHEAD - 1) / (TEAMS * AHEAD);
    look_up(0);
    for (int step = 0; step < STAGES - 1; ++step) fetch(step);
    for (int step = 0; step < steps; ++step) {
        fetch(step + STAGES - 1);
        wait_async<STAGES - 1>();
        Vector<T> key[AHEAD][VECTORS], value[AHEAD][VECTORS];
        bool held[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            held[u] = token_of(step, u) < span.end;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                key[u][v].whole = shared.steps[step % STAGES][u][0][v][threadIdx.x];
                value[u][v].whole = shared.steps[step % STAGES][u][1][v][threadIdx.x];
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            float logit[AHEAD];
            float new_peak = peak[g];
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < WIDTH; ++i)
                    sum += query[g][i] * widen(key[u][i / SIZE].part[i % SIZE]);
#pragma unroll
                for (int far = LANES / 2; far > 0; far /= 2)
                    sum += __shfl_xor_sync(0xffffffffu, sum, far);
                if (a.softcap > 0.0f) sum = a.softcap * tanhf(sum / a.softcap);
                logit[u] = held[u] ? sum * LOG2_E : -INFINITY;
                new_peak = fmaxf(new_peak, logit[u]);
            }
            if (new_peak == -INFINITY) continue;  // this team has no token yet
            const float fade = faded(peak[g], new_peak);
            total[g] *= fade;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) mixed[g][i] *= fade;
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                const float share = exp2f(logit[u] - new_peak);
                total[g] += share;
#pragma unroll
                for (int i = 0; i < WIDTH; ++i)
                    mixed[g][i] += share * widen(value[u][i / SIZE].part[i % SIZE]);
            }
            peak[g] = new_peak;
        }
    }

    wait_async<0>();
    __syncthreads();
    auto& teams = shared.teams;
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        if (lane == 0) {
            teams.peak[team][g] = peak[g];
            teams.total[team][g] = total[g];
        }
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
            teams.mixed[team][g][(i / SIZE * LANES + lane) * SIZE + i % SIZE] = mixed[g][i];
    }
    __syncthreads();
    for (int item = threadIdx.x; item < a.group * a.head_size; item += THREADS) {
        const int head = item / a.head_size, at = item % a.head_size;
        float top = -INFINITY, sum = 0.0f, result = 0.0f;
        for (int t = 0; t < TEAMS; ++t) top = fmaxf(top, teams.peak[t][head]);
        for (int t = 0; t < TEAMS; ++t) {
            const float share = faded(teams.peak[t][head], top);
            sum += share * teams.total[t][head];
            result += share * teams.mixed[t][head][at];
        }
        if (a.splits == 1) {
            narrow(result / sum, out + head * a.out_head_stride + at);
        } else {
            a.partial[(split_row + head) * a.head_size + at] = result / sum;
            if (at == 0) a.weights[split_row + head] = top + log2f(sum);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS) join_splits(kvc_attention a) {
    const int64_t sequence = blockIdx.x;
    const int head = blockIdx.y;
    const int64_t rows = static_cast<int64_t>(a.sequences) * a.group;
    const int64_t row = sequence * a.group + head;
    float top = -INFINITY;
    for (int split = 0; split < a.splits; ++split)
        top = fmaxf(top, a.weights[split * rows + row]);
    T* const out = static_cast<T*>(a.out) + sequence * a.out_stride + head * a.out_head_stride;
    for (int at = threadIdx.x; at < a.head_size; at += THREADS) {
        float sum = 0.0f, result = 0.0f;
#pragma unroll 4
        for (int split = 0; split < a.splits; ++split) {
            const float weight = a.weights[split * rows + row];
            const bool written = weight != -INFINITY;
            const float share = written ? exp2f(weight - top) : 0.0f;
            sum += share;
            result += written ? share * a.partial[(split * rows + row) * a.head_size + at] : 0.0f;
        }
        narrow(sum > 0.0f ? result / sum : 0.0f, out + at);
    }
}

template <typename T, int LANES, int VECTORS>
int with_group(const kvc_attention& a, void* stream) {
    const dim3 grid(a.sequences, a.splits);
    if (a.group == 1) return launch(attend_split<T, LANES, VECTORS, 1>, grid, THREADS, stream, a);
    if (a.group == 2) return launch(attend_split<T, LANES, VECTORS, 2>, grid, THREADS, stream, a);
    if (a.group <= 4) return launch(attend_split<T, LANES, VECTORS, 4>, grid, THREADS, stream, a);
    return launch(attend_split<T, LANES, VECTORS, 8>, grid, THREADS, stream, a);
}

template <typename T>
int with_type(const kvc_attention& a, void* stream) {
    constexpr int SIZE = Vector<T>::SIZE;
    int error;
    if (a.head_size <= 8 * SIZE) error = with_group<T, 8, 1>(a, stream);
    else if (a.head_size <= 16 * SIZE) error = with_group<T, 16, 1>(a, stream);
    else if (a.head_size <= 32 * SIZE) error = with_group<T, 32, 1>(a, stream);
    else error = with_group<T, 32, 256 / (32 * SIZE)>(a, stream);
    if (error || a.splits == 1) return error;
    return launch(join_splits<T>, dim3(a.sequences, a.group), THREADS, stream, a);
}

bool takes(const kvc_attention& a) {
    const int bytes = a.dtype == KVC_FLOAT32 ? 4 : 2;
    const int64_t strides[] = {
        a.key_page_stride, a.key_token_stride, a.value_page_stride, a.value_token_stride, a.head_size
    };
    for (int64_t stride : strides)
        if (stride * bytes % 16 != 0) return false;
    const bool has_room = a.splits == 1 || (a.partial && a.weights);
    return aligned(a.keys) && aligned(a.values) && a.sequences >= 0 && a.group >= 1 &&
           a.group <= 8 && a.head_size >= 1 && a.head_size <= 256 && a.splits >= 1 &&
           a.splits <= 65535 && has_room && is_power_of_two(a.page_tokens);
}

}  // namespace

extern "C" int kvc_attend_pages(const kvc_attention* arguments, void* stream) {
    const kvc_attention& a = *arguments;
    if (!takes(a)) return cudaErrorInvalidValue;
    if (a.sequences == 0) return cudaSuccess;
    if (a.dtype == KVC_FLOAT32) return with_type<float>(a, stream);
    if (a.dtype == KVC_FLOAT16) return with_type<Half>(a, stream);
    if (a.dtype == KVC_BFLOAT16) return with_type<BFloat16>(a, stream);
    return cudaErrorInvalidValue;
}
