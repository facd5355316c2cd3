// One loop, compiled for several instruction sets, chosen at run time.
//
// A kernel is a struct with a static, always-inlined `run`. simd::run<Kernel>(args...) calls the copy that was
// compiled for the best instruction set of this machine; the compiler vectorises `run` once per copy. Whatever
// `run` calls must be always-inlined too (PTQ_INLINE), or it stays scalar.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "../numerics.h"

namespace ptq4cuda::simd {

constexpr int64_t kLine = 64;  // bytes of a cache line, which comes from memory at a time
template <class T>
constexpr int64_t kLineOf = kLine / sizeof(T);  // values

// From the slowest to the fastest. Each has all that the one before has, but that AVX-512 has no VNNI of 256 bits.
enum class Level { baseline, avx2, avx_vnni, avx512, avx512_vnni, amx };

inline const char* name(Level level) {
    switch (level) {
        case Level::amx: return "amx";
        case Level::avx512_vnni: return "avx512_vnni";
        case Level::avx512: return "avx512";
        case Level::avx_vnni: return "avx_vnni";
        case Level::avx2: return "avx2";
        default: return "baseline";
    }
}

#if defined(__x86_64__)
constexpr Level kLevels[] = {Level::baseline, Level::avx2,        Level::avx_vnni,
                             Level::avx512,   Level::avx512_vnni, Level::amx};

#define PTQ_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define PTQ_TARGET_AVX_VNNI __attribute__((target("avxvnni,avx2,fma,f16c")))
#define PTQ_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define PTQ_TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define PTQ_TARGET_AMX \
    __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))

#define PTQ_AVX2_INLINE PTQ_TARGET_AVX2 inline __attribute__((always_inline))
#define PTQ_AVX_VNNI_INLINE PTQ_TARGET_AVX_VNNI inline __attribute__((always_inline))
#define PTQ_AVX512_INLINE PTQ_TARGET_AVX512 inline __attribute__((always_inline))
#define PTQ_VNNI_INLINE PTQ_TARGET_VNNI inline __attribute__((always_inline))

PTQ_AVX2_INLINE __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// The system saves the registers of AMX only for a process that has asked for them.
inline bool has_amx() {
#if defined(__linux__)
    constexpr long kAskForComponent = 0x1023, kTiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a = 0, b, c, d = 0;
    const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1);  // tiles, of bytes
    return there && syscall(SYS_arch_prctl, kAskForComponent, kTiles) == 0;
#else
    return false;
#endif
}

inline bool has(Level level) {
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    switch (level) {
        case Level::amx: return has(Level::avx512_vnni) && has_amx();
        case Level::avx512_vnni: return avx512 && __builtin_cpu_supports("avx512vnni");
        case Level::avx512: return avx512;
        case Level::avx_vnni: {  // which not every compiler knows by name
            unsigned a = 0, b, c, d;
            return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
        }
        case Level::avx2: return avx2;
        default: return true;
    }
}

// PTQ4CUDA_SIMD=baseline|avx2|avx_vnni|avx512|avx512_vnni|amx lowers the level, for tests and bug reports.
inline Level detect() {
    const char* most = std::getenv("PTQ4CUDA_SIMD");
    Level level = Level::baseline;
    for (Level l : kLevels) {
        if (has(l)) level = l;
        if (most && !std::strcmp(most, name(l))) break;
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
constexpr Level kLevels[] = {Level::baseline};

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
        case Level::amx:
        case Level::avx512_vnni:
        case Level::avx512: return run_avx512<Kernel>(args...);
        case Level::avx_vnni:
        case Level::avx2: return run_avx2<Kernel>(args...);
        default: break;
    }
#endif
    Kernel::run(args...);
}

