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
#include "conv_tiles.h"

#if defined(__x86_64__)

namespace ptq4cuda {
namespace {

template <int P, int B>
PTQ_TARGET_VNNI void dot_tile_vnni(const uint8_t* const* pixels, int64_t channel, const Taps& taps,
                                   const Panels& panels, int32_t* sums) {
    const uint8_t* x[P];
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p) x[p] = pixels[p];
    const int8_t* weights = panels.weights;
    for (int64_t plane = 0; plane < taps.planes; ++plane, channel += taps.plane, sums += B * kPanelSums) {
        __m512i sum[P][B];
#pragma GCC unroll 12
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) sum[p][b] = _mm512_setzero_si512();
        for (int64_t t = 0; t < taps.count; ++t) {
            int64_t at = channel + taps.offsets[t];
            for (int64_t i = 0; i < taps.words; ++i, at += kWordChannels, weights += 64) {
                __m512i w[B];
#pragma GCC unroll 4
                for (int b = 0; b < B; ++b) w[b] = _mm512_loadu_si512(weights + b * panels.bytes);
#pragma GCC unroll 12
                for (int p = 0; p < P; ++p) {
                    int32_t word;
                    std::memcpy(&word, x[p] + at, sizeof word);
                    const __m512i codes = _mm512_set1_epi32(word);
#pragma GCC unroll 4
                    for (int b = 0; b < B; ++b) sum[p][b] = _mm512_dpbusd_epi32(sum[p][b], codes, w[b]);
                }
            }
        }
#pragma GCC unroll 12
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) _mm512_storeu_si512(sums + b * kPanelSums + p * kPanelOutputs, sum[p][b]);
    }
}

// Pixels of a tile of so many panels: their sums fill 24 registers, or less where there is one panel.
constexpr int kVnniPixels[kTilePanels] = {12, 12, 8, 6};

inline void dot_tile_vnni(const uint8_t* const* pixels, int count, int64_t channel, const Taps& taps, int64_t,
                          const Panels& panels, int32_t* sums) {
    with_constant<kTilePanels>(panels.count, [&](auto b) {
        with_constant<kVnniPixels[b - 1]>(count,
                                          [&](auto p) { dot_tile_vnni<p, b>(pixels, channel, taps, panels, sums); });
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

PTQ_VNNI_INLINE void store_block(const __m512i (&sum)[4], int32_t* sums) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(sums + i * kPanelSums, sum[i]);
}

template <bool kFull>
PTQ_VNNI_INLINE __m512i load_channels(__mmask64 present, const uint8_t* from) {
    return kFull ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(present, from);
}

template <bool kFull>
PTQ_VNNI_INLINE void depthwise_pixel(const uint8_t* x, const TapGroups& groups, const int8_t* weights,
                                     __mmask64 present, int32_t* sums) {
    __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t g = 0; g < groups.count; ++g, weights += 256) {
        const auto tap = [&](int64_t i)
                             PTQ_TARGET_VNNI { return load_channels<kFull>(present, x + groups.offsets[4 * g + i]); };
        __m512i taps[4];
        unpack_taps(tap(0), tap(1), tap(2), tap(3), taps);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            sum[i] = _mm512_dpbusd_epi32(sum[i], taps[i], _mm512_loadu_si512(weights + 64 * i));
    }
    store_block(sum, sums);
}

// Pixels side by side and a 3x3 kernel: what is unpacked of a column of codes serves all pixels whose window has it,
// up to three if windows are one column apart, up to two if they are two.
template <bool kFull, int kStride>
PTQ_VNNI_INLINE void depthwise_row(const uint8_t* x, int count, const TapGroups& columns, const int8_t* weights,
                                   __mmask64 present, int32_t* sums) {
    const int64_t *rows = columns.offsets, step = columns.offsets[4] - columns.offsets[0];
    __m512i w[3][4], sum[2][4];  // sum[0] lacks the last column, sum[1] two
    const auto column = [&](__m512i(&taps)[4]) PTQ_TARGET_VNNI {
        unpack_taps(load_channels<kFull>(present, x + rows[0]), load_channels<kFull>(present, x + rows[1]),
                    load_channels<kFull>(present, x + rows[2]), _mm512_setzero_si512(), taps);
        x += step;
    };
    __m512i taps[4];
    column(taps);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) w[s][i] = _mm512_loadu_si512(weights + 256 * s + 64 * i);
        sum[1][i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), taps[i], w[0][i]);
    }
    if (kStride == 1) {
        column(taps);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            sum[0][i] = _mm512_dpbusd_epi32(sum[1][i], taps[i], w[1][i]);
            sum[1][i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), taps[i], w[0][i]);
        }
    }
    for (int p = 0; p < count; ++p, sums += kPanelOutputs) {
        if (kStride == 2) {
            column(taps);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) sum[0][i] = _mm512_dpbusd_epi32(sum[1][i], taps[i], w[1][i]);
        }
        column(taps);
        __m512i done[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            done[i] = _mm512_dpbusd_epi32(sum[0][i], taps[i], w[2][i]);
            if (kStride == 1) sum[0][i] = _mm512_dpbusd_epi32(sum[1][i], taps[i], w[1][i]);
            sum[1][i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), taps[i], w[0][i]);
        }
        store_block(done, sums);
    }
}

template <bool kFull>
PTQ_TARGET_VNNI void depthwise_tile_vnni(const uint8_t* const* pixels, int count, int64_t channel,
                                         const TapGroups& groups, const int8_t* weights, __mmask64 present,
                                         int32_t* sums) {
    const int64_t step = groups.columns && groups.count == 3 ? groups.offsets[4] - groups.offsets[0] : 0;
    for (int p = 0, n; p < count; p += n, sums += n * kPanelOutputs) {
        const uint8_t* x = pixels[p] + channel;
        const int64_t apart = p + 1 < count ? pixels[p + 1] - pixels[p] : 0;
        n = 1;
        if (step == 0 || (apart != step && apart != 2 * step)) {
            depthwise_pixel<kFull>(x, groups, weights, present, sums);
            continue;
        }
        while (p + n < count && pixels[p + n] - pixels[p + n - 1] == apart) ++n;
        apart == step ? depthwise_row<kFull, 1>(x, n, groups, weights, present, sums)
                      : depthwise_row<kFull, 2>(x, n, groups, weights, present, sums);
    }
}

inline void depthwise_tile_vnni(const uint8_t* const* pixels, int count, int64_t channel, const TapGroups& groups,
                                const int8_t* weights, int64_t channels, int32_t* sums) {
    channels >= 64
        ? depthwise_tile_vnni<true>(pixels, count, channel, groups, weights, ~__mmask64{0}, sums)
        : depthwise_tile_vnni<false>(pixels, count, channel, groups, weights, (__mmask64{1} << channels) - 1, sums);
}

}  // namespace

const Tiles kTilesVnni = {dot_tile_vnni,
                          false,
                          dot_tile_vnni,
                          4,
                          kTilePanels,
                          {kVnniPixels[0], kVnniPixels[1], kVnniPixels[2], kVnniPixels[3]},
                          depthwise_tile_vnni,
                          kTilePanels,
                          4,
                          false,
                          true};

}  // namespace ptq4cuda
#endif
