// Tiles for AVX-VNNI, which has the products of VNNI (conv_tiles_vnni.cpp) in vectors of 256 bits: two of them hold
// the 16 outputs of a panel. A tile is that of AVX2, 6 pixels by 16 outputs, but its sums have 32 bits, whatever the
// codes.
#include "conv_tiles.h"

#if defined(__x86_64__)

namespace ptq4cuda {
namespace {

constexpr int kPixels = 6;

template <int P>
PTQ_TARGET_AVX_VNNI void dot_panel(const uint8_t* const* pixels, int64_t channel, const Taps& taps,
                                   const int8_t* panel, int64_t plane_sums, int32_t* sums) {
    const uint8_t* x[P];
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p) x[p] = pixels[p];
    for (int64_t plane = 0; plane < taps.planes; ++plane, channel += taps.plane, sums += plane_sums) {
        __m256i sum[P][2];
#pragma GCC unroll 6
        for (int p = 0; p < P; ++p) sum[p][0] = sum[p][1] = _mm256_setzero_si256();
        for (int64_t t = 0; t < taps.count; ++t) {
            int64_t at = channel + taps.offsets[t];
            for (int64_t i = 0; i < taps.words; ++i, at += kWordChannels, panel += 64) {
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
#pragma GCC unroll 6
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums) + 2 * p + v, sum[p][v]);
    }
}

void dot_tile_avx_vnni(const uint8_t* const* pixels, int count, int64_t channel, const Taps& taps, int64_t,
                       const Panels& panels, int32_t* sums) {
    for (int b = 0; b < panels.count; ++b)
        with_constant<kPixels>(count, [&](auto p) {
            dot_panel<p>(pixels, channel, taps, panels.weights + b * panels.bytes, panels.count * kPanelSums,
                         sums + b * kPanelSums);
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
                             true};

}  // namespace ptq4cuda
#endif
