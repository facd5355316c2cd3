// The arithmetic of one value, for host and device: what every kernel computes. Where one has a shorter form of it
// (cpu/conv_finish.cpp, cuda/codes.cuh, cuda/conv_finish.cuh), that gives the same results, bit for bit.
//
// A quantizer maps x to an unsigned b-bit code and back:
//     code(x)  = clamp(rint(x * inv_scale) + zero_point, 0, 2^b - 1)
//     value(q) = (q - zero_point) * scale
// All of it is float32. `rint` rounds half to even. The product is rounded before rint (no fused
// multiply-add can merge the two), so the PyTorch reference, the CPU and the CUDA kernels agree bit for bit.
// The clamp happens in float, before any cast to an integer: +-Inf and 1e30 saturate.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PTQ_INLINE __host__ __device__ __forceinline__
#else
#define PTQ_INLINE inline __attribute__((always_inline))
#endif

namespace ptq4cuda {

// One channel's quantizer, integers held as floats (exact up to 2^24).
struct Quantizer {
    float inv_scale;   // 1 / scale, rounded once to float32
    float scale;       // > 0
    float zero_point;  // integer
    float qmax;        // 2^bits - 1, bits in 0..8
};

// (More than 8 bits, which a table on a device may hold, are 8.)
PTQ_INLINE Quantizer make_quantizer(float scale, int32_t zero_point, uint8_t bits) {
    const int levels = 1 << (bits < 8 ? bits : 8);
    return {1.0f / scale, scale, static_cast<float>(zero_point), static_cast<float>(levels - 1)};
}

// Clamp to [0, qmax]. NaN compares false twice and passes through.
PTQ_INLINE float clamp_code(float t, float qmax) {
    t = t < 0.0f ? 0.0f : t;
    return t > qmax ? qmax : t;
}

// The code of x as a float, or NaN for NaN.
PTQ_INLINE float float_code(float x, const Quantizer& q) {
    return clamp_code(rintf(x * q.inv_scale) + q.zero_point, q.qmax);
}

// The code whose value is nearest to zero: what padding becomes.
PTQ_INLINE float zero_code(const Quantizer& q) { return clamp_code(q.zero_point, q.qmax); }

// The same as an integer; NaN becomes the code of zero. (No NaN is left when it is clamped, so that a maximum and a
// minimum do.)
PTQ_INLINE int32_t int_code(float x, const Quantizer& q) {
    float t = rintf(x * q.inv_scale);
    t = (t == t ? t : 0.0f) + q.zero_point;
    t = t > 0.0f ? t : 0.0f;
    t = t < q.qmax ? t : q.qmax;
    return static_cast<int32_t>(t);
}
PTQ_INLINE uint8_t code(float x, const Quantizer& q) { return static_cast<uint8_t>(int_code(x, q)); }

PTQ_INLINE float value(float code, const Quantizer& q) { return (code - q.zero_point) * q.scale; }

// Quantize and dequantize; NaN stays NaN.
PTQ_INLINE float fake_quantize(float x, const Quantizer& q) { return value(float_code(x, q), q); }

// What to do with one value, for kernels that take the operation as a parameter.
struct FakeQuantize {
    template <class Out>
    static PTQ_INLINE Out apply(float x, const Quantizer& q) {
        return static_cast<Out>(fake_quantize(x, q));
    }
};
struct Quantize {
    template <class Out>
    static PTQ_INLINE Out apply(float x, const Quantizer& q) {
        return code(x, q);
    }
};
struct Dequantize {
    template <class Out>
    static PTQ_INLINE Out apply(float code, const Quantizer& q) {
        return static_cast<Out>(value(code, q));
    }
};

// What follows the integer sum of a convolution, each step rounded: scale, bias, then min(x if x > 0 else slope * x,
// upper), which is every piecewise linear activation. A slope of 0 gives +0, as a ReLU does, also of NaN. A sum
// beyond 2^24 is rounded to the nearest float.
PTQ_INLINE float scaled_sum(int32_t sum, float scale, float bias) { return static_cast<float>(sum) * scale + bias; }
PTQ_INLINE float activated(float x, float negative_slope, float upper) {
    const float low = negative_slope == 0.0f ? 0.0f : negative_slope * x;
    x = x > 0.0f ? x : low;
    return upper < x ? upper : x;
}

// Two 4-bit codes in a byte, low nibble first.
PTQ_INLINE uint8_t pack_nibbles(uint8_t low, uint8_t high) { return static_cast<uint8_t>(low | (high << 4)); }
PTQ_INLINE uint8_t low_nibble(uint8_t byte) { return byte & 0x0f; }
PTQ_INLINE uint8_t high_nibble(uint8_t byte) { return byte >> 4; }

// Bins of equal width between two limits. Where the limits are equal, or so far apart or so close together that the
// factor is not a positive finite number, it is 0 and all values are in the first bin.
struct Binning {
    float low;
    float factor;  // bins per unit of x
    float last;    // the last bin, exact up to 2^24
};

PTQ_INLINE Binning make_binning(float low, float high, int64_t bins) {
    const float count = static_cast<float>(bins), factor = count / (high - low);
    return {low, high > low && factor < INFINITY ? factor : 0.0f, count - 1.0f};
}

// The bin of x, -1 for NaN. Values outside of the limits are in the first or the last bin. (The cast of a number that
// is not negative is its floor; the first comparison also catches Inf * 0.)
PTQ_INLINE int32_t bin(float x, const Binning& b) {
    float t = (x - b.low) * b.factor;
    t = t > 0.0f ? t : 0.0f;
    t = t < b.last ? t : b.last;
    return x == x ? static_cast<int32_t>(t) : -1;
}

// Sums over a set of values, enough to merge two sets exactly: Chan, Golub, LeVeque (1979).
struct Moments {
    double count = 0.0;
    double mean = 0.0;
    double m2 = 0.0;  // sum of squared deviations from the mean
    double positive = 0.0;
    float min = INFINITY;
    float max = -INFINITY;
};

// NaN on either side wins, as in torch.amin and torch.amax.
PTQ_INLINE float nan_min(float a, float b) { return (a != a || a < b) ? a : b; }
PTQ_INLINE float nan_max(float a, float b) { return (a != a || a > b) ? a : b; }

PTQ_INLINE Moments merge(const Moments& a, const Moments& b) {
    if (a.count == 0.0) return b;
    if (b.count == 0.0) return a;
    Moments m;
    m.count = a.count + b.count;
    const double delta = b.mean - a.mean;
    m.mean = a.mean + delta * (b.count / m.count);
    m.m2 = a.m2 + b.m2 + delta * delta * (a.count * b.count / m.count);
    m.positive = a.positive + b.positive;
    m.min = nan_min(a.min, b.min);
    m.max = nan_max(a.max, b.max);
    return m;
}

// Moments from sums taken about a shift near the data: sum(x - shift), sum((x - shift)^2).
PTQ_INLINE Moments from_shifted_sums(double count, double shift, double sum, double sum_squares, double positive,
                                     float min, float max) {
    Moments m;
    m.count = count;
    if (count == 0.0) return m;
    const double offset = sum / count;
    m.mean = shift + offset;
    const double m2 = sum_squares - sum * offset;
    m.m2 = m2 < 0.0 ? 0.0 : m2;  // NaN passes through
    m.positive = positive;
    m.min = min;
    m.max = max;
    return m;
}

}  // namespace ptq4cuda
