// Finishing (conv_finish.h): plainly, for any type of outputs and any parameters, and in vectors for codes.
#include "conv_finish.h"

namespace ptq4cuda {
namespace {

// What the activation is made of: nothing, a ReLU, or anything piecewise linear.
enum class Curve { identity, relu, other };

Curve curve_of(const Activation& act) {
    if (act.upper != INFINITY) return Curve::other;
    return act.negative_slope == 1.0f ? Curve::identity : act.negative_slope == 0.0f ? Curve::relu : Curve::other;
}

// The line of an output of a problem that stays in range, without a residual. Its exact codes are a staircase over
// the sums, and so are those of a line: they are the same if they rise at the same sums. Each rise bounds the offset,
// and the middle of all bounds is as far from all of them as can be. Where they leave no room, a factor beside may
// have some. There may be no line: where values lie in the middle between codes for many sums, ties go both ways.
std::optional<Line> line_of(const ConvProblem& problem, int64_t o, float bound) {
    constexpr int kTries = 16, kFactors = 9;  // sums about where a rise must be; factors that follow each other
    const std::array<float, kFields> p = parameters_of(problem, problem.out_quantizer, o);
    const Quantizer q = problem.out_quantizer[o];
    const int32_t zero_sum = simd::reinterpret<int32_t>(p[kZeroSum]);
    if (!(p[kScale] >= 0.0f && bound < 0x1p30f)) return std::nullopt;
    const auto limited = [&](float code) { return std::clamp(code, p[kLowest], p[kHighest]); };
    const auto exact = [&](int64_t sum) {
        const float v = scaled_sum(static_cast<int32_t>(sum) - zero_sum, p[kScale], p[kBias]);
        return limited(rintf(v * q.inv_scale) + q.zero_point);
    };
    const int64_t end = static_cast<int64_t>(bound) + 1, begin = -end;
    const double inv_scale = q.inv_scale, factor = static_cast<double>(p[kScale]) * inv_scale;
    const double offset = (p[kBias] - static_cast<double>(p[kScale]) * zero_sum) * inv_scale + q.zero_point;
    const int lowest = static_cast<int>(p[kLowest]), highest = static_cast<int>(p[kHighest]);
    std::array<int64_t, 256> rises{};  // the first sum from begin on that has this code or a larger one, or end
    for (int k = lowest + 1; k <= highest; ++k) {
        const double about = std::ceil((k - 0.5 - offset) / factor);
        int64_t rise = about < static_cast<double>(end) ? static_cast<int64_t>(std::max<double>(begin, about)) : end;
        int tries = 0;
        for (; tries < kTries && rise < end && exact(rise) < k; ++tries) ++rise;
        for (; tries < kTries && rise > begin && exact(rise - 1) >= k; ++tries) --rise;
        if (tries == kTries) return std::nullopt;
        rises[k] = rise;
    }
    const auto line_with = [&](float near) {
        double least = offset - factor, most = offset + factor;
        for (int k = lowest + 1; k <= highest; ++k) {
            if (rises[k] < end) least = std::max(least, k - 0.5 - double{near} * static_cast<double>(rises[k]));
            if (rises[k] > begin) most = std::min(most, k - 0.5 - double{near} * static_cast<double>(rises[k] - 1));
        }
        return Line{near, static_cast<float>((least + most) / 2)};
    };
    const auto holds = [&](const Line& line) {
        const auto on_line = [&](int64_t sum) {
            return limited(rintf(std::fma(static_cast<float>(sum), line.factor, line.offset)));
        };
        for (int k = lowest + 1; k <= highest; ++k)
            if ((rises[k] < end && on_line(rises[k]) < k) || (rises[k] > begin && on_line(rises[k] - 1) >= k))
                return false;
        return true;
    };
    float up = static_cast<float>(factor), down = up;
    for (int i = 0; i < kFactors; ++i) {  // the next one above and the next one below by turns
        const Line line = line_with(i % 2 ? up : down);
        if (holds(line)) return line;
        i % 2 ? down = std::nextafter(down, 0.0f) : up = std::nextafter(up, INFINITY);
    }
    return std::nullopt;
}

// Never in block order.
template <class T, bool kResidual, Curve curve>
struct Finish {
    static void any(const int32_t* sums, const Finishing<T>& f) {
        const int64_t full = f.outputs / kPanelOutputs, rest = f.outputs % kPanelOutputs;
        if (full > 0) simd::run<Finish>(sums, &f, full);
        if (rest > 0) part(sums + full * f.panel_sums, f, full * kPanelOutputs, rest);
    }

