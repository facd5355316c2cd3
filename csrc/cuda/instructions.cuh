// Single instructions that C++ has no word for, or that the compiler would not choose. launch.cuh includes this;
// tests/cuda_on_cpu/model/cuda_on_cpu.h has the same functions for the CPU.
#pragma once

#if !defined(PTQ4CUDA_ON_CPU)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace ptq4cuda {

// Registers from aligned memory and back, 16 bytes at a time where there are so many. (The compiler splits the store
// of a struct into stores of its members as soon as it knows them one by one.)
template <int kBytes>
__device__ __forceinline__ Words<kBytes> load_words(const void* p) {
    Words<kBytes> w;
    if constexpr (kBytes == 2) {
        w.at[0] = *static_cast<const uint16_t*>(p);
    } else if constexpr (kBytes == 4) {
        w.at[0] = *static_cast<const uint32_t*>(p);
    } else if constexpr (kBytes == 8) {
        const uint2 v = *static_cast<const uint2*>(p);
        w.at[0] = v.x, w.at[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < kBytes / 16; ++i) {
            const uint4 v = static_cast<const uint4*>(p)[i];
            w.at[4 * i] = v.x, w.at[4 * i + 1] = v.y, w.at[4 * i + 2] = v.z, w.at[4 * i + 3] = v.w;
        }
    }
    return w;
}

// Nothing is stored, and no branch taken, where `inside` is false.
template <int kBytes>
__device__ __forceinline__ void store_words(void* p, const Words<kBytes>& w, bool inside = true) {
#define PTQ_STORE "{ .reg .pred inside; setp.ne.u32 inside, %0, 0; @inside st.global."
    if constexpr (kBytes == 2) {
        if (inside) *static_cast<uint16_t*>(p) = static_cast<uint16_t>(w.at[0]);
    } else if constexpr (kBytes == 4) {
        if (inside) *static_cast<uint32_t*>(p) = w.at[0];
    } else if constexpr (kBytes == 8) {
        asm volatile(PTQ_STORE "v2.b32 [%1], {%2, %3}; }" ::"r"(uint32_t{inside}), "l"(p), "r"(w.at[0]), "r"(w.at[1])
                     : "memory");
    } else {
#pragma unroll
        for (int i = 0; i < kBytes / 16; ++i)
            asm volatile(PTQ_STORE "v4.b32 [%1], {%2, %3, %4, %5}; }" ::"r"(uint32_t{inside}),
                         "l"(static_cast<uint4*>(p) + i), "r"(w.at[4 * i]), "r"(w.at[4 * i + 1]),
                         "r"(w.at[4 * i + 2]), "r"(w.at[4 * i + 3])
                         : "memory");
    }
#undef PTQ_STORE
}

template <class T>
__device__ __forceinline__ uint32_t bits_of(const T& two) {
    return *reinterpret_cast<const uint32_t*>(&two);
}
template <class T>
__device__ __forceinline__ T as(uint32_t bits) {
    return *reinterpret_cast<const T*>(&bits);
}

// The larger and the smaller of two numbers; NaN if one of them is.
__device__ __forceinline__ float max_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
#else
    return a > b || a != a ? a : b;
#endif
}
__device__ __forceinline__ float min_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float c;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
#else
    return a < b || a != a ? a : b;
#endif
}

// The same for a word of values: one float, or two of the other types.
template <class T>
__device__ __forceinline__ uint32_t max_nan_word(uint32_t a, uint32_t b) {
    if constexpr (std::is_same_v<T, float>) {
        return __float_as_uint(max_nan(__uint_as_float(a), __uint_as_float(b)));
    } else if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
        return bits_of(__hmax2_nan(as<__half2>(a), as<__half2>(b)));
    } else {
        return bits_of(__hmax2_nan(as<__nv_bfloat162>(a), as<__nv_bfloat162>(b)));
    }
}
template <class T>
__device__ __forceinline__ uint32_t min_nan_word(uint32_t a, uint32_t b) {
    if constexpr (std::is_same_v<T, float>) {
        return __float_as_uint(min_nan(__uint_as_float(a), __uint_as_float(b)));
    } else if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
        return bits_of(__hmin2_nan(as<__half2>(a), as<__half2>(b)));
    } else {
        return bits_of(__hmin2_nan(as<__nv_bfloat162>(a), as<__nv_bfloat162>(b)));
    }
}

// How many values of a word are > 0.
template <class T>
__device__ __forceinline__ uint32_t count_positive(uint32_t word) {
    if constexpr (std::is_same_v<T, float>) {
        return __uint_as_float(word) > 0.0f;
    } else {
        uint32_t mask = 0;  // all bits of the places whose value is
        if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
            mask = __hgt2_mask(as<__half2>(word), as<__half2>(0));
        } else {
            mask = __hgt2_mask(as<__nv_bfloat162>(word), as<__nv_bfloat162>(0));
        }
        return __dp4a(static_cast<int>(mask), 0x00ff00ff, 0);  // -1 times -1 for each place
    }
}

// Two values in a word, rounded to T, the first one in the low half.
template <class T>
__device__ __forceinline__ uint32_t word_of_two(float first, float second);
template <>
__device__ __forceinline__ uint32_t word_of_two<torch::headeronly::Half>(float first, float second) {
    return bits_of(__floats2half2_rn(first, second));
}
template <>
__device__ __forceinline__ uint32_t word_of_two<torch::headeronly::BFloat16>(float first, float second) {
    return bits_of(__floats2bfloat162_rn(first, second));
}

// The bits of a where the mask has ones, those of b elsewhere.
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
    uint32_t bits;
    asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(bits) : "r"(mask), "r"(a), "r"(b));
    return bits;
}

// a + b, which must fit, between 0 and `largest`.
__device__ __forceinline__ int32_t add_clamped(int32_t a, int32_t b, int32_t largest) {
    return __viaddmin_s32_relu(a, b, largest);
}

// Row i of an array in global memory; neither number is negative. (The compiler would extend both to 64 bits first.)
template <class T>
__device__ __forceinline__ T* row_of(T* array, int i, int row) {
    size_t address;
    asm("mad.wide.u32 %0, %1, %2, %3;"
        : "=l"(address)
        : "r"(i), "r"(row * static_cast<int>(sizeof(T))), "l"(__cvta_generic_to_global(array)));
    return static_cast<T*>(__cvta_global_to_generic(address));
}

// An address that others count from. (The compiler would rather work out each of them anew.)
template <class T>
__device__ __forceinline__ T* worked_out(T* p) {
    asm volatile("" : "+l"(p));
    return p;
}

// Counters in shared memory.
class SharedCounters {
public:
    SharedCounters() = default;
    __device__ __forceinline__ explicit SharedCounters(uint32_t* counters)
        : address_(static_cast<uint32_t>(__cvta_generic_to_shared(counters))) {}

    __device__ __forceinline__ void count(int32_t i) const {
        asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(address_ + 4 * i) : "memory");
    }

private:
    uint32_t address_;
};

}  // namespace ptq4cuda
#endif
