// From the integer sums of conv2d_integer to its outputs: a few pixels and panels of 16 outputs at a time.
#pragma once

#include <array>

#include "conv_tiles_avx2.h"
#include "conv_tiles_vnni.h"

namespace ptq4cuda {

// The parameters of a panel's outputs: field f of output o is parameters[16 f + o]; panels follow each other.
enum Field {
    kZeroSum,  // an integer: what the zero points have in the sum, all taps together
    kScale,
    kBias,
    kResidualScale,
    kResidualZeroPoint,
    kInvScale,
    kZeroPoint,
    kQmax,
    // For AVX2 and AVX-512: the zero point as an integer, the limits of y / scale, the activation's among them.
    kZeroPointBits,
    kLowest,
    kHighest,
    kFields
};
constexpr int64_t kPanelParameters = kFields * kPanelOutputs;

// What the activation is made of: nothing, a ReLU, or anything piecewise linear.
enum class Curve { identity, relu, other };

// What a tile needs beside its sums and what comes of it. Outputs, and the residual's codes, lie `stride` apart from
// pixel to pixel.
template <class T>
struct Finishing {
    int64_t pixels, panels, stride;
    const uint8_t* residual;
    T* y;
    const float* parameters;  // of the first panel
    uint8_t* also;            // a second output, or nullptr
    const float* also_parameters;
    Activation activation;
};
template <class T>
using Finisher = void (*)(const int32_t* sums, const Finishing<T>&);

inline Curve curve_of(const Activation& act) {
    if (act.upper != INFINITY) return Curve::other;
    return act.negative_slope == 1.0f ? Curve::identity : act.negative_slope == 0.0f ? Curve::relu : Curve::other;
}

// The parameters of output channel o of a problem, one for each field, for an output with a quantizer or without.
inline std::array<float, kFields> parameters_of(const ConvProblem& problem, const QuantizerTable& quantizer,
                                                int64_t o) {
    const Quantizer added = problem.residual ? problem.residual_quantizer[o] : Quantizer{};
    const Quantizer out = quantizer.scale ? quantizer[o] : Quantizer{};
    int32_t zero_sum = 0;
    for (int64_t t = 0; problem.zero_sums && t < problem.shape.kernel.area(); ++t)
        zero_sum += problem.zero_sums[t * problem.shape.out_channels + o];
    const auto [slope, upper] = problem.activation;
    float lowest = -out.zero_point, highest = out.qmax - out.zero_point;
    if (upper != INFINITY) highest = std::clamp(upper * out.inv_scale, lowest, highest);
    if (slope == 0.0f) lowest = std::clamp(0.0f, lowest, highest);
    return {simd::reinterpret<float>(zero_sum),
            problem.scale[o],
            problem.bias[o],
            added.scale,
            added.zero_point,
            out.inv_scale,
            out.zero_point,
            out.qmax,
            simd::reinterpret<float>(static_cast<int32_t>(out.zero_point)),
            lowest,
            highest};
}

template <class T, bool kResidual, Curve curve>
struct Finish {
    static void any(const int32_t* sums, const Finishing<T>& f) { simd::run<Finish>(sums, &f); }

    static PTQ_INLINE void run(const int32_t* sums, const Finishing<T>* f) {
        for (int64_t i = 0; i < f->panels; ++i, sums += kPanelSums)
            for (int64_t p = 0; p < f->pixels; ++p) {
                const int64_t at = p * f->stride + i * kPanelOutputs;
                of_pixel(sums + p * kPanelOutputs, kResidual ? f->residual + at : nullptr, f->y + at,
                         f->parameters + i * kPanelParameters, f->also ? f->also + at : nullptr,
                         f->also ? f->also_parameters + i * kPanelParameters : nullptr, f->activation);
            }
    }

private:
    static PTQ_INLINE void of_pixel(const int32_t* __restrict sums, const uint8_t* __restrict residual,
                                    T* __restrict y, const float* __restrict parameters, uint8_t* __restrict also,
                                    const float* __restrict also_parameters, const Activation& act) {
        float values[kPanelOutputs];
        for (int o = 0; o < kPanelOutputs; ++o) {
            const auto of = [&](Field f) { return parameters[f * kPanelOutputs + o]; };
            float v = scaled_sum(sums[o] - simd::reinterpret<int32_t>(of(kZeroSum)), of(kScale), of(kBias));
            if (kResidual)
                v += value(simd::to_float(residual[o]), {0.0f, of(kResidualScale), of(kResidualZeroPoint), 0.0f});
            if (curve == Curve::relu) v = v > 0.0f ? v : 0.0f;
            if (curve == Curve::other) v = activated(v, act.negative_slope, act.upper);
            values[o] = v;
        }
        if constexpr (std::is_same_v<T, uint8_t>) {
            put_codes(values, parameters, y);
        } else {
            for (int o = 0; o < kPanelOutputs; ++o) simd::store(values[o], y[o]);
        }
        if (also) put_codes(values, also_parameters, also);
    }