// --- 16-bit floats ---
//
// Conversions without branches, so that loops over them vectorise. Magnitudes are compared as signed numbers: AVX2
// has no comparison of unsigned ones.

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <class To, class From>
PTQ_INLINE To reinterpret(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

PTQ_INLINE float to_float(float x) { return x; }
PTQ_INLINE float to_float(uint8_t x) { return static_cast<float>(x); }
PTQ_INLINE float to_float(const BFloat16& x) { return reinterpret<float>(static_cast<uint32_t>(x.x) << 16); }

// A subnormal half is a normal float. It is made from 0.5 + magnitude * 2^-24 and so without subnormal floats, which
// the processor may be told to flush to zero.
PTQ_INLINE float to_float(const Half& x) {
    const uint32_t bits = x.x, magnitude = bits & 0x7fff;
    const int32_t size = static_cast<int32_t>(magnitude);
    const uint32_t subnormal = reinterpret<uint32_t>(reinterpret<float>(magnitude | 126u << 23) - 0.5f);
    uint32_t result = size < 0x0400 ? subnormal : (magnitude << 13) + (112u << 23);
    result = size > 0x7bff ? magnitude << 13 | 0x7f800000u : result;
    return reinterpret<float>(result | (bits & 0x8000) << 16);
}

// Round half to even; NaN stays NaN.
PTQ_INLINE void store(uint8_t v, uint8_t& y) { y = v; }
PTQ_INLINE void store(float v, float& y) { y = v; }
PTQ_INLINE void store(float v, BFloat16& y) {
    const uint32_t word = reinterpret<uint32_t>(v), rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    y.x = static_cast<uint16_t>(v == v ? rounded : 0x7fc0);
}
PTQ_INLINE void store(float v, Half& y) {
    const uint32_t word = reinterpret<uint32_t>(v), magnitude = word & 0x7fffffff;
    const int32_t size = static_cast<int32_t>(magnitude);
    // The sum is a multiple of 2^-24, which is what a subnormal half counts.
    const uint32_t subnormal = reinterpret<uint32_t>(reinterpret<float>(magnitude) + 0.5f) - (126u << 23);
    uint32_t bits = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    bits = size < 113 << 23 ? subnormal : bits;
    bits = size > 0x477fefff ? 0x7c00 : bits;  // 65520 and above are infinite
    bits = size > 0x7f800000 ? 0x7e00 : bits;
    y.x = static_cast<uint16_t>(bits | (word >> 16 & 0x8000));
}

// --- blocks ---
//
// Halves are converted a block at a time, in memory that stays in the first-level cache: compilers know the
// instructions for it only by name, and names of instructions cannot be in loops that are compiled for several sets.

constexpr int64_t kBlock = 1024;  // values

template <class T>
struct Widen {
    static PTQ_INLINE void run(const T* __restrict x, float* __restrict y, int64_t n) {
        for (int64_t i = 0; i < n; ++i) y[i] = to_float(x[i]);
    }
};
template <class T>
struct Narrow {
    static PTQ_INLINE void run(const float* __restrict x, T* __restrict y, int64_t n) {
        for (int64_t i = 0; i < n; ++i) store(x[i], y[i]);
    }
};

// What is read next is `ahead` values away, on the machines where it makes a difference to know.
template <class T>
void widen(const T* x, float* y, int64_t n, int64_t /*ahead*/) {
    run<Widen<T>>(x, y, n);
}
template <class T>
void narrow(const float* x, T* y, int64_t n) {
    run<Narrow<T>>(x, y, n);
}

#if defined(__x86_64__)
PTQ_TARGET_AVX2 inline void widen_f16c(const Half* x, float* y, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
    for (; i < n; ++i) y[i] = to_float(x[i]);
}
PTQ_TARGET_AVX2 inline void narrow_f16c(const float* x, Half* y, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; ++i) store(x[i], y[i]);
}
PTQ_TARGET_AVX512 inline void widen_avx512(const Half* x, float* y, int64_t n, int64_t ahead) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __builtin_prefetch(x + i + ahead);
        _mm512_storeu_ps(y + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
        _mm512_storeu_ps(y + i + 16,
                         _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i + 16))));
    }
    for (; i < n; ++i) y[i] = to_float(x[i]);
}
PTQ_TARGET_AVX512 inline void narrow_avx512(const float* x, Half* y, int64_t n) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __builtin_prefetch(y + i + n, 1);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i),
                            _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i + 16),
                            _mm512_cvtps_ph(_mm512_loadu_ps(x + i + 16), _MM_FROUND_TO_NEAREST_INT));
    }
    for (; i < n; ++i) store(x[i], y[i]);
}
template <>
inline void widen(const Half* x, float* y, int64_t n, int64_t ahead) {
    if (level() >= Level::avx512) return widen_avx512(x, y, n, ahead);
    level() == Level::baseline ? run<Widen<Half>>(x, y, n) : widen_f16c(x, y, n);
}
template <>
inline void narrow(const float* x, Half* y, int64_t n) {
    if (level() >= Level::avx512) return narrow_avx512(x, y, n);
    level() == Level::baseline ? run<Narrow<Half>>(x, y, n) : narrow_f16c(x, y, n);
}
#endif

