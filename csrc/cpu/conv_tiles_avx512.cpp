// Tiles for AVX-512 without VNNI: the products of AVX2 (conv_tiles_avx2.cpp), with sums of 16 bits that are widened
// after `span` of them, in vectors of 512 bits and tiles as large as those of VNNI (conv_tiles_vnni.cpp).
#include "conv_tiles.h"

#if defined(__x86_64__)

namespace ptq4cuda {
namespace {

// Pixels of a tile of so many panels: their sums fill 24 registers, or less where there is one panel.
constexpr int kPixels[kTilePanels] = {12, 12, 8, 6};

// Adds 16-bit sums to 32-bit ones in memory, or begins these with them, and starts anew.
template <int P, int B>
PTQ_AVX512_INLINE void widen_sums(__m512i (&narrow)[P][B], bool begin, int32_t* sums) {
    const __m512i ones = _mm512_set1_epi16(1);
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
            int32_t* to = sums + b * kPanelSums + p * kPanelOutputs;
            __m512i sum = _mm512_madd_epi16(narrow[p][b], ones);
            if (!begin) sum = _mm512_add_epi32(sum, _mm512_loadu_si512(to));
            _mm512_storeu_si512(to, sum);
            narrow[p][b] = _mm512_setzero_si512();
        }
}

template <int P, int B>
PTQ_TARGET_AVX512 void dot_panels(const uint8_t* const* pixels, int64_t channel, const Taps& taps, int64_t span,
                                  const Panels& panels, int32_t* sums) {
    __m512i narrow[P][B];
    const uint8_t* x[P];
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p) {
        x[p] = pixels[p];
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) narrow[p][b] = _mm512_setzero_si512();
    }
    const int8_t* weights = panels.weights;
    int64_t left = span;  // products that the narrow sums still take
    bool begin = true;
    for (int64_t t = 0; t < taps.count; ++t) {
        int64_t at = channel + taps.offsets[t];
        for (int64_t word = 0; word < taps.words;) {
            const int64_t n = std::min(left, taps.words - word);
            for (const int8_t* end = weights + n * 64; weights != end; weights += 64, at += kWordChannels) {
                __m512i w[B];
#pragma GCC unroll 4
                for (int b = 0; b < B; ++b) w[b] = _mm512_loadu_si512(weights + b * panels.bytes);
#pragma GCC unroll 12
                for (int p = 0; p < P; ++p) {
                    int32_t channels;
                    std::memcpy(&channels, x[p] + at, sizeof channels);
                    const __m512i codes = _mm512_set1_epi32(channels);
#pragma GCC unroll 4
                    for (int b = 0; b < B; ++b)
                        narrow[p][b] = _mm512_add_epi16(narrow[p][b], _mm512_maddubs_epi16(codes, w[b]));
                }
            }
            word += n;
            left -= n;
            if (left == 0) {
                widen_sums<P, B>(narrow, begin, sums);
                left = span;
                begin = false;
            }
        }
    }
    if (left != span) widen_sums<P, B>(narrow, begin, sums);
}

// Of 16-bit codes, two in a word, and weights [words][16 outputs][2].
template <int P, int B>
PTQ_TARGET_AVX512 void dense_panels(const uint8_t* const* pixels, const Taps& taps, const Panels& panels,
                                    int32_t* sums) {
    __m512i wide[P][B];
    const uint8_t* x[P];
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p) {
        x[p] = pixels[p];
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) wide[p][b] = _mm512_setzero_si512();
    }
    const int8_t* weights = panels.weights;
    for (int64_t t = 0; t < taps.count; ++t) {
        const int64_t end = taps.offsets[t] + taps.words * kWordChannels;
        for (int64_t at = taps.offsets[t]; at < end; at += kWordChannels, weights += 64) {
            __m512i w[B];
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) w[b] = _mm512_loadu_si512(weights + b * panels.bytes);
#pragma GCC unroll 12
            for (int p = 0; p < P; ++p) {
                int32_t two;
                std::memcpy(&two, x[p] + at, sizeof two);
                const __m512i codes = _mm512_set1_epi32(two);
#pragma GCC unroll 4
                for (int b = 0; b < B; ++b) wide[p][b] = _mm512_add_epi32(wide[p][b], _mm512_madd_epi16(codes, w[b]));
            }
        }
    }
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) _mm512_storeu_si512(sums + b * kPanelSums + p * kPanelOutputs, wide[p][b]);
}

// Calls f with a tile's pixels and panels as constants.
template <class F>
void with_size(int pixels, int panels, const F& f) {
    with_constant<kTilePanels>(panels,
                               [&](auto b) { with_constant<kPixels[b - 1]>(pixels, [&](auto p) { f(p, b); }); });
}

void dot_tile_avx512(const uint8_t* const* pixels, int count, int64_t channel, const Taps& taps, int64_t span,
                     const Panels& panels, int32_t* sums) {
    with_size(count, panels.count,
              [&](auto p, auto b) { dot_panels<p, b>(pixels, channel, taps, span, panels, sums); });
}

void dense_tile_avx512(const uint8_t* const* pixels, int count, int64_t, const Taps& taps, int64_t,
                       const Panels& panels, int32_t* sums) {
    with_size(count, panels.count, [&](auto p, auto b) { dense_panels<p, b>(pixels, taps, panels, sums); });
}

}  // namespace

const Tiles kTilesAvx512 = {dot_tile_avx512,
                            true,
                            dense_tile_avx512,
                            2,
                            kTilePanels,
                            {kPixels[0], kPixels[1], kPixels[2], kPixels[3]},
                            depthwise_tile_avx2,
                            2,
                            2,
                            true,
                            true};

}  // namespace ptq4cuda
#endif