    static PTQ_INLINE void put_codes(const float* __restrict values, const float* __restrict parameters,
                                     uint8_t* __restrict y) {
        for (int o = 0; o < kPanelOutputs; ++o) {
            const auto of = [&](Field f) { return parameters[f * kPanelOutputs + o]; };
            y[o] = code(values[o], {of(kInvScale), 0.0f, of(kZeroPoint), of(kQmax)});
        }
    }
};

#if defined(__x86_64__)
// The same for codes, with fewer steps. Rounding keeps order, as a product with a positive number does: so both ends
// of the codes, and those of the activation, can be taken as limits before rint, in units of codes, and the
// conversion to integers rounds. (It rounds half to even, as rint does.) What is left of the activation is a slope
// other than 0 and 1. What NaN becomes is not the same, so they are for problems in which there can be none.
//
// A panel's outputs of all pixels at a time, or eight of them, so that their parameters stay in registers.
struct EightQuantizers {
    __m256 inv_scale, lowest, highest;
    __m256i zero_point;

    explicit PTQ_AVX2_INLINE EightQuantizers(const float* parameters)
        : inv_scale(_mm256_loadu_ps(parameters + kInvScale * kPanelOutputs)),
          lowest(_mm256_loadu_ps(parameters + kLowest * kPanelOutputs)),
          highest(_mm256_loadu_ps(parameters + kHighest * kPanelOutputs)),
          zero_point(load_bytes(parameters + kZeroPointBits * kPanelOutputs)) {}

    PTQ_AVX2_INLINE void put(__m256 values, uint8_t* y) const {
        values = _mm256_mul_ps(values, inv_scale);
        values = _mm256_min_ps(_mm256_max_ps(values, lowest), highest);
        const __m256i codes = _mm256_add_epi32(_mm256_cvtps_epi32(values), zero_point);
        const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(y), _mm_packus_epi16(words, words));
    }
};

template <bool kResidual, bool kSlope, bool kAlso>
PTQ_AVX2_INLINE void finish_eight(const int32_t* sums, const Finishing<uint8_t>& f, int64_t panel, int64_t first) {
    const float* parameters = f.parameters + panel * kPanelParameters + first;
    const auto of = [&](Field field) { return parameters + field * kPanelOutputs; };
    const __m256i zero_sum = load_bytes(of(kZeroSum));
    const __m256 scale = _mm256_loadu_ps(of(kScale)), bias = _mm256_loadu_ps(of(kBias));
    const __m256 residual_scale = _mm256_loadu_ps(of(kResidualScale));
    const __m256 residual_zero_point = _mm256_loadu_ps(of(kResidualZeroPoint));
    const EightQuantizers out(parameters);
    const EightQuantizers also(kAlso ? f.also_parameters + panel * kPanelParameters + first : parameters);
    sums += panel * kPanelSums + first;
    int64_t at = panel * kPanelOutputs + first;
    for (int64_t p = 0; p < f.pixels; ++p, sums += kPanelOutputs, at += f.stride) {
        __m256 v = _mm256_cvtepi32_ps(_mm256_sub_epi32(load_bytes(sums), zero_sum));
        v = _mm256_add_ps(_mm256_mul_ps(v, scale), bias);
        if (kResidual) {
            const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(f.residual + at));
            const __m256 r = _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)), residual_zero_point);
            v = _mm256_add_ps(v, _mm256_mul_ps(r, residual_scale));
        }
        if (kSlope) {
            const __m256 low = _mm256_mul_ps(v, _mm256_set1_ps(f.activation.negative_slope));
            v = _mm256_blendv_ps(low, v, _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GT_OQ));
        }
        out.put(v, f.y + at);
        if (kAlso) also.put(v, f.also + at);
    }
}

template <bool kResidual, bool kSlope>
PTQ_TARGET_AVX2 void finish_avx2(const int32_t* sums, const Finishing<uint8_t>& f) {
    for (int64_t i = 0; i < f.panels; ++i)
        for (int64_t first = 0; first < kPanelOutputs; first += 8)
            f.also ? finish_eight<kResidual, kSlope, true>(sums, f, i, first)
                   : finish_eight<kResidual, kSlope, false>(sums, f, i, first);
}

#define PTQ_AVX512_INLINE PTQ_TARGET_AVX512 inline __attribute__((always_inline))

struct PanelQuantizers {
    __m512 inv_scale, lowest, highest;
    __m512i zero_point;

