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
// Where a kernel has 3 rows, a group is a column of it, and what has been unpacked serves all pixels whose window has
// it.
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

// Four taps of 64 channels, in the order into which unpacking brings them.
PTQ_VNNI_INLINE void unpack_taps(__m512i x0, __m512i x1, __m512i x2, __m512i x3, __m512i (&taps)[4]) {
    const __m512i low01 = _mm512_unpacklo_epi8(x0, x1), low23 = _mm512_unpacklo_epi8(x2, x3);
    const __m512i high01 = _mm512_unpackhi_epi8(x0, x1), high23 = _mm512_unpackhi_epi8(x2, x3);
    taps[0] = _mm512_unpacklo_epi16(low01, low23);
    taps[1] = _mm512_unpackhi_epi16(low01, low23);
    taps[2] = _mm512_unpacklo_epi16(high01, high23);
    taps[3] = _mm512_unpackhi_epi16(high01, high23);
}

// Lane b of vector i are channels 4 i to 4 i + 3 of panel b: a transposition of lanes.
PTQ_VNNI_INLINE void store_block(const __m512i (&sum)[4], int32_t* sums) {
    const __m512i low01 = _mm512_shuffle_i32x4(sum[0], sum[1], 0x44);
    const __m512i low23 = _mm512_shuffle_i32x4(sum[2], sum[3], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(sum[0], sum[1], 0xee);
    const __m512i high23 = _mm512_shuffle_i32x4(sum[2], sum[3], 0xee);
    _mm512_storeu_si512(sums, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(sums + kPanelSums, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(sums + 2 * kPanelSums, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(sums + 3 * kPanelSums, _mm512_shuffle_i32x4(high01, high23, 0xdd));
}

PTQ_VNNI_INLINE void depthwise_pixel(const uint8_t* x, const TapGroups& groups, const int8_t* weights,
                                     __mmask64 present, int32_t* sums) {
    __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t g = 0; g < groups.count; ++g, weights += 256) {
        const auto tap = [&](int64_t i) PTQ_TARGET_VNNI {
            return _mm512_maskz_loadu_epi8(present, x + groups.offsets[4 * g + i]);
        };
        __m512i taps[4];
        unpack_taps(tap(0), tap(1), tap(2), tap(3), taps);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            sum[i] = _mm512_dpbusd_epi32(sum[i], taps[i], _mm512_loadu_si512(weights + 64 * i));
    }
    store_block(sum, sums);
}

// Pixels side by side and a 3x3 kernel: each column of codes adds to the sums of up to three pixels.
PTQ_VNNI_INLINE void depthwise_row(const uint8_t* x, int count, const TapGroups& columns, const int8_t* weights,
                                   __mmask64 present, int32_t* sums) {
    const int64_t *rows = columns.offsets, step = columns.offsets[4] - columns.offsets[0];
    __m512i w[3][4], sum[2][4];  // sum[0] lacks the last column, sum[1] two
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        sum[0][i] = sum[1][i] = _mm512_setzero_si512();
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) w[s][i] = _mm512_loadu_si512(weights + 256 * s + 64 * i);
    }
    for (int column = 0; column < count + 2; ++column, x += step) {
        __m512i taps[4];
        unpack_taps(_mm512_maskz_loadu_epi8(present, x + rows[0]), _mm512_maskz_loadu_epi8(present, x + rows[1]),
                    _mm512_maskz_loadu_epi8(present, x + rows[2]), _mm512_setzero_si512(), taps);
        __m512i done[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            done[i] = _mm512_dpbusd_epi32(sum[0][i], taps[i], w[2][i]);
            sum[0][i] = _mm512_dpbusd_epi32(sum[1][i], taps[i], w[1][i]);
            sum[1][i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), taps[i], w[0][i]);
        }
        if (column >= 2) store_block(done, sums + (column - 2) * kPanelOutputs);
    }
}

inline PTQ_TARGET_VNNI void depthwise_tile_vnni(const uint8_t* const* pixels, int count, int64_t channel,
                                                const TapGroups& groups, const int8_t* weights, int64_t channels,
                                                int32_t* sums) {
    const __mmask64 present = channels >= 64 ? ~__mmask64{0} : (__mmask64{1} << channels) - 1;
    const bool columns = groups.columns && groups.count == 3;
    for (int p = 0, n; p < count; p += n, sums += n * kPanelOutputs) {
        const uint8_t* x = pixels[p] + channel;
        n = 1;
        if (columns)
            while (p + n < count && pixels[p + n] - pixels[p + n - 1] == groups.offsets[4] - groups.offsets[0]) ++n;
        n > 1 ? depthwise_row(x, n, groups, weights, present, sums)
              : depthwise_pixel(x, groups, weights, present, sums);
    }
}

constexpr Tiles kTilesVnni = {dot_tile_vnni, false, dot_tile_vnni, 4, kTilePanels, depthwise_tile_vnni,
                              kTilePanels,   4,     false};

}  // namespace ptq4cuda
#endif