// What a loop reads or writes in place of values of type T: the values themselves, or a block of them as float32.
template <class T, int64_t kSize = kBlock>
class Block {
    static constexpr bool kConverts = std::is_same_v<T, Half>;

public:
    using Value = std::conditional_t<kConverts, float, T>;
    static constexpr int64_t kMaximum = kConverts ? kSize : INT64_MAX;

    const Value* read(const T* x, int64_t n, int64_t ahead) {
        if constexpr (kConverts) {
            widen(x, values_, n, ahead);
            return values_;
        } else {
            return x;
        }
    }
    // Where to write what is meant for y, before finish().
    Value* begin(T* y) {
        if constexpr (kConverts) {
            return values_;
        } else {
            return y;
        }
    }
    void finish(T* y, int64_t n) {
        if constexpr (kConverts) narrow(values_, y, n);
    }

private:
    alignas(64) Value values_[kConverts ? kSize : 1];
};

// --- memory ---

// A std::vector that begins with a cache line. Elsewhere every load of 64 bytes would take from two lines, which
// makes loops that read several vectors twice as slow.
template <class T>
struct LineAllocator {
    using value_type = T;

    LineAllocator() = default;
    template <class U>
    LineAllocator(const LineAllocator<U>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{kLine})); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{kLine}); }
    bool operator==(const LineAllocator&) const { return true; }
};
template <class T>
using Vector = std::vector<T, LineAllocator<T>>;

// Streaming: lines that are written whole need not be read from memory first, and pass by the caches. That pays for
// tensors whose beginning would have left the caches before the end is written. (What a system tells about the size
// of its last cache may be the sum of many, so it is not asked.)
#if defined(__x86_64__)
inline bool streams(int64_t bytes) { return bytes > 32 << 20; }

inline void stream_lines(const char* from, char* to, int64_t n) {
    for (int64_t i = 0; i < 4 * n; ++i)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i,
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i));
}
PTQ_TARGET_AVX512 inline void stream_lines_avx512(const char* from, char* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to) + i, _mm512_loadu_si512(from + kLine * i));
}
inline void stream(const void* values, void* target, int64_t bytes) {
    const char* from = static_cast<const char*>(values);
    char* to = static_cast<char*>(target);
    const int64_t head = std::min<int64_t>(-reinterpret_cast<uintptr_t>(to) & (kLine - 1), bytes);
    const int64_t n = (bytes - head) / kLine, whole = head + kLine * n;
    std::memcpy(to, from, head);
    level() >= Level::avx512 ? stream_lines_avx512(from + head, to + head, n)
                             : stream_lines(from + head, to + head, n);
    std::memcpy(to + whole, from + whole, bytes - whole);
}
// Before other threads read what was streamed.
inline void end_stream() { _mm_sfence(); }
#else
inline bool streams(int64_t) { return false; }
inline void stream(const void* from, void* to, int64_t bytes) { std::memcpy(to, from, bytes); }
inline void end_stream() {}
#endif

}  // namespace ptq4cuda::simd
