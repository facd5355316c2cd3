// One loop, compiled for several instruction sets, chosen at run time.
//
// A kernel is a struct with a static, always-inlined `run`. simd::run<Kernel>(args...) calls the copy that was
// compiled for the best instruction set of this machine; the compiler vectorises `run` once per copy. Whatever
// `run` calls must be always-inlined too (PTQ_INLINE), or it stays scalar.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../numerics.h"

namespace ptq4cuda::simd {

enum class Level { baseline, avx2, avx512 };

inline const char* name(Level level) {
    switch (level) {
        case Level::avx512: return "avx512";
        case Level::avx2: return "avx2";
        default: return "baseline";
    }
}

#if defined(__x86_64__)
#define PTQ_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define PTQ_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))

// PTQ4CUDA_SIMD=baseline|avx2|avx512 lowers the level, for tests and bug reports.
inline Level detect() {
    Level level = Level::baseline;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        level = Level::avx2;
    if (level == Level::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        level = Level::avx512;
    if (const char* wanted = std::getenv("PTQ4CUDA_SIMD")) {
        for (Level l : {Level::baseline, Level::avx2})
            if (!std::strcmp(wanted, name(l)) && l < level) level = l;
    }
    return level;
}

template <class Kernel, class... Args>
PTQ_TARGET_AVX2 void run_avx2(Args... args) {
    Kernel::run(args...);
}
template <class Kernel, class... Args>
PTQ_TARGET_AVX512 void run_avx512(Args... args) {
    Kernel::run(args...);
}
#else
inline Level detect() { return Level::baseline; }
#endif

inline Level level() {
    static const Level detected = detect();
    return detected;
}

template <class Kernel, class... Args>
void run(Args... args) {
#if defined(__x86_64__)
    switch (level()) {
        case Level::avx512: return run_avx512<Kernel>(args...);
        case Level::avx2: return run_avx2<Kernel>(args...);
        default: break;
    }
#endif
    Kernel::run(args...);
}

// --- eight values at once ------------------------------------------------------------------------------------
//
// Vectors of the compiler, for reductions: accumulators that are values stay in registers, where arrays would not.
// Every instruction set does the same arithmetic in the same eight lanes. None is wider than 32 bytes: the compiler
// takes wider ones through memory where AVX-512 is off.

constexpr int kLanes = 8;
using Float8 = float __attribute__((vector_size(4 * kLanes)));
using Double4 = double __attribute__((vector_size(32)));
using Int8 = int32_t __attribute__((vector_size(4 * kLanes)));
using UInt8 = uint32_t __attribute__((vector_size(4 * kLanes)));
using UShort8 = uint16_t __attribute__((vector_size(2 * kLanes)));

// Results go out by reference: returning a vector by value has no settled ABI where its instruction set is off.
PTQ_INLINE void load_floats(const float* x, Float8& v) { std::memcpy(&v, x, sizeof v); }

PTQ_INLINE void load_bits(const void* x, UInt8& bits) {
    UShort8 h;
    std::memcpy(&h, x, sizeof h);
    bits = __builtin_convertvector(h, UInt8);
}

PTQ_INLINE void load_floats(const torch::headeronly::BFloat16* x, Float8& v) {
    UInt8 bits;
    load_bits(x, bits);
    v = (Float8)(bits << 16);
}

// Exact for all values. A subnormal half is a normal float; it is made without passing through subnormal floats,
// which the processor may flush to zero.
PTQ_INLINE void load_floats(const torch::headeronly::Half* x, Float8& v) {
    UInt8 h;
    load_bits(x, h);
    const UInt8 magnitude = h & 0x7fff;
    const UInt8 normal = (magnitude << 13) + (112u << 23);
    const UInt8 special = magnitude << 13 | 0x7f800000u;
    const UInt8 subnormal = (UInt8)((Float8)(magnitude | 126u << 23) - 0.5f);  // magnitude * 2^-24
    UInt8 bits = magnitude < 0x0400 ? subnormal : normal;
    bits = magnitude >= 0x7c00 ? special : bits;
    v = (Float8)(bits | (h & 0x8000) << 16);
}

PTQ_INLINE void store_floats(const Float8& v, float* y) { std::memcpy(y, &v, sizeof v); }

PTQ_INLINE void store_bits(const UInt8& bits, void* y) {
    const UShort8 h = __builtin_convertvector(bits, UShort8);
    std::memcpy(y, &h, sizeof h);
}

// Round half to even; NaN stays NaN.
PTQ_INLINE void store_floats(const Float8& v, torch::headeronly::BFloat16* y) {
    const UInt8 bits = (UInt8)v;
    const UInt8 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    store_bits(v == v ? rounded : UInt8{} + 0x7fc0, y);
}

// Round half to even. Adding 0.5 leaves a multiple of 2^-24, which is what a subnormal half counts.
PTQ_INLINE void store_floats(const Float8& v, torch::headeronly::Half* y) {
    const UInt8 magnitude = (UInt8)v & 0x7fffffff;
    const UInt8 normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    const UInt8 subnormal = (UInt8)((Float8)magnitude + 0.5f) - (126u << 23);
    UInt8 bits = magnitude < 113u << 23 ? subnormal : normal;
    bits = magnitude >= 0x477ff000 ? UInt8{} + 0x7c00 : bits;  // 65520 and above
    bits = magnitude > 0x7f800000 ? UInt8{} + 0x7e00 : bits;
    store_bits(bits | ((UInt8)v >> 16 & 0x8000), y);
}

// n values to float32, and back.
template <class T>
PTQ_INLINE void widen(const T* x, float* y, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        Float8 v;
        load_floats(x + i, v);
        store_floats(v, y + i);
    }
    for (; i < n; ++i) y[i] = static_cast<float>(x[i]);
}
template <class T>
PTQ_INLINE void narrow(const float* x, T* y, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        Float8 v;
        load_floats(x + i, v);
        store_floats(v, y + i);
    }
    for (; i < n; ++i) y[i] = static_cast<T>(x[i]);
}

struct Double8 {
    Double4 half[2] = {};
};

PTQ_INLINE void to_double(const Float8& v, Double8& d) {
    using Float4 = float __attribute__((vector_size(16)));
    Float4 low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    d.half[0] = __builtin_convertvector(low, Double4);
    d.half[1] = __builtin_convertvector(high, Double4);
}

}  // namespace ptq4cuda::simd
