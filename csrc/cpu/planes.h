// Images of three channels that lie apart become codes beside each other, in one pass: what a network begins with.
#pragma once

#include "../numerics.h"
#include "simd.h"

namespace ptq4cuda {

#if defined(__x86_64__)
// code() of 32 values. Sums are those of integers, which no product is too large for: what is beyond the limits is
// beyond all codes, whatever the zero point is.
PTQ_AVX2_INLINE __m256i codes_of(const float* x, const Quantizer& q) {
    const __m256 inv_scale = _mm256_set1_ps(q.inv_scale), limit = _mm256_set1_ps(1 << 30);
    const __m256 least = _mm256_set1_ps(-(1 << 30));
    const __m256i zero_point = _mm256_set1_epi32(static_cast<int32_t>(q.zero_point));
    __m256i sums[4];
    for (int i = 0; i < 4; ++i) {
        const __m256 t = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inv_scale);
        const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(t, t, _CMP_ORD_Q));  // NaN becomes 0
        const __m256i rounded = _mm256_cvtps_epi32(_mm256_min_ps(limit, _mm256_max_ps(least, t)));
        sums[i] = _mm256_add_epi32(_mm256_and_si256(rounded, number), zero_point);
    }
    const __m256i codes =
        _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
    return _mm256_min_epu8(_mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)),
                           _mm256_set1_epi8(static_cast<char>(static_cast<uint8_t>(q.qmax))));
}

// Codes of pixels whose channels lie `plane` apart; returns how many of `count` it wrote.
PTQ_TARGET_AVX2 inline int64_t quantize_planes_avx2(const float* x, int64_t plane, int64_t count, const Quantizer* q,
                                                    uint8_t* y) {
    // Where the third i of 48 bytes takes channel c from.
    alignas(32) uint8_t from[3][3][32];
    for (int i = 0; i < 3; ++i)
        for (int c = 0; c < 3; ++c)
            for (int j = 0; j < 32; ++j) {
                const int at = 16 * i + j % 16;
                from[i][c][j] = at % 3 == c ? static_cast<uint8_t>(at / 3) : 0x80;
            }
    int64_t p = 0;
    for (; p + 32 <= count; p += 32, x += 32) {
        __m256i thirds[3] = {};
        for (int c = 0; c < 3; ++c) {
            const __m256i codes = codes_of(x + c * plane, q[c]);
            for (int i = 0; i < 3; ++i)
                thirds[i] = _mm256_or_si256(
                    thirds[i],
                    _mm256_shuffle_epi8(codes, _mm256_load_si256(reinterpret_cast<const __m256i*>(from[i][c]))));
        }
        __m256i* to = reinterpret_cast<__m256i*>(y + 3 * p);
        _mm256_storeu_si256(to, _mm256_permute2x128_si256(thirds[0], thirds[1], 0x20));
        _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(thirds[2], thirds[0], 0x30));
        _mm256_storeu_si256(to + 2, _mm256_permute2x128_si256(thirds[1], thirds[2], 0x31));
    }
    return p;
}

// The same to the end.
inline void quantize_planes(const float* x, int64_t plane, int64_t count, const Quantizer* q, uint8_t* y) {
    for (int64_t p = quantize_planes_avx2(x, plane, count, q, y); p < count; ++p)
        for (int c = 0; c < 3; ++c) y[3 * p + c] = code(x[c * plane + p], q[c]);
}
#endif

}  // namespace ptq4cuda