    static PTQ_INLINE void run(const int32_t* sums, const Finishing<T>* f, int64_t panels) {
        for (int64_t i = 0; i < panels; ++i, sums += f->panel_sums)
            for (int64_t p = 0; p < f->pixels; ++p) {
                const int64_t at = p * f->stride + i * kPanelOutputs;
                of_pixel(sums + p * kPanelOutputs, kResidual ? f->residual + at : nullptr, f->y + at,
                         f->parameters + i * kPanelParameters, f->also ? f->also + at : nullptr,
                         f->also ? f->also_parameters + i * kPanelParameters : nullptr, f->activation);
            }
    }

private:
    // Less than a panel: by way of a full one.
    static void part(const int32_t* sums, const Finishing<T>& f, int64_t first, int64_t outputs) {
        constexpr int64_t kMost = std::max(kTilePixels, kMatrixPixels) * kPanelOutputs;
        uint8_t residual[kMost] = {}, also[kMost];
        T y[kMost];
        const auto copy = [&](auto* into, int64_t into_stride, const auto* from, int64_t from_stride) {
            for (int p = 0; p < f.pixels; ++p)
                std::memcpy(static_cast<void*>(into + p * into_stride), from + p * from_stride,
                            outputs * sizeof(*from));
        };
        Finishing<T> full = f;
        full.stride = kPanelOutputs;
        full.residual = f.residual ? residual : nullptr;
        full.y = y;
        full.parameters += first / kPanelOutputs * kPanelParameters;
        full.also = f.also ? also : nullptr;
        if (f.also) full.also_parameters += first / kPanelOutputs * kPanelParameters;
        if (f.residual) copy(residual, kPanelOutputs, f.residual + first, f.stride);
        simd::run<Finish>(sums, static_cast<const Finishing<T>*>(&full), int64_t{1});
        copy(f.y + first, f.stride, y, kPanelOutputs);
        if (f.also) copy(f.also + first, f.stride, also, kPanelOutputs);
    }

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
// The same for codes, with fewer steps, a strip of outputs at a time. Rounding keeps order, so both ends of the
// codes, and those of the activation, can be taken as limits after it: of bytes, 32 or 64 at a time. (The conversion
// to integers rounds half to even, as rint does, and those that it cannot hold are out of the question, see
// stays_in_range.) What is left of the activation is a slope other than 0 and 1. Packing words into bytes saturates
// and brings outputs in block order into theirs; others are left to be put in order, four at a time. Where outputs
// lie on a Line, all steps before the limits are one multiplication. In full strips whose zero points are 0, as those
// of values from a ReLU are, there is nothing to subtract or to add for them.
enum class Course { line, from_zero, plain, slope };

constexpr int64_t kAhead = 16;  // pixels whose residual is asked for: it was written long ago

// Whether a fact holds for so many panels. (Inlined: in code of another instruction set it would cost more.)
PTQ_INLINE bool holds(int64_t fact, const float* parameters, int64_t panels) {
    bool all = true;
    for (int64_t i = 0; i < panels; ++i)
        all = all && simd::reinterpret<int32_t>(parameters[i * kPanelParameters + fact]) != 0;
    return all;
}

PTQ_INLINE bool on_line(const Finishing<uint8_t>& f, int64_t panel, int64_t panels) {
    return f.also == nullptr && holds(kOnLine, f.parameters + panel * kPanelParameters, panels);
}
PTQ_INLINE bool from_zero(const Finishing<uint8_t>& f, int64_t panel, int64_t panels) {
    return f.outputs >= (panel + panels) * kPanelOutputs &&
           holds(kFromZero, f.parameters + panel * kPanelParameters, panels) &&
           (!f.also || holds(kFromZero, f.also_parameters + panel * kPanelParameters, panels));
}

// Writes the first n of some bytes.
PTQ_AVX2_INLINE void store_first(__m128i bytes, uint8_t* y, int64_t n) {
    if (n >= 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(y), bytes);
    if (n & 8) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(y), bytes);
        bytes = _mm_unpackhi_epi64(bytes, bytes);
        y += 8;
    }
    uint64_t rest = _mm_cvtsi128_si64(bytes);
    if (n & 4) {
        std::memcpy(y, &rest, 4);
        rest >>= 32;
        y += 4;
    }
    for (int64_t i = 0; i < (n & 3); ++i) y[i] = static_cast<uint8_t>(rest >> 8 * i);
}
PTQ_AVX2_INLINE void store_first(__m256i bytes, uint8_t* y, int64_t n) {
    if (n >= 32) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), bytes);
    store_first(_mm256_castsi256_si128(bytes), y, n);
    if (n > 16) store_first(_mm256_extracti128_si256(bytes, 1), y + 16, n - 16);
}

