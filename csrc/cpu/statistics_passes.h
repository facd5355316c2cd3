// The two passes of channel_statistics over one tile: sums, and sums of distances from the mean.
//
// Values are dealt to lanes in turn. Each lane is summed in its own order, so that every instruction set finds the
// same. Loops here are written so that the lanes of a row stay in registers while rows are read in the order of their
// addresses, which the processor follows best. For AVX-512 they are written by hand: the compiler takes values apart
// after it has loaded them, and widening takes most of the time.
#pragma once

#include <cmath>
#include <vector>

#include "simd.h"

namespace ptq4cuda::statistics {

constexpr int kLanes = 64;     // that are added side by side
constexpr int kFewLanes = 16;  // the same, where fewer are left
constexpr int64_t kLine = 64;  // bytes that come from memory at a time

// Memory that will be read later: rows of `size` bytes that are `stride` bytes apart. They are fetched evenly, `step`
// lines with each kLanes values that are added: what is asked for faster than memory answers makes the sums wait.
struct Ahead {
    const char *row = nullptr, *at = nullptr;
    int64_t size = 0, stride = 0;
    int64_t lines = 0, step = 0;

    PTQ_INLINE void fetch() {
        if (lines <= 0) return;
        for (int64_t i = 0; i < step; ++i) __builtin_prefetch(at + i * kLine);
        at += step * kLine;
        lines -= step;
        if (at - row >= size) at = row += stride;
    }
};

struct Lanes {
    simd::Vector<double> sum, mean, centre, squares, deviations;
    simd::Vector<float> min, max;
    simd::Vector<int32_t> positive;