    explicit PTQ_AVX512_INLINE PanelQuantizers(const float* parameters)
        : inv_scale(_mm512_loadu_ps(parameters + kInvScale * kPanelOutputs)),
          lowest(_mm512_loadu_ps(parameters + kLowest * kPanelOutputs)),
          highest(_mm512_loadu_ps(parameters + kHighest * kPanelOutputs)),
          zero_point(_mm512_loadu_si512(parameters + kZeroPointBits * kPanelOutputs)) {}

    PTQ_AVX512_INLINE void put(__m512 values, uint8_t* y) const {
        values = _mm512_mul_ps(values, inv_scale);
        values = _mm512_min_ps(_mm512_max_ps(values, lowest), highest);
        const __m512i codes = _mm512_add_epi32(_mm512_cvtps_epi32(values), zero_point);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm512_cvtepi32_epi8(codes));
    }
};

template <bool kResidual, bool kSlope, bool kAlso>
PTQ_AVX512_INLINE void finish_panel(const int32_t* sums, const Finishing<uint8_t>& f, int64_t panel) {
    const float* parameters = f.parameters + panel * kPanelParameters;
    const auto of = [&](Field field) { return parameters + field * kPanelOutputs; };
    const __m512i zero_sum = _mm512_loadu_si512(of(kZeroSum));
    const __m512 scale = _mm512_loadu_ps(of(kScale)), bias = _mm512_loadu_ps(of(kBias));
    const __m512 residual_scale = _mm512_loadu_ps(of(kResidualScale));
    const __m512 residual_zero_point = _mm512_loadu_ps(of(kResidualZeroPoint));
    const __m512 slope = _mm512_set1_ps(f.activation.negative_slope);
    const PanelQuantizers out(parameters);
    const PanelQuantizers also(kAlso ? f.also_parameters + panel * kPanelParameters : parameters);
    sums += panel * kPanelSums;
    int64_t at = panel * kPanelOutputs;
    for (int64_t p = 0; p < f.pixels; ++p, sums += kPanelOutputs, at += f.stride) {
        __m512 v = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums), zero_sum));
        v = _mm512_add_ps(_mm512_mul_ps(v, scale), bias);
        if (kResidual) {
            const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(f.residual + at));
            const __m512 r = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)), residual_zero_point);
            v = _mm512_add_ps(v, _mm512_mul_ps(r, residual_scale));
        }
        if (kSlope) v = _mm512_mask_mul_ps(v, _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NGT_UQ), v, slope);
        out.put(v, f.y + at);
        if (kAlso) also.put(v, f.also + at);
    }
}

template <bool kResidual, bool kSlope>
PTQ_TARGET_AVX512 void finish_avx512(const int32_t* sums, const Finishing<uint8_t>& f) {
    for (int64_t i = 0; i < f.panels; ++i)
        f.also ? finish_panel<kResidual, kSlope, true>(sums, f, i)
               : finish_panel<kResidual, kSlope, false>(sums, f, i);
}

// Whether all values are finite, whatever the sums are.
inline bool stays_finite(const ConvProblem& problem) {
    const float slope = std::max(1.0f, std::abs(problem.activation.negative_slope));
    for (int64_t o = 0; o < problem.shape.out_channels; ++o) {
        float largest = std::abs(problem.scale[o]) * 0x1p31f + std::abs(problem.bias[o]);
        if (problem.residual) {
            const Quantizer q = problem.residual_quantizer[o];
            largest += (255.0f + std::abs(q.zero_point)) * q.scale;
        }
        if (!std::isfinite(largest * slope)) return false;
    }
    return true;
}

template <bool kResidual, bool kSlope>
Finisher<uint8_t> code_finisher() {
    return simd::level() >= simd::Level::avx512 ? finish_avx512<kResidual, kSlope> : finish_avx2<kResidual, kSlope>;
}
#endif

template <class T, bool kResidual>
Finisher<T> finisher(const Activation& act, [[maybe_unused]] bool finite) {
#if defined(__x86_64__)
    if constexpr (std::is_same_v<T, uint8_t>)
        if (simd::level() >= simd::Level::avx2 && finite)
            return act.negative_slope == 0.0f || act.negative_slope == 1.0f ? code_finisher<kResidual, false>()
                                                                            : code_finisher<kResidual, true>();
#endif
    switch (curve_of(act)) {
        case Curve::identity: return Finish<T, kResidual, Curve::identity>::any;
        case Curve::relu: return Finish<T, kResidual, Curve::relu>::any;
        default: return Finish<T, kResidual, Curve::other>::any;
    }
}

// `finite`: all values are, whatever the sums.
template <class T>
Finisher<T> finisher_of(bool residual, const Activation& act, bool finite) {
    return residual ? finisher<T, true>(act, finite) : finisher<T, false>(act, finite);
}

}  // namespace ptq4cuda
