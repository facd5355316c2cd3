// The inner loops of conv2d_integer on the CPU: integer sums of a few pixels and the 16 outputs of one panel.
//
// AVX2 multiplies 32 unsigned bytes by 32 signed ones in one instruction, which also adds neighbours and leaves 16
// sums of 16 bits. The usual int8 kernel widens them to 32 bits at once: two more instructions for each product.
// But a code of 4 bits is at most 15 and a weight at most 128 in size, so that a pair is at most 3840, and a sum
// takes eight pairs at the very least, and mostly far more, until it must be widened: `span` of them. That leaves
// two instructions, a multiplication and an addition.
//
// A tile of 6 pixels by 16 outputs holds its 12 vectors of sums in the 16 registers there are:
//
//                     weights w0, w1: 4 channels x 16 outputs
//      pixel 0  c0 c1 c2 c3    sum00 sum01
//      ...      (broadcast)    ...
//      pixel 5  c0 c1 c2 c3    sum50 sum51
//
// Codes of 8 bits that could leave 16 bits within a pair or two come as two images, of their high nibbles and of
// their low ones, which are summed one after the other.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstring>

#include "../conv.h"
#include "simd.h"

namespace ptq4cuda {

constexpr int kTilePixels = 6;

// What one pixel reads: `count` stretches of `words` 32-bit words each, at these bytes from the pixel's address.
struct Taps {
    const int64_t* offsets;
    int64_t count, words;
};

// Adds to sums[p][o] of `count` pixels, from a channel on, and one panel.
using DotTile = void (*)(const uint8_t* const* pixels, int count, int64_t channel, Taps taps, int64_t span,
                         const int8_t* panel, int32_t* sums);

// A depthwise block is kBlock channels. Weights are [pairs of taps][2][kBlock], a missing last tap zero. Adds to
// sums[b][p][o] of channel 16 b + o of the block and pixel p.
constexpr int kBlock = 2 * kPanelOutputs;
struct TapPairs {
    const int64_t* offsets;  // of both taps of every pair
    int64_t count;
};
using DepthwiseTile = void (*)(const uint8_t* const* pixels, int count, int64_t channel, TapPairs pairs, int64_t span,
                               const int8_t* weights, int64_t channels, int32_t* sums);

// --- any processor -------------------------------------------------------------------------------------------------

inline void dot_tile(const uint8_t* const* pixels, int count, int64_t channel, Taps taps, int64_t,
                     const int8_t* panel, int32_t* sums) {
    for (int p = 0; p < count; ++p, sums += kPanelOutputs) {
        const int8_t* w = panel;
        for (int64_t t = 0; t < taps.count; ++t) {
            const uint8_t* x = pixels[p] + channel + taps.offsets[t];
            for (int64_t i = 0; i < taps.words; ++i, x += kWordChannels)
                for (int o = 0; o < kPanelOutputs; ++o)
                    for (int c = 0; c < kWordChannels; ++c) sums[o] += x[c] * *w++;
        }
    }
}

inline void depthwise_tile(const uint8_t* const* pixels, int count, int64_t channel, TapPairs pairs, int64_t,
                           const int8_t* weights, int64_t channels, int32_t* sums) {
    for (int p = 0; p < count; ++p)
        for (int64_t c = 0; c < channels; ++c) {
            int32_t& sum = sums[(c / kPanelOutputs * kTilePixels + p) * kPanelOutputs + c % kPanelOutputs];
            for (int64_t t = 0; t < 2 * pairs.count; ++t)
                sum += pixels[p][channel + pairs.offsets[t] + c] * weights[t * kBlock + c];
        }
}

// --- AVX2 ----------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
#define PTQ_AVX2_INLINE PTQ_TARGET_AVX2 inline __attribute__((always_inline))

PTQ_AVX2_INLINE __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// Adds 16-bit sums to 32-bit ones in memory and starts them anew.
template <int P>
PTQ_AVX2_INLINE void widen_sums(__m256i (&narrow)[P][2], int32_t* sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i* wide = reinterpret_cast<__m256i*>(sums);
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            const __m256i sum =
                _mm256_add_epi32(_mm256_loadu_si256(wide + 2 * p + v), _mm256_madd_epi16(narrow[p][v], ones));
            _mm256_storeu_si256(wide + 2 * p + v, sum);
            narrow[p][v] = _mm256_setzero_si256();
        }
}

