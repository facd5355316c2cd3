// Tiles for AVX2.
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
// their low ones, which are summed one after the other. Dense and depthwise layers are better served by products of
// 16 bits, which are half as many in an instruction, but are added up in 32 bits at once: their sums are short.
#include "conv_tiles.h"

#if defined(__x86_64__)

namespace ptq4cuda {
namespace {

constexpr int kAvx2Pixels = 6;

// Adds 16-bit sums to 32-bit ones in memory, or begins these with them, and starts anew.
template <int P>
PTQ_AVX2_INLINE void widen_sums(__m256i (&narrow)[P][2], bool begin, int32_t* sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i* wide = reinterpret_cast<__m256i*>(sums);
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            __m256i sum = _mm256_madd_epi16(narrow[p][v], ones);
            if (!begin) sum = _mm256_add_epi32(sum, _mm256_loadu_si256(wide + 2 * p + v));
            _mm256_storeu_si256(wide + 2 * p + v, sum);
            narrow[p][v] = _mm256_setzero_si256();
        }
}

template <int P>
PTQ_TARGET_AVX2 void dot_tile_avx2(const uint8_t* const* pixels, int64_t channel, const Taps& taps, int64_t span,
                                   const int8_t* panel, int32_t* sums) {
    __m256i narrow[P][2];
    const uint8_t* x[P];
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p) {
        x[p] = pixels[p];
        narrow[p][0] = narrow[p][1] = _mm256_setzero_si256();
    }
    int64_t left = span;  // products that the narrow sums still take
    bool begin = true;
    for (int64_t t = 0; t < taps.count; ++t) {
        int64_t at = channel + taps.offsets[t];
        for (int64_t word = 0; word < taps.words;) {
            const int64_t n = std::min(left, taps.words - word);
            for (const int8_t* end = panel + n * kPanelOutputs * kWordChannels; panel != end; panel += 64, at += 4) {
                const __m256i w0 = simd::load_bytes(panel);
                const __m256i w1 = simd::load_bytes(panel + 32);
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
                widen_sums<P>(narrow, begin, sums);
                left = span;
                begin = false;
            }
        }
    }
    if (left != span) widen_sums<P>(narrow, begin, sums);
}

inline void dot_tile_avx2(const uint8_t* const* pixels, int count, int64_t channel, const Taps& taps, int64_t span,
                          const Panels& panels, int32_t* sums) {
    for (int b = 0; b < panels.count; ++b)
        with_constant<kAvx2Pixels>(count, [&](auto p) {
            dot_tile_avx2<p>(pixels, channel, taps, span, panels.weights + b * panels.bytes, sums + b * kPanelSums);
        });
}

// Of 16-bit codes, two in a word, and weights [words][16 outputs][2].
template <int P>
PTQ_TARGET_AVX2 void dense_tile_avx2(const uint8_t* const* pixels, const Taps& taps, const int8_t* panel,
                                     int32_t* sums) {
    __m256i wide[P][2];
    const uint8_t* x[P];
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p) {
        x[p] = pixels[p];
        wide[p][0] = wide[p][1] = _mm256_setzero_si256();
    }
    for (int64_t t = 0; t < taps.count; ++t) {
        const int64_t end = taps.offsets[t] + taps.words * 4;
        for (int64_t at = taps.offsets[t]; at < end; at += 4, panel += 64) {
            const __m256i w0 = simd::load_bytes(panel);
            const __m256i w1 = simd::load_bytes(panel + 32);
#pragma GCC unroll 6
            for (int p = 0; p < P; ++p) {
                int32_t two;
                std::memcpy(&two, x[p] + at, sizeof two);
                const __m256i codes = _mm256_set1_epi32(two);
                wide[p][0] = _mm256_add_epi32(wide[p][0], _mm256_madd_epi16(codes, w0));
                wide[p][1] = _mm256_add_epi32(wide[p][1], _mm256_madd_epi16(codes, w1));
            }
        }
    }
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums) + 2 * p + v, wide[p][v]);
}

void dense_tile_avx2(const uint8_t* const* pixels, int count, int64_t, const Taps& taps, int64_t,
                     const Panels& panels, int32_t* sums) {
    for (int b = 0; b < panels.count; ++b)
        with_constant<kAvx2Pixels>(count, [&](auto p) {
            dense_tile_avx2<p>(pixels, taps, panels.weights + b * panels.bytes, sums + b * kPanelSums);
        });
}

}  // namespace

// A block is 32 channels; that of a tensor of less reads beyond them, into weights that are zero.
PTQ_TARGET_AVX2 void depthwise_tile_avx2(const uint8_t* const* pixels, int count, int64_t channel,
                                         const TapGroups& pairs, const int8_t* weights, int64_t channels,
                                         int32_t* sums) {
    const __m256i zero = _mm256_setzero_si256();
    for (int p = 0; p < count; ++p) {
        const uint8_t* x = pixels[p] + channel;
        __m256i wide[4] = {zero, zero, zero, zero};
        const int8_t* w = weights;
        const auto codes_of = [&](int64_t tap) PTQ_TARGET_AVX2 {
            if (channels >= 32) return simd::load_bytes(x + pairs.offsets[tap]);
            alignas(32) uint8_t codes[32] = {};
            std::memcpy(codes, x + pairs.offsets[tap], channels);
            return simd::load_bytes(codes);
        };
        for (int64_t t = 0; t < pairs.count; ++t, w += 128) {
            const __m256i x0 = codes_of(2 * t), x1 = codes_of(2 * t + 1);
            const __m256i low = _mm256_unpacklo_epi8(x0, x1), high = _mm256_unpackhi_epi8(x0, x1);
            const __m256i codes[4] = {_mm256_unpacklo_epi8(low, zero), _mm256_unpackhi_epi8(low, zero),
                                      _mm256_unpacklo_epi8(high, zero), _mm256_unpackhi_epi8(high, zero)};
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                wide[i] = _mm256_add_epi32(wide[i], _mm256_madd_epi16(codes[i], simd::load_bytes(w + 32 * i)));
        }
        __m256i* to = reinterpret_cast<__m256i*>(sums + p * kPanelOutputs);
        _mm256_storeu_si256(to, wide[0]);
        _mm256_storeu_si256(to + 1, wide[1]);
        to += kPanelSums / 8;
        _mm256_storeu_si256(to, wide[2]);
        _mm256_storeu_si256(to + 1, wide[3]);
    }
}

const Tiles kTilesAvx2 = {dot_tile_avx2,
                          true,
                          dense_tile_avx2,
                          2,
                          kTilePanels,
                          {kAvx2Pixels, kAvx2Pixels, kAvx2Pixels, kAvx2Pixels},
                          depthwise_tile_avx2,
                          2,
                          2,
                          true,
                          true};

}  // namespace ptq4cuda
#endif