// (A masked store of bytes takes longer.)
PTQ_AVX512_INLINE void store_first(__m512i bytes, uint8_t* y, int64_t n) {
    if (n >= 64) return _mm512_storeu_si512(y, bytes);
    store_first(_mm512_castsi512_si256(bytes), y, n);
    if (n > 32) store_first(_mm512_extracti64x4_epi64(bytes, 1), y + 32, n - 32);
}

// Two vectors of 8 outputs, or four.
template <int kVectors, bool kBlock, Course course>
struct StripQuantizerAvx2 {
    static constexpr int64_t kSecond = kVectors > 2 ? kPanelParameters : 0;  // panel's parameters, if there is one
    const float* parameters;
    __m256i zero_points[2], lowest, highest;

    explicit PTQ_AVX2_INLINE StripQuantizerAvx2(const float* parameters_) : parameters(parameters_) {
        const auto two = [&](const float* p) PTQ_TARGET_AVX2 {
            p += kZeroPointBits * kPanelOutputs;
            return _mm256_packs_epi32(simd::load_bytes(p), simd::load_bytes(p + 8));
        };
        zero_points[0] = two(parameters);
        zero_points[1] = two(parameters + kSecond);
        lowest = simd::load_bytes(parameters + kLowestCodes);
        highest = simd::load_bytes(parameters + kHighestCodes);
    }

    PTQ_AVX2_INLINE void put(const __m256 (&values)[kVectors], uint8_t* y, int64_t n) const {
        __m256i codes[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
            const float* inv_scale = parameters + i / 2 * kSecond + kInvScale * kPanelOutputs + i % 2 * 8;
            const __m256 code =
                course == Course::line ? values[i] : _mm256_mul_ps(values[i], _mm256_loadu_ps(inv_scale));
            codes[i] = _mm256_cvtps_epi32(code);
        }
        __m256i words[2] = {_mm256_packs_epi32(codes[0], codes[1]),
                            _mm256_packs_epi32(codes[kVectors - 2], codes[kVectors - 1])};
        if (course >= Course::plain)
            for (int i = 0; i < 2; ++i) words[i] = _mm256_adds_epi16(words[i], zero_points[i]);
        __m256i bytes = _mm256_packus_epi16(words[0], words[1]);
        if (!kBlock) bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        if (course != Course::from_zero) bytes = _mm256_max_epu8(bytes, lowest);
        store_first(_mm256_min_epu8(bytes, highest), y, n);
    }
};

// The first n of some bytes, and zeros.
PTQ_AVX2_INLINE __m128i load_first_half(const uint8_t* from, int64_t n) {
    if (n >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    uint64_t words[2] = {0, 0};
    if (n >= 8) {
        std::memcpy(&words[0], from, 8);
        std::memcpy(&words[1], from + n - 8, 8);  // some of them again
        words[1] = n > 8 ? words[1] >> 8 * (16 - n) : 0;
    } else {
        for (int64_t i = 0; i < n; ++i) words[0] |= uint64_t{from[i]} << 8 * i;
    }
    return _mm_set_epi64x(static_cast<int64_t>(words[1]), static_cast<int64_t>(words[0]));
}
PTQ_AVX2_INLINE __m256i load_first(const uint8_t* from, int64_t n) {
    if (n >= 32) return simd::load_bytes(from);
    const __m128i high = n > 16 ? load_first_half(from + 16, n - 16) : _mm_setzero_si128();
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load_first_half(from, n)), high, 1);
}

