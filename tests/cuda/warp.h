#pragma once

// A CUDA warp in plain C++, for the code in ggml-tq/cuda/tq-block.cuh: 32 lanes on stacks of their own, in lock step. A lane
// that comes to a collective waits there for the others. Every lane must come to the same collectives.

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <ucontext.h>

#define __device__
#define __host__
#define __forceinline__ inline

using std::max;
using std::min;

struct float2 { float x, y; };
static inline float2 make_float2(float x, float y) { return { x, y }; }

class warp {
public:
    static constexpr int n_lanes = 32;

    // body(lane) in every lane
    static void run(const std::function<void(int)> & body) {
        warp w(body);
        current = &w;
        for (bool busy = true; busy;) {
            busy = false;
            for (w.lane = 0; w.lane < n_lanes; ++w.lane) {
                if (w.done[w.lane]) {
                    continue;
                }
                busy = true;
                if (_setjmp(w.scheduler) == 0) {
                    if (w.started[w.lane]) {
                        _longjmp(w.lanes[w.lane], 1);
                    }
                    w.started[w.lane] = true;
                    setcontext(&w.contexts[w.lane]);
                }
            }
        }
        current = nullptr;
    }

    // all lanes' values
    static const uint64_t * exchange(uint64_t value) {
        warp & w = *current;
        uint64_t * slots = w.slots[w.turn[w.lane]++ % 2]; // the last exchange may still be read
        slots[w.lane] = value;
        const int lane = w.lane;
        if (_setjmp(w.lanes[lane]) == 0) {
            _longjmp(w.scheduler, 1);
        }
        return slots;
    }

    static int current_lane() { return current->lane; }

private:
    static constexpr size_t stack_size = 128*1024;

    explicit warp(const std::function<void(int)> & body) : body(body), stacks(new char[n_lanes*stack_size]) {
        for (int i = 0; i < n_lanes; ++i) {
            getcontext(&contexts[i]);
            contexts[i].uc_stack.ss_sp   = stacks.get() + i*stack_size;
            contexts[i].uc_stack.ss_size = stack_size;
            contexts[i].uc_link          = nullptr;
            makecontext(&contexts[i], start, 0);
        }
    }

    static void start() {
        current->body(current->lane);
        current->done[current->lane] = true;
        _longjmp(current->scheduler, 1);
    }

    static inline warp * current = nullptr;

    const std::function<void(int)> & body;
    std::unique_ptr<char[]> stacks;
    ucontext_t contexts[n_lanes];
    jmp_buf    lanes   [n_lanes];
    jmp_buf    scheduler;
    bool       started [n_lanes] = {};
    bool       done    [n_lanes] = {};
    unsigned   turn    [n_lanes] = {};
    uint64_t   slots[2][n_lanes] = {};
    int        lane = 0;
};

// CUDA's functions

template <typename T> static inline uint64_t warp_pack(T v) {
    uint64_t w = 0;
    memcpy(&w, &v, sizeof(v));
    return w;
}

template <typename T> static inline T warp_unpack(uint64_t w) {
    T v;
    memcpy(&v, &w, sizeof(v));
    return v;
}

template <typename T> static inline T __shfl_sync(uint32_t, T v, int from) {
    return warp_unpack<T>(warp::exchange(warp_pack(v))[from & 31]);
}

template <typename T> static inline T __shfl_xor_sync(uint32_t, T v, int mask) {
    const uint64_t * all = warp::exchange(warp_pack(v));
    return warp_unpack<T>(all[warp::current_lane() ^ mask]);
}

static inline uint32_t __ballot_sync(uint32_t, bool v) {
    const uint64_t * all = warp::exchange(v);
    uint32_t w = 0;
    for (int i = 0; i < warp::n_lanes; ++i) {
        w |= (uint32_t) all[i] << i;
    }
    return w;
}

static inline bool __all_sync(uint32_t mask, bool v) { return __ballot_sync(mask, v) == 0xffffffffu; }
static inline void __syncwarp()                      { warp::exchange(0); }

static inline int      __popc(uint32_t w)             { return __builtin_popcount(w); }
static inline int      __ffs (uint32_t w)             { return __builtin_ffs((int) w); }
static inline uint32_t __float_as_uint(float f)       { return warp_unpack<uint32_t>(warp_pack(f)); }
static inline float    __uint_as_float(uint32_t u)    { return warp_unpack<float>(u); }

static inline uint32_t __funnelshift_l(uint32_t lo, uint32_t hi, uint32_t n) { return (uint32_t) (((uint64_t) hi << 32 | lo) << (n & 31) >> 32); }
static inline float    __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline float    tq_saturate(float f)           { return f > 0.0f ? std::min(f, 1.0f) : 0.0f; }

static inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
        const int at = selector >> 4*i & 7;
        r |= ((at < 4 ? x : y) >> 8*(at & 3) & 0xff) << 8*i;
    }
    return r;
}

static inline uint64_t __brevll(uint64_t w) {
    uint64_t r = 0;
    for (int i = 0; i < 64; ++i) {
        r |= (w >> i & 1) << (63 - i);
    }
    return r;
}

static inline float tq_half_to_float(uint16_t h) {
    const int   e = h >> 10 & 31;
    const int   m = h & 1023;
    const float a = e == 31 ? (m ? NAN : INFINITY) : e == 0 ? std::ldexp((float) m, -24) : std::ldexp((float) (m + 1024), e - 25);
    return h >> 15 ? -a : a;
}

static inline uint16_t tq_float_to_half(float f) { // of [0, 65504)
    int e;
    std::frexp(f, &e); // f < 2^e
    const int   last = std::max(e, -13) - 11;                  // exponent of the last bit kept
    const float m    = std::nearbyint(std::ldexp(f, -last)); // to even
    return (uint16_t) (m + (last + 24)*1024);                  // a carry goes to the exponent
}
