// As much of CUDA as the page kernels use, for a C++ compiler: their very source runs on a CPU.
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
#define __forceinline__ inline
#define __launch_bounds__(threads)
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

struct Block {
    static constexpr size_t STACK_BYTES = 1 << 16;
    std::vector<ucontext_t> fibers;
    std::vector<char> stacks;
    std::vector<Place> places;
    std::vector<float> given[2];  // what each fiber gives to a shuffle: this one's and the next
    std::vector<int> turn;
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
    for (auto& given : block.given) given.assign(threads, NAN);
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

inline float __shfl_xor_sync(uint32_t, float mine, int far) {
    const unsigned me = threadIdx.x;
    auto& given = host::block.given[host::block.turn[me]++ % 2];
    given[me] = mine;
    host::wait_at(host::SHUFFLE);
    return given[me ^ far];
}

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