// Bytes as the integers of four vectors: in block order, or in theirs.
template <bool kBlock>
PTQ_AVX2_INLINE void widen_bytes(__m256i bytes, __m256i (&to)[4]) {
    const __m256i zero = _mm256_setzero_si256();
    if (!kBlock) bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    const __m256i low = _mm256_unpacklo_epi8(bytes, zero), high = _mm256_unpackhi_epi8(bytes, zero);
    to[0] = _mm256_unpacklo_epi16(low, zero);
    to[1] = _mm256_unpackhi_epi16(low, zero);
    to[2] = _mm256_unpacklo_epi16(high, zero);
    to[3] = _mm256_unpackhi_epi16(high, zero);
}

template <bool kResidual, Course course, bool kBlock, int kVectors>
PTQ_AVX2_INLINE void finish_strip(const int32_t* sums, const Finishing<uint8_t> f, int64_t first) {
    constexpr int64_t kMost = 8 * kVectors;
    constexpr bool kZero = course == Course::from_zero;
    const int64_t n = kZero ? kMost : std::min(f.outputs - first, kMost);
    const int64_t skipped = first / kPanelOutputs;
    const float* parameters = f.parameters + skipped * kPanelParameters;
    using Quantizer = StripQuantizerAvx2<kVectors, kBlock, course>;
    const Quantizer out(parameters), also(f.also ? f.also_parameters + skipped * kPanelParameters : parameters);
    sums += skipped * f.panel_sums;
    for (int64_t p = 0, at = first; p < f.pixels; ++p, sums += kPanelOutputs, at += f.stride) {
        if (kResidual) __builtin_prefetch(f.residual + at + kAhead * f.stride);
        __m256 v[kVectors];
        __m256i r[4];
        if (kResidual) widen_bytes<kBlock>(load_first(f.residual + at, n), r);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
            const auto of = [&](Field field) PTQ_TARGET_AVX2 {
                return _mm256_loadu_ps(parameters + i / 2 * kPanelParameters + field * kPanelOutputs + i % 2 * 8);
            };
            const __m256i sum = simd::load_bytes(sums + i / 2 * f.panel_sums + i % 2 * 8);
            if constexpr (course == Course::line) {
                v[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), of(kFactor), of(kOffset));
                continue;
            }
            v[i] = _mm256_cvtepi32_ps(kZero ? sum : _mm256_sub_epi32(sum, _mm256_castps_si256(of(kZeroSum))));
            v[i] = _mm256_add_ps(_mm256_mul_ps(v[i], of(kScale)), of(kBias));
            if (kResidual) {
                __m256 code = _mm256_cvtepi32_ps(r[i]);
                if (!kZero) code = _mm256_sub_ps(code, of(kResidualZeroPoint));
                v[i] = _mm256_add_ps(v[i], _mm256_mul_ps(code, of(kResidualScale)));
            }
            if (course == Course::slope) {
                const __m256 low = _mm256_mul_ps(v[i], _mm256_set1_ps(f.activation.negative_slope));
                v[i] = _mm256_blendv_ps(low, v[i], _mm256_cmp_ps(v[i], _mm256_setzero_ps(), _CMP_GT_OQ));
            }
        }
        out.put(v, f.y + at, n);
        if (course != Course::line && f.also) also.put(v, f.also + at, n);
    }
}

template <bool kResidual, Course course, bool kBlock, int kVectors>
PTQ_AVX2_INLINE void finish_strip_fast(const int32_t* sums, const Finishing<uint8_t>& f, int64_t first) {
    [[maybe_unused]] const int64_t panel = first / kPanelOutputs, panels = kVectors / 2;
    if constexpr (!kResidual && course == Course::plain)
        if (on_line(f, panel, panels)) return finish_strip<false, Course::line, kBlock, kVectors>(sums, f, first);
    if constexpr (kVectors == 4 && course == Course::plain)
        if (from_zero(f, panel, panels))
            return finish_strip<kResidual, Course::from_zero, kBlock, kVectors>(sums, f, first);
    finish_strip<kResidual, course, kBlock, kVectors>(sums, f, first);
}