    explicit Lanes(int64_t width) {
        for (auto* lanes : {&sum, &mean, &centre, &squares, &deviations}) lanes->resize(width);
        for (auto* lanes : {&min, &max}) lanes->resize(width);
        positive.resize(width);
    }
};

#if defined(__x86_64__)
// Sixteen values as float32, and the lower and the upper eight of them as float64.
#define PTQ_AVX512_INLINE PTQ_TARGET_AVX512 inline __attribute__((always_inline))

PTQ_AVX512_INLINE __m512 load(const float* x) { return _mm512_loadu_ps(x); }
PTQ_AVX512_INLINE __m512 load(const simd::BFloat16* x) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
PTQ_AVX512_INLINE __m512 load(const simd::Half* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
PTQ_AVX512_INLINE __m512d low(const float* x) { return _mm512_cvtps_pd(_mm256_loadu_ps(x)); }
PTQ_AVX512_INLINE __m512d high(const float* x) { return low(x + 8); }
PTQ_AVX512_INLINE __m512d low(const simd::BFloat16* x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(load(x))); }
PTQ_AVX512_INLINE __m512d high(const simd::BFloat16* x) {
    return _mm512_cvtps_pd(_mm512_extractf32x8_ps(load(x), 1));
}
PTQ_AVX512_INLINE __m512d low(const simd::Half* x) {
    return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}
PTQ_AVX512_INLINE __m512d high(const simd::Half* x) { return low(x + 8); }
template <class T>
PTQ_AVX512_INLINE __m512d eight(const T* x, int k) {
    return k % 2 ? high(x + 8 * (k - 1)) : low(x + 8 * k);
}

// a + b, by the units that multiply, which have less to do here. The compiler must not know that.
PTQ_AVX512_INLINE __m512d add(__m512d a, __m512d b, __m512d one) { return _mm512_fmadd_pd(a, one, b); }
PTQ_AVX512_INLINE __m512d opaque_one() {
    __m512d one = _mm512_set1_pd(1.0);
    asm("" : "+v"(one));
    return one;
}
#endif

// Both passes add rows of kCount values, `stride` apart, to lanes j and following.

struct FirstPass {
    template <int kCount, class T>
    static PTQ_INLINE void add_rows(const T* __restrict x, int64_t stride, int64_t rows, Lanes& lanes, int64_t j,
                                    Ahead& ahead) {
        double sum[kCount];
        float min[kCount], max[kCount];
        int32_t positive[kCount];
        std::memcpy(sum, &lanes.sum[j], sizeof(sum));
        std::memcpy(min, &lanes.min[j], sizeof(min));
        std::memcpy(max, &lanes.max[j], sizeof(max));
        std::memcpy(positive, &lanes.positive[j], sizeof(positive));
        Ahead mine = ahead;  // in registers
        for (int64_t row = 0; row < rows; ++row, x += stride) {
            if constexpr (kCount == kLanes) mine.fetch();
            for (int k = 0; k < kCount; ++k) {
                const float v = simd::to_float(x[k]);
                sum[k] += v;
                min[k] = v < min[k] ? v : min[k];  // passes over NaN
                max[k] = v > max[k] ? v : max[k];
                positive[k] += v > 0.0f;
            }
        }
        ahead = mine;
        std::memcpy(&lanes.sum[j], sum, sizeof(sum));
        std::memcpy(&lanes.min[j], min, sizeof(min));
        std::memcpy(&lanes.max[j], max, sizeof(max));
        std::memcpy(&lanes.positive[j], positive, sizeof(positive));
    }

#if defined(__x86_64__)
    template <class T>
    static PTQ_TARGET_AVX512 void add_rows_avx512(const T* x, int64_t stride, int64_t rows, Lanes& lanes, int64_t j,
                                                  Ahead& ahead) {
        __m512d sum[8];
        __m512 min[4], max[4];
        __m512i positive[4];
        for (int k = 0; k < 8; ++k) sum[k] = _mm512_loadu_pd(&lanes.sum[j + 8 * k]);
        for (int k = 0; k < 4; ++k) {
            min[k] = _mm512_loadu_ps(&lanes.min[j + 16 * k]);
            max[k] = _mm512_loadu_ps(&lanes.max[j + 16 * k]);
            positive[k] = _mm512_loadu_si512(&lanes.positive[j + 16 * k]);
        }
        const __m512d one = opaque_one();
        Ahead mine = ahead;  // in registers
        for (int64_t row = 0; row < rows; ++row, x += stride) {
            mine.fetch();
            for (int k = 0; k < 8; ++k) sum[k] = add(eight(x, k), sum[k], one);
            for (int k = 0; k < 4; ++k) {
                const __m512 v = load(x + 16 * k);
                min[k] = _mm512_min_ps(v, min[k]);  // the second if one is NaN
                max[k] = _mm512_max_ps(v, max[k]);
                const __mmask16 is_positive = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ);
                positive[k] = _mm512_mask_add_epi32(positive[k], is_positive, positive[k], _mm512_set1_epi32(1));
            }
        }
        ahead = mine;
        for (int k = 0; k < 8; ++k) _mm512_storeu_pd(&lanes.sum[j + 8 * k], sum[k]);
        for (int k = 0; k < 4; ++k) {
            _mm512_storeu_ps(&lanes.min[j + 16 * k], min[k]);
            _mm512_storeu_ps(&lanes.max[j + 16 * k], max[k]);
            _mm512_storeu_si512(&lanes.positive[j + 16 * k], positive[k]);
        }
    }
#endif
};

