// Tiles for AVX-VNNI, which has the products of VNNI (conv_tiles_vnni.cpp) in vectors of 256 bits: two of them hold
// the 16 outputs of a panel. A tile is that of AVX2, 6 pixels by 16 outputs, but its sums have 32 bits, whatever the
// codes.
#include "conv_tiles.h"

#if defined(__x86_64__)

namespace ptq4cuda {
namespace {

constexpr int kPixels = 6;

// Adds the products of words side by side, from byte `at` to `end` of each pixel, and goes on to the weights behind.
template <int P>
PTQ_AVX_VNNI_INLINE void add_products(const uint8_t* const (&x)[P], int64_t at, int64_t end, const int8_t*& panel,
                                      __m256i (&sum)[P][2]) {
    for (; at < end; at += kWordChannels, panel += 64) {
        const __m256i w0 = simd::load_bytes(panel), w1 = simd::load_bytes(panel + 32);
#pragma GCC unroll 6
        for (int p = 0; p < P; ++p) {
            int32_t word;
            std::memcpy(&word, x[p] + at, sizeof word);
            const __m256i codes = _mm256_set1_epi32(word);
            sum[p][0] = _mm256_dpbusd_avx_epi32(sum[p][0], codes, w0);
            sum[p][1] = _mm256_dpbusd_avx_epi32(sum[p][1], codes, w1);
        }
    }
}

template <int P>
PTQ_TARGET_AVX_VNNI void dot_panel(const uint8_t* const* pixels, int64_t channel, const Taps& taps,
                                   const int8_t* panel, int32_t* sums) {
    __m256i sum[P][2];
    const uint8_t* x[P];
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p) {
        x[p] = pixels[p];
        sum[p][0] = sum[p][1] = _mm256_setzero_si256();
    }
    for (int64_t t = 0; t < taps.count; ++t) {
        const int64_t at = channel + taps.offsets[t];
        add_products(x, at, at + taps.words * kWordChannels, panel, sum);
    }
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums) + 2 * p + v, sum[p][v]);
}

void dot_tile_avx_vnni(const uint8_t* const* pixels, int count, int64_t channel, const Taps& taps, int64_t,
                       const Panels& panels, int32_t* sums) {
    for (int b = 0; b < panels.count; ++b)
        with_constant<kPixels>(count, [&](auto p) {
            dot_panel<p>(pixels, channel, taps, panels.weights + b * panels.bytes, sums + b * kPanelSums);
        });
}

template <int P>
PTQ_TARGET_AVX_VNNI void window_panel(const uint8_t* const* windows, int64_t plane, int64_t words,
                                      const int8_t* panel, int64_t of_position, int32_t* products) {
    for (int64_t position = 0; position < kPositions; ++position, products += of_position) {
        __m256i sum[P][2];
        const uint8_t* x[P];
#pragma GCC unroll 6
        for (int p = 0; p < P; ++p) {
            x[p] = windows[p] + position * plane;
            sum[p][0] = sum[p][1] = _mm256_setzero_si256();
        }
        add_products(x, 0, words * kWordChannels, panel, sum);
#pragma GCC unroll 6
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(products) + 2 * p + v, sum[p][v]);
    }
}

void window_tile_avx_vnni(const uint8_t* const* windows, int count, int64_t plane, int64_t words,
                          const Panels& panels, int32_t* products) {
    for (int b = 0; b < panels.count; ++b)
        with_constant<kPixels>(count, [&](auto p) {
            window_panel<p>(windows, plane, words, panels.weights + b * panels.bytes, panels.count * kPanelSums,
                            products + b * kPanelSums);
        });
}

}  // namespace

const Tiles kTilesAvxVnni = {dot_tile_avx_vnni,
                             false,
                             dot_tile_avx_vnni,
                             4,
                             kTilePanels,
                             {kPixels, kPixels, kPixels, kPixels},
                             depthwise_tile_avx2,
                             2,
                             2,
                             true,
                             true,
                             window_tile_avx_vnni};

}  // namespace ptq4cuda
#endif
