// From the integer sums of conv2d_integer to its outputs: a few pixels and the 16 outputs of one panel at a time.
#pragma once

#include <array>

#include "conv_tiles.h"

namespace ptq4cuda {

// The parameters of a panel's outputs: field f of output o is parameters[16 f + o].
enum Field {
    kScale,
    kBias,
    kResidualScale,
    kResidualZeroPoint,
    kInvScale,
    kZeroPoint,
    kQmax,
    // For AVX2: the zero point as an integer, the limits of rint(y / scale), those of a ReLU among them.
    kZeroPointBits,
    kLowest,
    kHighest,
    kFields
};

// What the activation is made of: nothing, a ReLU, or anything piecewise linear.
enum class Curve { identity, relu, other };

// Outputs, and the residual's codes, lie `stride` apart from pixel to pixel.
template <class T>
using Finisher = void (*)(const int32_t* sums, int64_t pixels, int64_t stride, const uint8_t* residual, T* y,
                          const float* parameters, Activation);

inline Curve curve_of(const Activation& act) {
    if (act.upper != INFINITY) return Curve::other;
    return act.negative_slope == 1.0f ? Curve::identity : act.negative_slope == 0.0f ? Curve::relu : Curve::other;
}

// The parameters of output channel o of a problem, one for each field, for an output with a quantizer or without.
inline std::array<float, kFields> parameters_of(const ConvProblem& problem, const QuantizerTable& quantizer,
                                                int64_t o) {
    const Quantizer added = problem.residual ? problem.residual_quantizer[o] : Quantizer{};
    const Quantizer out = quantizer.scale ? quantizer[o] : Quantizer{};
    const int32_t zero_point = static_cast<int32_t>(out.zero_point);
    float zero_point_bits;
    std::memcpy(&zero_point_bits, &zero_point, sizeof zero_point);
    float lowest = -out.zero_point, highest = out.qmax - out.zero_point;
    if (curve_of(problem.activation) == Curve::relu) lowest = std::clamp(0.0f, lowest, highest);
    return {problem.scale[o], problem.bias[o], added.scale,     added.zero_point, out.inv_scale,
            out.zero_point,   out.qmax,        zero_point_bits, lowest,           highest};
}

template <class T, bool kResidual, Curve curve>
struct Finish {
    static PTQ_INLINE void run(const int32_t* __restrict sums, int64_t pixels, int64_t stride,
                               const uint8_t* __restrict residual, T* __restrict y,
                               const float* __restrict parameters, Activation act) {
        for (int64_t p = 0; p < pixels; ++p, sums += kPanelOutputs, residual += kResidual ? stride : 0, y += stride)
            for (int o = 0; o < kPanelOutputs; ++o) {
                const auto of = [&](Field f) { return parameters[f * kPanelOutputs + o]; };
                float v = scaled_sum(sums[o], of(kScale), of(kBias));
                if (kResidual)
                    v += value(simd::to_float(residual[o]), {0.0f, of(kResidualScale), of(kResidualZeroPoint), 0.0f});
                if (curve == Curve::relu) v = v > 0.0f ? v : 0.0f;
                if (curve == Curve::other) v = activated(v, act.negative_slope, act.upper);
                if constexpr (std::is_same_v<T, uint8_t>) {
                    y[o] = code(v, {of(kInvScale), 0.0f, of(kZeroPoint), of(kQmax)});
                } else {
                    simd::store(v, y[o]);
                }
            }
    }
};

#if defined(__x86_64__)
// The same for codes, eight at a time and with fewer steps. Rounding keeps order, as a product with a positive number
// does: so both ends of the codes, and those of a ReLU, can be taken as limits before rint, in units of codes, and
// the conversion to integers rounds. (It rounds half to even, as rint does.) Only what NaN becomes is not the same.
template <bool kResidual, Curve curve>
PTQ_AVX2_INLINE __m256i finish_eight(const int32_t* sums, const uint8_t* residual, const float* parameters,
                                     const Activation& act) {
    const auto of = [&](Field f) { return parameters + f * kPanelOutputs; };
    __m256 v = _mm256_cvtepi32_ps(load_bytes(sums));
    v = _mm256_add_ps(_mm256_mul_ps(v, _mm256_loadu_ps(of(kScale))), _mm256_loadu_ps(of(kBias)));
    if (kResidual) {
        const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(residual));
        __m256 r = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes));
        r = _mm256_sub_ps(r, _mm256_loadu_ps(of(kResidualZeroPoint)));
        v = _mm256_add_ps(v, _mm256_mul_ps(r, _mm256_loadu_ps(of(kResidualScale))));
    }
    if (curve == Curve::other) {
        const __m256 low = _mm256_mul_ps(v, _mm256_set1_ps(act.negative_slope));
        v = _mm256_blendv_ps(low, v, _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GT_OQ));
        v = _mm256_min_ps(_mm256_set1_ps(act.upper), v);
    }
    v = _mm256_mul_ps(v, _mm256_loadu_ps(of(kInvScale)));
    v = _mm256_min_ps(_mm256_max_ps(v, _mm256_loadu_ps(of(kLowest))), _mm256_loadu_ps(of(kHighest)));
    return _mm256_add_epi32(_mm256_cvtps_epi32(v), load_bytes(of(kZeroPointBits)));
}

template <bool kResidual, Curve curve>
PTQ_TARGET_AVX2 void finish_avx2(const int32_t* sums, int64_t pixels, int64_t stride, const uint8_t* residual,
                                 uint8_t* y, const float* parameters, Activation act) {
    for (int64_t p = 0; p < pixels; ++p, sums += kPanelOutputs, residual += kResidual ? stride : 0, y += stride) {
        const __m256i low = finish_eight<kResidual, curve>(sums, residual, parameters, act);
        const __m256i high = finish_eight<kResidual, curve>(sums + 8, residual + 8, parameters + 8, act);
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
        const __m128i codes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y), codes);
    }
}
#endif

template <class T, bool kResidual, Curve curve>
Finisher<T> finisher() {
#if defined(__x86_64__)
    if constexpr (std::is_same_v<T, uint8_t>)
        if (simd::level() >= simd::Level::avx2) return finish_avx2<kResidual, curve>;
#endif
    return &simd::run<Finish<T, kResidual, curve>>;
}

template <class T, bool kResidual>
Finisher<T> finisher(const Activation& act) {
    switch (curve_of(act)) {
        case Curve::identity: return finisher<T, kResidual, Curve::identity>();
        case Curve::relu: return finisher<T, kResidual, Curve::relu>();
        default: return finisher<T, kResidual, Curve::other>();
    }
}

template <class T>
Finisher<T> finisher(const ConvProblem& problem) {
    return problem.residual ? finisher<T, true>(problem.activation) : finisher<T, false>(problem.activation);
}

}  // namespace ptq4cuda
