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

// What the passes know of each lane of a unit.
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
// Values by vectors: the k-th sixteen of 64 as float32, the k-th eight as float64. Two bfloat16 values make one
// 32-bit word, so that those with even numbers are a shift away from float32, and those with odd numbers a mask:
// neighbouring vectors hold the even and the odd ones of what they share.
#define PTQ_AVX512_INLINE PTQ_TARGET_AVX512 inline __attribute__((always_inline))

PTQ_AVX512_INLINE __m512 sixteen(const float* x, int k) { return _mm512_loadu_ps(x + 16 * k); }
PTQ_AVX512_INLINE __m512d eight(const float* x, int k) { return _mm512_cvtps_pd(_mm256_loadu_ps(x + 8 * k)); }

PTQ_AVX512_INLINE __m512 sixteen(const simd::Half* x, int k) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16 * k)));
}
PTQ_AVX512_INLINE __m512d eight(const simd::Half* x, int k) {
    return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8 * k))));
}

PTQ_AVX512_INLINE __m512 sixteen(const simd::BFloat16* x, int k) {
    const __m512i words = _mm512_loadu_si512(x + 32 * (k / 2));
    return _mm512_castsi512_ps(k % 2 ? _mm512_and_si512(words, _mm512_set1_epi32(0xffff << 16))
                                     : _mm512_slli_epi32(words, 16));
}
PTQ_AVX512_INLINE __m512d eight(const simd::BFloat16* x, int k) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16 * (k / 2)));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(k % 2 ? _mm256_and_si256(words, _mm256_set1_epi32(0xffff << 16))
                                                     : _mm256_slli_epi32(words, 16)));
}

// Their lanes: n vectors from p, and back.
template <class T>
constexpr bool kEvenOdd = std::is_same_v<T, simd::BFloat16>;

template <class T>
PTQ_AVX512_INLINE void load_lanes(const double* p, __m512d* v) {
    for (int k = 0; k < 8; k += 2) {
        const __m512d a = _mm512_loadu_pd(p + 8 * k), b = _mm512_loadu_pd(p + 8 * k + 8);
        v[k] = kEvenOdd<T> ? _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), b) : a;
        v[k + 1] = kEvenOdd<T> ? _mm512_permutex2var_pd(a, _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15), b) : b;
    }
}
template <class T>
PTQ_AVX512_INLINE void store_lanes(double* p, const __m512d* v) {
    for (int k = 0; k < 8; k += 2) {
        const __m512d a = v[k], b = v[k + 1];
        _mm512_storeu_pd(p + 8 * k,
                         kEvenOdd<T> ? _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b) : a);
        _mm512_storeu_pd(
            p + 8 * k + 8,
            kEvenOdd<T> ? _mm512_permutex2var_pd(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b) : b);
    }
}
template <class T>
PTQ_AVX512_INLINE void load_lanes(const float* p, __m512* v) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int k = 0; k < 4; k += 2) {
        const __m512 a = _mm512_loadu_ps(p + 16 * k), b = _mm512_loadu_ps(p + 16 * k + 16);
        v[k] = kEvenOdd<T> ? _mm512_permutex2var_ps(a, even, b) : a;
        v[k + 1] = kEvenOdd<T> ? _mm512_permutex2var_ps(a, odd, b) : b;
    }
}
template <class T>
PTQ_AVX512_INLINE void store_lanes(float* p, const __m512* v) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int k = 0; k < 4; k += 2) {
        const __m512 a = v[k], b = v[k + 1];
        _mm512_storeu_ps(p + 16 * k, kEvenOdd<T> ? _mm512_permutex2var_ps(a, first, b) : a);
        _mm512_storeu_ps(p + 16 * k + 16, kEvenOdd<T> ? _mm512_permutex2var_ps(a, second, b) : b);
    }
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
        load_lanes<T>(&lanes.sum[j], sum);
        load_lanes<T>(&lanes.min[j], min);
        load_lanes<T>(&lanes.max[j], max);
        load_lanes<T>(reinterpret_cast<float*>(&lanes.positive[j]), reinterpret_cast<__m512*>(positive));
        const __m512d one = opaque_one();
        Ahead mine = ahead;  // in registers
        for (int64_t row = 0; row < rows; ++row, x += stride) {
            mine.fetch();
            for (int k = 0; k < 8; ++k) sum[k] = add(eight(x, k), sum[k], one);
            for (int k = 0; k < 4; ++k) {
                const __m512 v = sixteen(x, k);
                min[k] = _mm512_min_ps(v, min[k]);  // the second if one is NaN
                max[k] = _mm512_max_ps(v, max[k]);
                const __mmask16 is_positive = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ);
                positive[k] = _mm512_mask_add_epi32(positive[k], is_positive, positive[k], _mm512_set1_epi32(1));
            }
        }
        ahead = mine;
        store_lanes<T>(&lanes.sum[j], sum);
        store_lanes<T>(&lanes.min[j], min);
        store_lanes<T>(&lanes.max[j], max);
        store_lanes<T>(reinterpret_cast<float*>(&lanes.positive[j]), reinterpret_cast<__m512*>(positive));
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
        load_lanes<T>(&lanes.mean[j], mean);
        load_lanes<T>(&lanes.centre[j], centre);
        load_lanes<T>(&lanes.squares[j], squares);
        load_lanes<T>(&lanes.deviations[j], deviations);
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
        store_lanes<T>(&lanes.squares[j], squares);
        store_lanes<T>(&lanes.deviations[j], deviations);
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