template <bool kResidual, Course course>
PTQ_TARGET_AVX2 void finish_avx2(const int32_t* sums, const Finishing<uint8_t>& f) {
    for (int64_t first = 0; first < f.outputs; first += 32)
        if (f.block_order)
            finish_strip_fast<kResidual, course, true, 4>(sums, f, first);
        else if (f.outputs - first > kPanelOutputs)
            finish_strip_fast<kResidual, course, false, 4>(sums, f, first);
        else
            finish_strip_fast<kResidual, course, false, 2>(sums, f, first);
}

// Some vectors of 16 outputs.
template <int kVectors, bool kBlock, Course course>
struct StripQuantizer {
    __m512 inv_scale[kVectors];
    __m512i zero_points[2], lowest, highest;

    explicit PTQ_AVX512_INLINE StripQuantizer(const float* parameters)
        : lowest(_mm512_loadu_si512(parameters + kLowestCodes)),
          highest(_mm512_loadu_si512(parameters + kHighestCodes)) {
        __m512i zero_point[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
            inv_scale[i] = _mm512_loadu_ps(parameters + i * kPanelParameters + kInvScale * kPanelOutputs);
            zero_point[i] = _mm512_loadu_si512(parameters + i * kPanelParameters + kZeroPointBits * kPanelOutputs);
        }
        pack_words(zero_point, zero_points);
    }

    PTQ_AVX512_INLINE void put(const __m512 (&values)[kVectors], uint8_t* y, int64_t n) const {
        __m512i codes[kVectors], words[2];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i)
            codes[i] =
                _mm512_cvtps_epi32(course == Course::line ? values[i] : _mm512_mul_ps(values[i], inv_scale[i]));
        pack_words(codes, words);
        if (course >= Course::plain)
            for (int i = 0; i < 2; ++i) words[i] = _mm512_adds_epi16(words[i], zero_points[i]);
        __m512i bytes = _mm512_packus_epi16(words[0], words[1]);
        if (!kBlock)
            bytes = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
                                             bytes);
        if (course != Course::from_zero) bytes = _mm512_max_epu8(bytes, lowest);
        store_first(_mm512_min_epu8(bytes, highest), y, n);
    }

private:
    static PTQ_AVX512_INLINE void pack_words(const __m512i (&from)[kVectors], __m512i (&to)[2]) {
        to[0] = _mm512_packs_epi32(from[0], from[kVectors > 1]);
        to[1] = kVectors > 2 ? _mm512_packs_epi32(from[kVectors > 2 ? 2 : 0], from[kVectors - 1]) : to[0];
    }
};

template <bool kResidual, Course course, bool kBlock, int kVectors>
PTQ_AVX512_INLINE void finish_vectors(const int32_t* sums, const Finishing<uint8_t> f) {
    constexpr bool kZero = course == Course::from_zero;
    const int64_t n = kZero ? kVectors * kPanelOutputs : f.outputs;
    const __mmask64 present = n < 64 ? (__mmask64{1} << n) - 1 : ~__mmask64{0};
    const bool full = n == kVectors * kPanelOutputs;
    using Quantizer = StripQuantizer<kVectors, kBlock, course>;
    const Quantizer out(f.parameters), also(f.also ? f.also_parameters : f.parameters);
    const __m512 slope = _mm512_set1_ps(f.activation.negative_slope);
    const auto of = [&](Field field, int i) PTQ_TARGET_AVX512 {
        return _mm512_loadu_ps(f.parameters + i * kPanelParameters + field * kPanelOutputs);
    };
    __m512 factor[kVectors], offset[kVectors];  // the compiler does not know that writing codes leaves these alone
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
        factor[i] = of(kFactor, i);
        offset[i] = of(kOffset, i);
    }
    for (int64_t p = 0, at = 0; p < f.pixels; ++p, sums += kPanelOutputs, at += f.stride) {
        if (kResidual) __builtin_prefetch(f.residual + at + kAhead * f.stride);
        __m512 v[kVectors];
        __m512i r[4];
        if (kResidual && kBlock) {
            const __m512i zero = _mm512_setzero_si512();
            const __m512i bytes = _mm512_maskz_loadu_epi8(present, f.residual + at);
            const __m512i low = _mm512_unpacklo_epi8(bytes, zero), high = _mm512_unpackhi_epi8(bytes, zero);
            r[0] = _mm512_unpacklo_epi16(low, zero);
            r[1] = _mm512_unpackhi_epi16(low, zero);
            r[2] = _mm512_unpacklo_epi16(high, zero);
            r[3] = _mm512_unpackhi_epi16(high, zero);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
            const __m512i sum = _mm512_loadu_si512(sums + i * f.panel_sums);
            if constexpr (course == Course::line) {
                v[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor[i], offset[i]);
                continue;
            }
            v[i] = _mm512_cvtepi32_ps(kZero ? sum : _mm512_sub_epi32(sum, _mm512_castps_si512(of(kZeroSum, i))));
            v[i] = _mm512_add_ps(_mm512_mul_ps(v[i], of(kScale, i)), of(kBias, i));
            if (kResidual) {
                if (!kBlock) {
                    const uint8_t* codes = f.residual + at + i * kPanelOutputs;
                    r[i] = _mm512_cvtepu8_epi32(
                        full ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))
                             : _mm_maskz_loadu_epi8(static_cast<__mmask16>(present >> 16 * i), codes));
                }
                __m512 code = _mm512_cvtepi32_ps(r[i]);
                if (!kZero) code = _mm512_sub_ps(code, of(kResidualZeroPoint, i));
                v[i] = _mm512_add_ps(v[i], _mm512_mul_ps(code, of(kResidualScale, i)));
            }
            if (course == Course::slope)
                v[i] =
                    _mm512_mask_mul_ps(v[i], _mm512_cmp_ps_mask(v[i], _mm512_setzero_ps(), _CMP_NGT_UQ), v[i], slope);
        }
        out.put(v, f.y + at, n);
        if (course != Course::line && f.also) also.put(v, f.also + at, n);
    }
}