// Deviations are taken about a centre, which is the mean unless kCentre.
template <bool kCentre>
struct SecondPass {
    template <int kCount, class T>
    static PTQ_INLINE void add_rows(const T* __restrict x, int64_t stride, int64_t rows, Lanes& lanes, int64_t j,
                                    Ahead& ahead) {
        double mean[kCount], centre[kCount], squares[kCount], deviations[kCount];
        std::memcpy(mean, &lanes.mean[j], sizeof(mean));
        std::memcpy(centre, &lanes.centre[j], sizeof(centre));
        std::memcpy(squares, &lanes.squares[j], sizeof(squares));
        std::memcpy(deviations, &lanes.deviations[j], sizeof(deviations));
        Ahead mine = ahead;  // in registers
        for (int64_t row = 0; row < rows; ++row, x += stride) {
            if constexpr (kCount == kLanes) mine.fetch();
            for (int k = 0; k < kCount; ++k) {
                const double v = simd::to_float(x[k]), d = v - mean[k];
                squares[k] = __builtin_fma(d, d, squares[k]);  // on every instruction set, or they would differ
                deviations[k] += std::fabs(kCentre ? v - centre[k] : d);
            }
        }
        ahead = mine;
        std::memcpy(&lanes.squares[j], squares, sizeof(squares));
        std::memcpy(&lanes.deviations[j], deviations, sizeof(deviations));
    }

#if defined(__x86_64__)
    template <class T>
    static PTQ_TARGET_AVX512 void add_rows_avx512(const T* x, int64_t stride, int64_t rows, Lanes& lanes, int64_t j,
                                                  Ahead& ahead) {
        __m512d mean[8], centre[8], squares[8], deviations[8];
        for (int k = 0; k < 8; ++k) {
            mean[k] = _mm512_loadu_pd(&lanes.mean[j + 8 * k]);
            centre[k] = _mm512_loadu_pd(&lanes.centre[j + 8 * k]);
            squares[k] = _mm512_loadu_pd(&lanes.squares[j + 8 * k]);
            deviations[k] = _mm512_loadu_pd(&lanes.deviations[j + 8 * k]);
        }
        const __m512d one = opaque_one();
        Ahead mine = ahead;  // in registers
        for (int64_t row = 0; row < rows; ++row, x += stride) {
            mine.fetch();
            for (int k = 0; k < 8; ++k) {
                const __m512d v = eight(x, k), d = _mm512_sub_pd(v, mean[k]);
                squares[k] = _mm512_fmadd_pd(d, d, squares[k]);
                const __m512d deviation = _mm512_abs_pd(kCentre ? _mm512_sub_pd(v, centre[k]) : d);
                deviations[k] = add(deviation, deviations[k], one);
            }
        }
        ahead = mine;
        for (int k = 0; k < 8; ++k) {
            _mm512_storeu_pd(&lanes.squares[j + 8 * k], squares[k]);
            _mm512_storeu_pd(&lanes.deviations[j + 8 * k], deviations[k]);
        }
    }
#endif
};

// Adds n consecutive values to all lanes in turn, the first of them to lane 0.
template <class Pass, class T>
struct AddTile {
    static PTQ_INLINE void run(const T* x, int64_t n, Lanes* lanes, Ahead* ahead) {
        const int64_t width = static_cast<int64_t>(lanes->sum.size()),
                      rows = width == kLanes ? n / kLanes : n / width;
        add_rows(x, width, rows, width, *lanes, *ahead);
        add_rows(x + rows * width, width, 1, n - rows * width, *lanes, *ahead);
    }
    static PTQ_INLINE void add_rows(const T* x, int64_t stride, int64_t rows, int64_t n, Lanes& lanes, Ahead& ahead) {
        int64_t j = 0;
        for (; j + kLanes <= n; j += kLanes) {
#if defined(__x86_64__)
            if (simd::level() >= simd::Level::avx512) {
                Pass::add_rows_avx512(x + j, stride, rows, lanes, j, ahead);
                continue;
            }
#endif
            Pass::template add_rows<kLanes>(x + j, stride, rows, lanes, j, ahead);
        }
        for (; j + kFewLanes <= n; j += kFewLanes)
            Pass::template add_rows<kFewLanes>(x + j, stride, rows, lanes, j, ahead);
        for (; j < n; ++j) Pass::template add_rows<1>(x + j, stride, rows, lanes, j, ahead);
    }
};

}  // namespace ptq4cuda::statistics
