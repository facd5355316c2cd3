// The arithmetic of numerics.h as the memory-bound kernels do it: the same results, bit for bit, in fewer
// instructions.
//
// The zero point moves from the value to the bounds, where it costs nothing:
//     clamp(rint(t) + z, 0, qmax) = clamp(rint(t), -z, qmax - z) + z
// All of these are integers below 2^24, so that nothing is rounded (zero points are at most 2^22). The right side is
// called a level plus z: a level is a code as it counts from the zero point.
#pragma once

#include "launch.cuh"

namespace ptq4cuda {
namespace {

// --- values in registers -----------------------------------------------------------------------------------------

// Value i of the type T in a word; a float fills its word, two of the others do.
template <class T>
__device__ __forceinline__ float value_in(uint32_t word, int i) {
    using torch::headeronly::BFloat16, torch::headeronly::Half;
    if constexpr (std::is_same_v<T, float>) {
        return __uint_as_float(word);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        return __uint_as_float(i == 0 ? word << 16 : word & 0xffff0000u);
    } else {
        return static_cast<float>(Half(static_cast<uint16_t>(i == 0 ? word : word >> 16), Half::from_bits()));
    }
}

// Values that words hold; those of a type as bytes(n).
template <class T, int N>
struct Values {
    static constexpr int kBytes = N * sizeof(T), kPerWord = 4 / sizeof(T);
    static __device__ __forceinline__ float get(const Words<kBytes>& words, int i) {
        return value_in<T>(words.at[i / kPerWord], i % kPerWord);
    }
    // Fills the words with f(i).
    template <class F>
    static __device__ __forceinline__ Words<kBytes> make(const F& f) {
        Words<kBytes> words;
#pragma unroll
        for (int i = 0; i < ceil_div(N, kPerWord); ++i) {
            if constexpr (N < kPerWord) {
                words.at[0] = word_of_two<T>(f(0), 0.0f);
            } else if constexpr (kPerWord == 1) {
                words.at[i] = __float_as_uint(f(i));
            } else {
                words.at[i] = word_of_two<T>(f(2 * i), f(2 * i + 1));
            }
        }
        return words;
    }
};

// Neighbouring values of T, from or to any address; `aligned` is the same for a whole launch.
template <class T, int kBytes>
__device__ __forceinline__ Words<kBytes> load_group(const T* p, bool aligned) {
    if (aligned) return load_words<kBytes>(p);
    Vector<T, kBytes / sizeof(T)> v;
#pragma unroll
    for (size_t i = 0; i < kBytes / sizeof(T); ++i) v.at[i] = p[i];
    Words<kBytes> words{};
    memcpy(&words, &v, kBytes);
    return words;
}

template <class T, int kBytes>
__device__ __forceinline__ void store_group(T* p, const Words<kBytes>& words, bool aligned) {
    if (aligned) return store_words(p, words);
    Vector<T, kBytes / sizeof(T)> v;
    memcpy(&v, &words, kBytes);
#pragma unroll
    for (size_t i = 0; i < kBytes / sizeof(T); ++i) p[i] = v.at[i];
}

// --- a quantizer as the three kinds of work need it --------------------------------------------------------------

// Quantize and dequantize. NaN passes through.
struct alignas(16) FakeQuantizing {
    float inv_scale, scale, low, high;

    FakeQuantizing() = default;
    __device__ __forceinline__ explicit FakeQuantizing(const Quantizer& q)
        : inv_scale(q.inv_scale), scale(q.scale), low(0.0f - q.zero_point), high(q.qmax - q.zero_point) {}

    __device__ __forceinline__ float operator()(float x) const {
        const float level = min_nan(max_nan(rintf(x * inv_scale), low), high);
        return fmaf(level, scale, 0.0f);  // the sum changes nothing but the sign of -0
    }
};

// Codes are sums: code = level + zero point. So a word of codes is the sum of its shifted levels and a word of zero
// points, which does not depend on the values. (The conversion makes 0 of NaN, and the bounds the level that is
// nearest to it; what is too large for an integer becomes the largest one.)
struct alignas(16) Coding {
    float inv_scale;
    int32_t low, high;

    Coding() = default;
    __device__ __forceinline__ explicit Coding(const Quantizer& q)
        : inv_scale(q.inv_scale),
          low(static_cast<int32_t>(0.0f - q.zero_point)),
          high(static_cast<int32_t>(q.qmax - q.zero_point)) {}

    __device__ __forceinline__ int32_t level(float x) const {
        return min(max(__float2int_rn(x * inv_scale), low), high);
    }
    __device__ __forceinline__ uint32_t zero_point() const { return -static_cast<uint32_t>(low); }
};

// From codes to values. A code is the lowest bits of the float 2^23 + code.
struct alignas(8) Decoding {
    float scale, offset;

    Decoding() = default;
    __device__ __forceinline__ explicit Decoding(const Quantizer& q)
        : scale(q.scale), offset(8388608.0f + q.zero_point) {}

    // `bits` are those of 2^23 + code.
    __device__ __forceinline__ float operator()(uint32_t bits) const {
        return (__uint_as_float(bits) - offset) * scale;
    }
};

// The bin of a value; the one behind the last for NaN, so that no branch is needed. (A maximum passes over NaN, which
// is also what Inf * 0 gives.)
struct Bins {
    float low, factor, last;

    Bins() = default;
    __device__ __forceinline__ explicit Bins(const Binning& b) : low(b.low), factor(b.factor), last(b.last) {}

    __device__ __forceinline__ int32_t operator()(float x) const {
        const float t = fminf(fmaxf((x - low) * factor, 0.0f), last);
        return static_cast<int32_t>(x == x ? t : last + 1.0f);
    }
};

// Eight 4-bit codes of a word, lowest first, as Decoding takes them.
struct Nibbles {
    uint32_t even, odd;  // a code a byte

    __device__ __forceinline__ Nibbles(uint32_t even_, uint32_t odd_) : even(even_), odd(odd_) {}
    __device__ __forceinline__ explicit Nibbles(uint32_t word)
        : even(word & 0x0f0f0f0f), odd(word >> 4 & 0x0f0f0f0f) {}

    __device__ __forceinline__ uint32_t bits(int j) const {
        return __byte_perm(j % 2 ? odd : even, 0x4b000000, 0x7440 + j / 2);  // 2^23 is 0x4b000000
    }
};

}  // namespace
}  // namespace ptq4cuda