template <bool kResidual, Course course, bool kBlock, int kVectors>
PTQ_AVX512_INLINE void finish_vectors_fast(const int32_t* sums, const Finishing<uint8_t>& f) {
    if constexpr (!kResidual && course == Course::plain)
        if (on_line(f, 0, kVectors)) return finish_vectors<false, Course::line, kBlock, kVectors>(sums, f);
    if constexpr (kVectors == 4 && course == Course::plain)
        if (from_zero(f, 0, kVectors)) return finish_vectors<kResidual, Course::from_zero, kBlock, kVectors>(sums, f);
    finish_vectors<kResidual, course, kBlock, kVectors>(sums, f);
}

template <bool kResidual, Course course>
PTQ_TARGET_AVX512 void finish_avx512(const int32_t* sums, const Finishing<uint8_t>& f) {
    if (f.block_order) return finish_vectors_fast<kResidual, course, true, 4>(sums, f);
    if (f.outputs > 48) return finish_vectors_fast<kResidual, course, false, 4>(sums, f);
    if (f.outputs > 32) return finish_vectors_fast<kResidual, course, false, 3>(sums, f);
    if (f.outputs > 16) return finish_vectors_fast<kResidual, course, false, 2>(sums, f);
    finish_vectors_fast<kResidual, course, false, 1>(sums, f);
}

template <bool kResidual, Course course>
Finisher<uint8_t> code_finisher() {
    // As wide as the blocks of the tiles.
    return simd::level() >= simd::Level::avx512_vnni ? finish_avx512<kResidual, course>
                                                     : finish_avx2<kResidual, course>;
}
#endif

template <class T, bool kResidual>
Finisher<T> finisher(const Activation& act, [[maybe_unused]] bool in_range) {
#if defined(__x86_64__)
    if constexpr (std::is_same_v<T, uint8_t>)
        if (simd::level() >= simd::Level::avx2 && in_range)
            return act.negative_slope == 0.0f || act.negative_slope == 1.0f
                       ? code_finisher<kResidual, Course::plain>()
                       : code_finisher<kResidual, Course::slope>();
#endif
    switch (curve_of(act)) {
        case Curve::identity: return Finish<T, kResidual, Curve::identity>::any;
        case Curve::relu: return Finish<T, kResidual, Curve::relu>::any;
        default: return Finish<T, kResidual, Curve::other>::any;
    }
}

}  // namespace

