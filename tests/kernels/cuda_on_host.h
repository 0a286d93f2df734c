// As much of CUDA as csrc/ uses, for a C++ compiler: the kernels' very source runs on a CPU.
//
// Every thread of a block is a fiber. A fiber runs until it needs the others, at a barrier or a
// shuffle; when all wait, all go on. If some wait at one kind and others at another, or some have
// returned, a GPU would hang or read garbage: the launch fails with LOCKSTEP_BROKEN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

struct uint4 {
    uint32_t x, y, z, w;
};

struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, LOCKSTEP_BROKEN = 1000 };

inline dim3 threadIdx, blockIdx;

namespace host {

enum Place { RUNNING, BARRIER, SHUFFLE, RETURNED };

struct Copy {
    void* to;
    const void* from;
    bool real;
};

struct Block {
    static constexpr size_t STACK_BYTES = 1 << 16;
    std::vector<ucontext_t> fibers;
    std::vector<char> stacks;
    std::vector<Place> places;
    std::vector<uint64_t> given[2];  // what each fiber gives to a shuffle: this one's and the next
    std::vector<int> turn;
    std::vector<std::vector<std::vector<Copy>>> copies;  // each fiber's groups, the open one last
    ucontext_t scheduler;
    std::function<void()> body;
};

inline Block block;

inline void wait_at(Place place) {
    const unsigned me = threadIdx.x;
    block.places[me] = place;
    swapcontext(&block.fibers[me], &block.scheduler);
}

inline void run_fiber() {
    block.body();
    block.places[threadIdx.x] = RETURNED;
    swapcontext(&block.fibers[threadIdx.x], &block.scheduler);
}

inline int run_block(int threads) {
    block.fibers.resize(threads);
    block.stacks.resize(threads * Block::STACK_BYTES);
    block.places.assign(threads, RUNNING);
    block.turn.assign(threads, 0);
    block.copies.assign(threads, {{}});
    for (auto& given : block.given) given.assign(threads, ~uint64_t(0));
    for (int i = 0; i < threads; ++i) {
        getcontext(&block.fibers[i]);
        block.fibers[i].uc_stack.ss_sp = &block.stacks[i * Block::STACK_BYTES];
        block.fibers[i].uc_stack.ss_size = Block::STACK_BYTES;
        makecontext(&block.fibers[i], run_fiber, 0);
    }
    for (;;) {
        for (int i = 0; i < threads; ++i) {
            threadIdx = dim3(i);
            swapcontext(&block.scheduler, &block.fibers[i]);
        }
        for (Place place : block.places)
            if (place != block.places[0]) return LOCKSTEP_BROKEN;
        if (block.places[0] == RETURNED) return cudaSuccess;
    }
}

}  // namespace host

template <typename Arguments>
int launch(void (*kernel)(Arguments), dim3 grid, int threads, void*, Arguments arguments) {
    host::block.body = [=] { kernel(arguments); };
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y);
            if (int error = host::run_block(threads)) return error;
        }
    return cudaSuccess;
}

inline void __syncthreads() { host::wait_at(host::BARRIER); }

inline void __syncwarp() { host::wait_at(host::BARRIER); }

namespace host {

constexpr unsigned WARP = 32;

// Gives a value to the others of the warp and waits until all have given theirs.
template <typename T>
const uint64_t* exchange(T mine) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a register pair at most");
    const unsigned me = threadIdx.x;
    auto& given = block.given[block.turn[me]++ % 2];
    given[me] = 0;
    std::memcpy(&given[me], &mine, sizeof mine);
    wait_at(SHUFFLE);
    return &given[me / WARP * WARP];
}

template <typename T>
T taken(const uint64_t* given, unsigned lane) {
    T value;
    std::memcpy(&value, &given[lane], sizeof value);
    return value;
}

}  // namespace host

template <typename T>
T __shfl_sync(uint32_t, T mine, int lane) {
    return host::taken<T>(host::exchange(mine), lane);
}

template <typename T>
T __shfl_up_sync(uint32_t, T mine, unsigned far) {
    const unsigned lane = threadIdx.x % host::WARP;
    const uint64_t* given = host::exchange(mine);
    return host::taken<T>(given, lane < far ? lane : lane - far);
}

template <typename T>
T __shfl_xor_sync(uint32_t, T mine, int far) {
    return host::taken<T>(host::exchange(mine), threadIdx.x % host::WARP ^ far);
}

inline uint32_t __ballot_sync(uint32_t, bool mine) {
    const uint64_t* given = host::exchange(mine);
    uint32_t all = 0;
    for (unsigned lane = 0; lane < host::WARP; ++lane) all |= uint32_t(given[lane]) << lane;
    return all;
}

template <typename T>
T __reduce_add_sync(uint32_t, T mine) {
    const uint64_t* given = host::exchange(mine);
    T sum = 0;
    for (unsigned lane = 0; lane < host::WARP; ++lane) sum += host::taken<T>(given, lane);
    return sum;
}

template <typename T>
T __reduce_max_sync(uint32_t, T mine) {
    const uint64_t* given = host::exchange(mine);
    for (unsigned lane = 0; lane < host::WARP; ++lane)
        mine = max(mine, host::taken<T>(given, lane));
    return mine;
}

// Background copies happen as late as they may: when somebody waits for them.
inline void copy_async(void* to, const void* from, bool real) {
    host::block.copies[threadIdx.x].back().push_back({to, from, real});
}

inline void commit_async() { host::block.copies[threadIdx.x].emplace_back(); }

template <int LATER>
void wait_async() {
    auto& groups = host::block.copies[threadIdx.x];
    while (groups.size() > LATER + 1) {
        for (const auto& copy : groups.front()) {
            if (copy.real) std::memcpy(copy.to, copy.from, 16);
            else std::memset(copy.to, 0, 16);
        }
        groups.erase(groups.begin());
    }
}

inline int atomicAdd(int* sum, int more) {  // fibers run one after another
    *sum += more;
    return *sum - more;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline int __popc(uint32_t number) { return __builtin_popcount(number); }

template <typename T>
T __ldg(const T* pointer) {
    return *pointer;
}

inline int __clz(int number) { return number ? __builtin_clz(number) : 32; }

template <typename To, typename From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float __uint_as_float(uint32_t bits) { return same_bits<float>(bits); }
inline uint32_t __float_as_uint(float number) { return same_bits<uint32_t>(number); }
inline float half_to_float(uint16_t bits) { return same_bits<_Float16>(bits); }
inline uint16_t float_to_half(float number) {
    return same_bits<uint16_t>(static_cast<_Float16>(number));
}