template <int P>
PTQ_TARGET_AVX2 void dot_tile_avx2(const uint8_t* const* pixels, int64_t channel, Taps taps, int64_t span,
                                   const int8_t* panel, int32_t* sums) {
    __m256i narrow[P][2];
    const uint8_t* x[P];
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p) {
        x[p] = pixels[p];
        narrow[p][0] = narrow[p][1] = _mm256_setzero_si256();
    }
    int64_t left = span;  // products that the narrow sums still take
    for (int64_t t = 0; t < taps.count; ++t) {
        int64_t at = channel + taps.offsets[t];
        for (int64_t word = 0; word < taps.words;) {
            const int64_t n = std::min(left, taps.words - word);
            for (const int8_t* end = panel + n * kPanelOutputs * kWordChannels; panel != end; panel += 64, at += 4) {
                const __m256i w0 = load_bytes(panel);
                const __m256i w1 = load_bytes(panel + 32);
#pragma GCC unroll 6
                for (int p = 0; p < P; ++p) {
                    int32_t channels;
                    std::memcpy(&channels, x[p] + at, sizeof channels);
                    const __m256i codes = _mm256_set1_epi32(channels);
                    narrow[p][0] = _mm256_add_epi16(narrow[p][0], _mm256_maddubs_epi16(codes, w0));
                    narrow[p][1] = _mm256_add_epi16(narrow[p][1], _mm256_maddubs_epi16(codes, w1));
                }
            }
            word += n;
            left -= n;
            if (left == 0) {
                widen_sums<P>(narrow, sums);
                left = span;
            }
        }
    }
    if (left != span) widen_sums<P>(narrow, sums);
}

inline void dot_tile_avx2(const uint8_t* const* pixels, int count, int64_t channel, Taps taps, int64_t span,
                          const int8_t* panel, int32_t* sums) {
    switch (count) {
        case 1: return dot_tile_avx2<1>(pixels, channel, taps, span, panel, sums);
        case 2: return dot_tile_avx2<2>(pixels, channel, taps, span, panel, sums);
        case 3: return dot_tile_avx2<3>(pixels, channel, taps, span, panel, sums);
        case 4: return dot_tile_avx2<4>(pixels, channel, taps, span, panel, sums);
        case 5: return dot_tile_avx2<5>(pixels, channel, taps, span, panel, sums);
        default: return dot_tile_avx2<6>(pixels, channel, taps, span, panel, sums);
    }
}

// Eight channels of a depthwise block in 32 bits each, in the order in which unpacking leaves them: narrow[0] holds
// channels 0-7 and 16-23, narrow[1] channels 8-15 and 24-31.
PTQ_AVX2_INLINE void widen_block(__m256i (&narrow)[2], __m256i (&wide)[4]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m128i half = i < 2 ? _mm256_castsi256_si128(narrow[i]) : _mm256_extracti128_si256(narrow[i - 2], 1);
        wide[i] = _mm256_add_epi32(wide[i], _mm256_cvtepi16_epi32(half));
    }
    narrow[0] = narrow[1] = _mm256_setzero_si256();
}

// Takes blocks of all 32 channels.
inline PTQ_TARGET_AVX2 void depthwise_tile_avx2(const uint8_t* const* pixels, int count, int64_t channel,
                                                TapPairs pairs, int64_t span, const int8_t* weights, int64_t,
                                                int32_t* sums) {
    for (int p = 0; p < count; ++p) {
        const uint8_t* x = pixels[p] + channel;
        __m256i narrow[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        __m256i wide[4];
        __m256i* const of_panel[2] = {reinterpret_cast<__m256i*>(sums + p * kPanelOutputs),
                                      reinterpret_cast<__m256i*>(sums + (kTilePixels + p) * kPanelOutputs)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) wide[i] = _mm256_loadu_si256(of_panel[i / 2] + i % 2);
        for (int64_t t = 0, left = span; t < pairs.count; ++t) {
            const __m256i w0 = load_bytes(weights + 2 * t * kBlock), w1 = load_bytes(weights + (2 * t + 1) * kBlock);
            const __m256i x0 = load_bytes(x + pairs.offsets[2 * t]), x1 = load_bytes(x + pairs.offsets[2 * t + 1]);
            const __m256i low = _mm256_maddubs_epi16(_mm256_unpacklo_epi8(x0, x1), _mm256_unpacklo_epi8(w0, w1));
            const __m256i high = _mm256_maddubs_epi16(_mm256_unpackhi_epi8(x0, x1), _mm256_unpackhi_epi8(w0, w1));
            narrow[0] = _mm256_add_epi16(narrow[0], low);
            narrow[1] = _mm256_add_epi16(narrow[1], high);
            if (--left == 0) {
                widen_block(narrow, wide);
                left = span;
            }
        }
        widen_block(narrow, wide);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) _mm256_storeu_si256(of_panel[i / 2] + i % 2, wide[i]);
    }
}
#endif

}  // namespace ptq4cuda