std::array<float, kFields> parameters_of(const ConvProblem& problem, const QuantizerTable& quantizer, int64_t o) {
    const Quantizer added = problem.residual ? problem.residual_quantizer[o] : Quantizer{};
    const Quantizer out = quantizer.scale ? quantizer[o] : Quantizer{};
    int32_t zero_sum = 0;
    for (int64_t t = 0; problem.zero_sums && t < problem.shape.kernel.area(); ++t)
        zero_sum += problem.zero_sums[t * problem.shape.out_channels + o];
    const auto [slope, upper] = problem.activation;
    // Rounding keeps order, as a product with a positive number does: limits of values are limits of codes.
    float lowest = 0.0f, highest = out.qmax;
    if (quantizer.scale && upper != INFINITY) highest = float_code(upper, out);
    if (quantizer.scale && slope == 0.0f) lowest = std::min(float_code(0.0f, out), highest);
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
            highest,
            0.0f,
            NAN};
}

std::vector<float> largest_sums(const ConvProblem& problem, bool of_these) {
    const ConvShape& shape = problem.shape;
    const int64_t taps = shape.kernel.area(), channels = shape.group_channels();
    std::vector<float> largest(shape.out_channels);
    for (int64_t o = 0; o < shape.out_channels; ++o) {
        const int64_t group = o / shape.group_outputs(), in_group = o % shape.group_outputs();
        const int64_t panel = group * shape.panels_per_group() + in_group / kPanelOutputs;
        const uint8_t* codes = problem.x + group * channels;
        int64_t sum = of_these ? 0 : 255 * 128 * taps * channels;
        for (int64_t t = 0; of_these && t < taps; ++t) {
            const int64_t word = panel * shape.panel_words() + t * shape.words_per_tap();
            const int8_t* weights =
                problem.weight + (word * kPanelOutputs + in_group % kPanelOutputs) * kWordChannels;
            for (int64_t c = 0; c < channels; ++c) {
                const int weight =
                    shape.depthwise()
                        ? problem.weight[t * shape.channels + o]
                        : weights[c / kWordChannels * kPanelOutputs * kWordChannels + c % kWordChannels];
                sum += std::abs(weight) * codes[c];
            }
        }
        for (int64_t t = 0; problem.zero_sums && t < taps; ++t)
            sum += std::abs(int64_t{problem.zero_sums[t * shape.out_channels + o]});
        largest[o] = std::nextafter(static_cast<float>(sum), INFINITY);
    }
    return largest;
}

bool stays_in_range(const ConvProblem& problem, const std::vector<float>& largest_sums) {
    constexpr float kMostOfWord = 0x1p30f, kMostZeroPoint = 32000.0f;
    const float slope = std::max(1.0f, std::abs(problem.activation.negative_slope));
    for (int64_t o = 0; o < problem.shape.out_channels; ++o) {
        float largest = std::abs(problem.scale[o]) * std::min(largest_sums[o], 0x1p31f) + std::abs(problem.bias[o]);
        if (problem.residual) {
            const Quantizer q = problem.residual_quantizer[o];
            largest += (255.0f + std::abs(q.zero_point)) * q.scale;
        }
        const auto fits = [&](const QuantizerTable& quantizer) {
            if (!quantizer.scale) return true;
            const Quantizer q = quantizer[o];
            return largest * slope * q.inv_scale < kMostOfWord && std::abs(q.zero_point) <= kMostZeroPoint;
        };
        if (!(std::isfinite(largest * slope) && fits(problem.out_quantizer) && fits(problem.also_quantizer)))
            return false;
    }
    return true;
}

std::vector<std::optional<Line>> lines_of(const ConvProblem& problem, const std::vector<float>& largest_sums) {
    const float slope = problem.activation.negative_slope;
    std::vector<std::optional<Line>> lines(problem.shape.out_channels);
    if (problem.out_quantizer.scale && !problem.residual && !problem.also && (slope == 0.0f || slope == 1.0f))
        for (size_t o = 0; o < lines.size(); ++o)
            lines[o] = line_of(problem, static_cast<int64_t>(o), largest_sums[o]);
    return lines;
}

template <class T>
Finisher<T> finisher_of(bool residual, const Activation& act, bool in_range) {
    return residual ? finisher<T, true>(act, in_range) : finisher<T, false>(act, in_range);
}
template Finisher<uint8_t> finisher_of(bool, const Activation&, bool);
template Finisher<float> finisher_of(bool, const Activation&, bool);
template Finisher<simd::Half> finisher_of(bool, const Activation&, bool);
template Finisher<simd::BFloat16> finisher_of(bool, const Activation&, bool);

}  // namespace ptq4cuda
