// Tiles for AVX-512 with VNNI.
//
// One instruction multiplies 64 unsigned bytes by 64 signed ones and adds each four neighbouring products to a sum of
// 32 bits: the 4 channels of a word by the 16 outputs of a panel, exactly. A tile of 6 pixels by 4 panels holds its
// 24 vectors of sums in registers, beside the weights of a word, and a word of codes is read for 4 instructions:
//
//                     weights of panel 0, 1, 2, 3: 4 channels x 16 outputs each
//      pixel 0  c0 c1 c2 c3    sum00 sum01 sum02 sum03
//      ...      (broadcast)    ...
//      pixel 5  c0 c1 c2 c3    sum50 sum51 sum52 sum53
//
// In a depthwise layer the 4 products of a sum are taps: 4 x 64 channels are unpacked into 4 x 16 groups of 4 taps.
#pragma once

#include "conv_tiles.h"

#if defined(__x86_64__)

namespace ptq4cuda {

#define PTQ_VNNI_INLINE PTQ_TARGET_VNNI inline __attribute__((always_inline))

template <int P, int B>
PTQ_TARGET_VNNI void dot_tile_vnni(const uint8_t* const* pixels, int64_t channel, const Taps& taps,
                                   const Panels& panels, int32_t* sums) {
    __m512i sum[P][B];
    const uint8_t* x[P];
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p) {
        x[p] = pixels[p];
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) sum[p][b] = _mm512_setzero_si512();
    }
    const int8_t* weights = panels.weights;
    for (int64_t t = 0; t < taps.count; ++t) {
        const int64_t end = channel + taps.offsets[t] + taps.words * kWordChannels;
        for (int64_t at = channel + taps.offsets[t]; at < end; at += kWordChannels, weights += 64) {
            __m512i w[B];
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) w[b] = _mm512_loadu_si512(weights + b * panels.bytes);
#pragma GCC unroll 6
            for (int p = 0; p < P; ++p) {
                int32_t word;
                std::memcpy(&word, x[p] + at, sizeof word);
                const __m512i codes = _mm512_set1_epi32(word);
#pragma GCC unroll 4
                for (int b = 0; b < B; ++b) sum[p][b] = _mm512_dpbusd_epi32(sum[p][b], codes, w[b]);
            }
        }
    }
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) _mm512_storeu_si512(sums + b * kPanelSums + p * kPanelOutputs, sum[p][b]);
}

inline void dot_tile_vnni(const uint8_t* const* pixels, int count, int64_t channel, const Taps& taps, int64_t,
                          const Panels& panels, int32_t* sums) {
    with_constant<kTilePanels>(panels.count, [&](auto b) {
        with_constant<kTilePixels>(count, [&](auto p) { dot_tile_vnni<p, b>(pixels, channel, taps, panels, sums); });
    });
}

template <int P>
PTQ_VNNI_INLINE void depthwise_pixels(const uint8_t* const* pixels, int64_t channel, const TapGroups& taps,
                                      const int8_t* weights, __mmask64 present, int32_t* sums) {
    __m512i sum[P][4];
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[p][i] = _mm512_setzero_si512();
    for (int64_t t = 0; t < taps.count; ++t, weights += 256) {
        __m512i w[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) w[i] = _mm512_loadu_si512(weights + 64 * i);
#pragma GCC unroll 3
        for (int p = 0; p < P; ++p) {
            __m512i x[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                x[i] = _mm512_maskz_loadu_epi8(present, pixels[p] + channel + taps.offsets[4 * t + i]);
            const __m512i low01 = _mm512_unpacklo_epi8(x[0], x[1]), low23 = _mm512_unpacklo_epi8(x[2], x[3]);
            const __m512i high01 = _mm512_unpackhi_epi8(x[0], x[1]), high23 = _mm512_unpackhi_epi8(x[2], x[3]);
            sum[p][0] = _mm512_dpbusd_epi32(sum[p][0], _mm512_unpacklo_epi16(low01, low23), w[0]);
            sum[p][1] = _mm512_dpbusd_epi32(sum[p][1], _mm512_unpackhi_epi16(low01, low23), w[1]);
            sum[p][2] = _mm512_dpbusd_epi32(sum[p][2], _mm512_unpacklo_epi16(high01, high23), w[2]);
            sum[p][3] = _mm512_dpbusd_epi32(sum[p][3], _mm512_unpackhi_epi16(high01, high23), w[3]);
        }
    }
    // Lane b of vector i are channels 4 i to 4 i + 3 of panel b: a transposition of lanes.
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) {
        const __m512i low01 = _mm512_shuffle_i32x4(sum[p][0], sum[p][1], 0x44);
        const __m512i low23 = _mm512_shuffle_i32x4(sum[p][2], sum[p][3], 0x44);
        const __m512i high01 = _mm512_shuffle_i32x4(sum[p][0], sum[p][1], 0xee);
        const __m512i high23 = _mm512_shuffle_i32x4(sum[p][2], sum[p][3], 0xee);
        int32_t* to = sums + p * kPanelOutputs;
        _mm512_storeu_si512(to, _mm512_shuffle_i32x4(low01, low23, 0x88));
        _mm512_storeu_si512(to + kPanelSums, _mm512_shuffle_i32x4(low01, low23, 0xdd));
        _mm512_storeu_si512(to + 2 * kPanelSums, _mm512_shuffle_i32x4(high01, high23, 0x88));
        _mm512_storeu_si512(to + 3 * kPanelSums, _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
}

// Three pixels at a time: 12 vectors of sums, 4 of weights, 8 of codes.
inline PTQ_TARGET_VNNI void depthwise_tile_vnni(const uint8_t* const* pixels, int count, int64_t channel,
                                                const TapGroups& taps, const int8_t* weights, int64_t channels,
                                                int32_t* sums) {
    const __mmask64 present = channels >= 64 ? ~__mmask64{0} : (__mmask64{1} << channels) - 1;
    int p = 0;
    for (; p + 3 <= count; p += 3)
        depthwise_pixels<3>(pixels + p, channel, taps, weights, present, sums + p * kPanelOutputs);
    for (; p < count; ++p) depthwise_pixels<1>(pixels + p, channel, taps, weights, present, sums + p * kPanelOutputs);
}

constexpr Tiles kTilesVnni = {dot_tile_vnni, false, dot_tile_vnni, 4, kTilePanels, depthwise_tile_vnni,
                              kTilePanels,   4,     false};

}  // namespace ptq4cuda
#endif
