// One loop, compiled for several instruction sets, chosen at run time.
//
// A kernel is a struct with a static, always-inlined `run`. simd::run<Kernel>(args...) calls the copy that was
// compiled for the best instruction set of this machine; the compiler vectorises `run` once per copy. Whatever
// `run` calls must be always-inlined too (PTQ_INLINE), or it stays scalar.
#pragma once

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

}  // namespace ptq4cuda::simd
