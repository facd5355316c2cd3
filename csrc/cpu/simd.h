// One loop, compiled for several instruction sets, chosen at run time.
//
// A kernel is a struct with a static, always-inlined `run`. simd::run<Kernel>(args...) calls the copy that was
// compiled for the best instruction set of this machine; the compiler vectorises `run` once per copy. Whatever
// `run` calls must be always-inlined too (PTQ_INLINE), or it stays scalar.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

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

// --- 16-bit floats -------------------------------------------------------------------------------------------------
//
// Conversions without branches, so that loops over them vectorise. Written once for scalars (uint32_t, float) and for
// the vectors of eight below. Magnitudes are compared as signed numbers: AVX2 has no comparison of unsigned ones.
// Results go out by reference: returning a vector by value has no settled ABI where its instruction set is off.

constexpr int kLanes = 8;
using Float8 = float __attribute__((vector_size(32)));
using Int8 = int32_t __attribute__((vector_size(32)));
using UInt8 = uint32_t __attribute__((vector_size(32)));

template <class U>
using Signed = std::conditional_t<std::is_same_v<U, uint32_t>, int32_t, Int8>;

template <class To, class From>
PTQ_INLINE void reinterpret(const From& from, To& to) {
    static_assert(sizeof(To) == sizeof(From));
    std::memcpy(&to, &from, sizeof(To));
}

template <class U, class F>
PTQ_INLINE void widen(const torch::headeronly::BFloat16*, const U& bits, F& v) {
    reinterpret(U(bits << 16), v);
}

// A subnormal half is a normal float. It is made from 0.5 + magnitude * 2^-24 and so without subnormal floats, which
// the processor may be told to flush to zero.
template <class U, class F>
PTQ_INLINE void widen(const torch::headeronly::Half*, const U& bits, F& v) {
    const U magnitude = bits & 0x7fff;
    const Signed<U> size = (Signed<U>)magnitude;
    F half;
    reinterpret(U(magnitude | 126u << 23), half);
    U subnormal;
    reinterpret(F(half - 0.5f), subnormal);
    U result = size < 0x0400 ? subnormal : U((magnitude << 13) + (112u << 23));
    result = size > 0x7bff ? U(magnitude << 13 | 0x7f800000u) : result;
    reinterpret(U(result | (bits & 0x8000) << 16), v);
}

// Round half to even; NaN stays NaN.
template <class U, class F>
PTQ_INLINE void narrow(const F& v, const torch::headeronly::BFloat16*, U& bits) {
    U word;
    reinterpret(v, word);
    const Signed<U> size = (Signed<U>)(word & 0x7fffffff);
    const U rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    bits = size > 0x7f800000 ? U(rounded | 0x7fff) : rounded;
}

template <class U, class F>
PTQ_INLINE void narrow(const F& v, const torch::headeronly::Half*, U& bits) {
    U word;
    reinterpret(v, word);
    const U magnitude = word & 0x7fffffff;
    const Signed<U> size = (Signed<U>)magnitude;
    F positive;
    reinterpret(magnitude, positive);
    U subnormal;  // the sum is a multiple of 2^-24, which is what a subnormal half counts
    reinterpret(F(positive + 0.5f), subnormal);
    bits = size < 113 << 23 ? U(subnormal - (126u << 23))
                            : U((magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13);
    bits = size > 0x477fefff ? U(bits * 0 + 0x7c00) : bits;  // 65520 and above are infinite
    bits = size > 0x7f800000 ? U(bits | 0x7e00) : bits;
    bits |= word >> 16 & 0x8000;
}

PTQ_INLINE float to_float(float x) { return x; }
PTQ_INLINE float to_float(uint8_t x) { return static_cast<float>(x); }
template <class T>
PTQ_INLINE float to_float(const T& x) {
    float v;
    widen(&x, static_cast<uint32_t>(x.x), v);
    return v;
}

PTQ_INLINE void store(uint8_t v, uint8_t& y) { y = v; }
PTQ_INLINE void store(float v, float& y) { y = v; }
template <class T>
PTQ_INLINE void store(float v, T& y) {
    uint32_t bits;
    narrow(v, &y, bits);
    y.x = static_cast<uint16_t>(bits);
}

// --- eight values at once
// -------------------------------------------------------------------------------------------
//
// Vectors of the compiler, for reductions: accumulators that are values stay in registers, where arrays would not.
// Every instruction set does the same arithmetic in the same eight lanes. None is wider than 32 bytes: the compiler
// takes wider ones through memory where AVX-512 is off.

using UShort8 = uint16_t __attribute__((vector_size(16)));
using Double4 = double __attribute__((vector_size(32)));
struct Double8 {
    Double4 half[2];
};

PTQ_INLINE void load(const float* x, Float8& v) { std::memcpy(&v, x, sizeof v); }
template <class T>
PTQ_INLINE void load(const T* x, Float8& v) {
    UShort8 bits;
    std::memcpy(&bits, x, sizeof bits);
    widen(x, __builtin_convertvector(bits, UInt8), v);
}

PTQ_INLINE void to_double(const Float8& v, Double8& d) {
    using Float4 = float __attribute__((vector_size(16)));
    Float4 low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    d.half[0] = __builtin_convertvector(low, Double4);
    d.half[1] = __builtin_convertvector(high, Double4);
}

PTQ_INLINE void absolute(const Double4& d, Double4& result) {
    using Long4 = int64_t __attribute__((vector_size(32)));
    Long4 bits;
    reinterpret(d, bits);
    reinterpret(Long4(bits & INT64_MAX), result);
}

}  // namespace ptq4cuda::simd
