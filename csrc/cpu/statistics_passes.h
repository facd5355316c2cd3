// The two passes of channel_statistics over one tile: sums, and sums of distances from the mean.
//
// Values are dealt to lanes in turn. Each lane is summed in its own order, so that every instruction set finds the
// same. For AVX-512, loops are written by hand: 64 lanes stay in registers while rows are read in the order of their
// addresses, which the processor follows best, and values are widened as they are loaded, which takes most of the
// time.
#pragma once

#include <cmath>
#include <vector>

#include "../ops.h"
#include "simd.h"

namespace ptq4cuda::statistics {

constexpr int kLanes = 64;  // that are added side by side
constexpr int kRows = 8;    // values of a lane that are added in registers, where registers are few

// Memory that will be read later: rows of `size` bytes that are `stride` bytes apart. They are fetched evenly, `step`
// lines with each kLanes values that are added: what is asked for faster than memory answers makes the sums wait.
struct Ahead {
    const char *row = nullptr, *at = nullptr;
    int64_t size = 0, stride = 0;
    int64_t lines = 0, step = 0;

    PTQ_INLINE void fetch() {
        if (lines <= 0) return;
        for (int64_t i = 0; i < step; ++i) __builtin_prefetch(at + i * simd::kLine);
        at += step * simd::kLine;
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
        const int64_t whole =
            ceil_div(width, kLanes) * kLanes;  // the last are loaded and stored with those beside them
        for (auto* lanes : {&sum, &mean, &centre, &squares, &deviations}) lanes->resize(whole);
        for (auto* lanes : {&min, &max}) lanes->resize(whole);
        positive.resize(whole);
    }
};

#if defined(__x86_64__)
// Values by vectors: of at most 64, n in all, the k-th sixteen as float32, the k-th eight as float64; zeros where
// there are fewer. Two bfloat16 values make one 32-bit word, so that those with even numbers are a shift away from
// float32, and those with odd numbers a mask: neighbouring vectors hold the even and the odd ones of what they share.

// The first n - begin of `size` lanes.
PTQ_AVX512_INLINE uint32_t first_lanes(int n, int begin, int size) {
    return n - begin >= size ? ~0u >> (32 - size) : n > begin ? (1u << (n - begin)) - 1 : 0;
}

template <bool kWhole>
PTQ_AVX512_INLINE __m512 sixteen(const float* x, int k, int n) {
    return kWhole ? _mm512_loadu_ps(x + 16 * k) : _mm512_maskz_loadu_ps(first_lanes(n, 16 * k, 16), x + 16 * k);
}
template <bool kWhole>
PTQ_AVX512_INLINE __m512d eight(const float* x, int k, int n) {
    return _mm512_cvtps_pd(kWhole ? _mm256_loadu_ps(x + 8 * k)
                                  : _mm256_maskz_loadu_ps(first_lanes(n, 8 * k, 8), x + 8 * k));
}

template <bool kWhole>
PTQ_AVX512_INLINE __m512 sixteen(const simd::Half* x, int k, int n) {
    return _mm512_cvtph_ps(kWhole ? _mm256_loadu_epi16(x + 16 * k)
                                  : _mm256_maskz_loadu_epi16(first_lanes(n, 16 * k, 16), x + 16 * k));
}
template <bool kWhole>
PTQ_AVX512_INLINE __m512d eight(const simd::Half* x, int k, int n) {
    return _mm512_cvtps_pd(_mm256_cvtph_ps(kWhole ? _mm_loadu_epi16(x + 8 * k)
                                                  : _mm_maskz_loadu_epi16(first_lanes(n, 8 * k, 8), x + 8 * k)));
}

template <bool kWhole>
PTQ_AVX512_INLINE __m512 sixteen(const simd::BFloat16* x, int k, int n) {
    const int begin = 32 * (k / 2);
    const __m512i words =
        kWhole ? _mm512_loadu_epi16(x + begin) : _mm512_maskz_loadu_epi16(first_lanes(n, begin, 32), x + begin);
    return _mm512_castsi512_ps(k % 2 ? _mm512_and_si512(words, _mm512_set1_epi32(0xffff << 16))
                                     : _mm512_slli_epi32(words, 16));
}
template <bool kWhole>
PTQ_AVX512_INLINE __m512d eight(const simd::BFloat16* x, int k, int n) {
    const int begin = 16 * (k / 2);
    const __m256i words =
        kWhole ? _mm256_loadu_epi16(x + begin) : _mm256_maskz_loadu_epi16(first_lanes(n, begin, 16), x + begin);
    return _mm512_cvtps_pd(_mm256_castsi256_ps(k % 2 ? _mm256_and_si256(words, _mm256_set1_epi32(0xffff << 16))
                                                     : _mm256_slli_epi32(words, 16)));
}

template <class T>
constexpr bool kEvenOdd = std::is_same_v<T, simd::BFloat16>;

// Which of the k-th `size` there are.
template <class T>
PTQ_AVX512_INLINE uint32_t present(int n, int k, int size) {
    if (!kEvenOdd<T>) return first_lanes(n, size * k, size);
    const int pairs = std::clamp(n - 2 * size * (k / 2), 0, 2 * size) + 1 - k % 2;  // of which each has one here
    return first_lanes(pairs / 2, 0, size);
}

// Their lanes: all vectors from p, and back.
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
PTQ_AVX512_INLINE __m512d sum_of(__m512d a, __m512d b, __m512d one) { return _mm512_fmadd_pd(a, one, b); }
PTQ_AVX512_INLINE __m512d opaque_one() {
    __m512d one = _mm512_set1_pd(1.0);
    asm("" : "+v"(one));
    return one;
}
#endif

// Both passes add `rows` rows of n values, `stride` apart, to lanes j and following. n is at most kLanes.

struct FirstPass {
    template <int kCount>  // rows
    static PTQ_INLINE void add(const float* __restrict x, int64_t stride, int64_t n, double* __restrict sum,
                               float* __restrict min, float* __restrict max, int32_t* __restrict positive) {
        for (int64_t j = 0; j < n; ++j) {
            double s = sum[j];
            float low = min[j], high = max[j];
            int32_t p = positive[j];
            for (int r = 0; r < kCount; ++r) {
                const float v = x[r * stride + j];
                s += v;
                low = v < low ? v : low;  // passes over NaN
                high = v > high ? v : high;
                p += v > 0.0f;
            }
            sum[j] = s;
            min[j] = low;
            max[j] = high;
            positive[j] = p;
        }
    }
    template <int kCount>
    static PTQ_INLINE void add_rows(const float* x, int64_t stride, int64_t n, Lanes& lanes, int64_t j) {
        add<kCount>(x, stride, n, &lanes.sum[j], &lanes.min[j], &lanes.max[j], &lanes.positive[j]);
    }

#if defined(__x86_64__)
    template <bool kWhole, class T>
    static PTQ_TARGET_AVX512 void add_rows_avx512(const T* x, int64_t stride, int64_t rows, int n, Lanes& lanes,
                                                  int64_t j, Ahead& ahead) {
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
            for (int k = 0; k < 8; ++k) sum[k] = sum_of(eight<kWhole>(x, k, n), sum[k], one);
            for (int k = 0; k < 4; ++k) {
                const __m512 v = sixteen<kWhole>(x, k, n);
                const __mmask16 here = kWhole ? 0xffff : present<T>(n, k, 16);
                min[k] = _mm512_mask_min_ps(min[k], here, v, min[k]);  // the second if one is NaN
                max[k] = _mm512_mask_max_ps(max[k], here, v, max[k]);
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
    template <int kCount>
    static PTQ_INLINE void add(const float* __restrict x, int64_t stride, int64_t n, const double* __restrict mean,
                               const double* __restrict centre, double* __restrict squares,
                               double* __restrict deviations) {
        for (int64_t j = 0; j < n; ++j) {
            double q = squares[j], a = deviations[j];
            for (int r = 0; r < kCount; ++r) {
                const double v = x[r * stride + j], d = v - mean[j];
                q = __builtin_fma(d, d, q);  // on every instruction set, or they would differ
                a += std::fabs(kCentre ? v - centre[j] : d);
            }
            squares[j] = q;
            deviations[j] = a;
        }
    }
    template <int kCount>
    static PTQ_INLINE void add_rows(const float* x, int64_t stride, int64_t n, Lanes& lanes, int64_t j) {
        add<kCount>(x, stride, n, &lanes.mean[j], &lanes.centre[j], &lanes.squares[j], &lanes.deviations[j]);
    }

#if defined(__x86_64__)
    template <bool kWhole, class T>
    static PTQ_TARGET_AVX512 void add_rows_avx512(const T* x, int64_t stride, int64_t rows, int n, Lanes& lanes,
                                                  int64_t j, Ahead& ahead) {
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
                const __mmask8 here = kWhole ? 0xff : present<T>(n, k, 8);
                const __m512d v = eight<kWhole>(x, k, n), d = _mm512_maskz_sub_pd(here, v, mean[k]);
                squares[k] = _mm512_fmadd_pd(d, d, squares[k]);
                const __m512d deviation = _mm512_abs_pd(kCentre ? _mm512_maskz_sub_pd(here, v, centre[k]) : d);
                deviations[k] = sum_of(deviation, deviations[k], one);
            }
        }
        ahead = mine;
        store_lanes<T>(&lanes.squares[j], squares);
        store_lanes<T>(&lanes.deviations[j], deviations);
    }
#endif
};

// Adds n consecutive values to `width` lanes in turn, the first of them to lane 0.
template <class Pass>
struct AddTile {
    static PTQ_INLINE void run(const float* x, int64_t n, int64_t width, Lanes* lanes, Ahead* ahead) {
        const int64_t rows = n / width;
        int64_t row = 0;
        for (; row + kRows <= rows; row += kRows, x += kRows * width) {
            for (int64_t j = 0; j < width; j += kLanes) {
                for (int r = 0; r < kRows; ++r) ahead->fetch();
                Pass::template add_rows<kRows>(x + j, width, std::min<int64_t>(kLanes, width - j), *lanes, j);
            }
        }
        for (; row < rows; ++row, x += width) Pass::template add_rows<1>(x, width, width, *lanes, 0);
        Pass::template add_rows<1>(x, width, n % width, *lanes, 0);
    }
};

// Whether add_tile takes values of type T; where it does not, float32 values in their place are as fast.
template <class T>
bool takes() {
    return std::is_same_v<T, float> || simd::level() >= simd::Level::avx512;
}

template <class Pass, class T>
void add_tile(const T* x, int64_t n, int64_t width, Lanes& lanes, Ahead& ahead) {
#if defined(__x86_64__)
    if (simd::level() >= simd::Level::avx512) {
        const auto add_rows = [&](const T* from, int64_t rows, int64_t columns) {
            int64_t j = 0;
            for (; j + kLanes <= columns; j += kLanes)
                Pass::template add_rows_avx512<true>(from + j, width, rows, kLanes, lanes, j, ahead);
            if (j < columns)
                Pass::template add_rows_avx512<false>(from + j, width, rows, static_cast<int>(columns - j), lanes, j,
                                                      ahead);
        };
        const int64_t rows = n / width;
        add_rows(x, rows, width);
        return add_rows(x + rows * width, 1, n - rows * width);
    }
#endif
    if constexpr (std::is_same_v<T, float>) simd::run<AddTile<Pass>>(x, n, width, &lanes, &ahead);
}

}  // namespace ptq4cuda::statistics
