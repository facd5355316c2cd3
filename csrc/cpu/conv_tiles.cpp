// Tiles (conv_tiles.h) for any processor, and the choice.
#include "conv_tiles.h"

namespace ptq4cuda {
namespace {

void dot_tile(const uint8_t* const* pixels, int count, int64_t channel, const Taps& taps, int64_t,
              const Panels& panels, int32_t* sums) {
    const int8_t* weights = panels.weights;
    for (int64_t plane = 0; plane < taps.planes; ++plane, channel += taps.plane, sums += kPanelSums) {
        for (int p = 0; p < count; ++p) {
            int32_t* of_pixel = sums + p * kPanelOutputs;
            std::fill_n(of_pixel, kPanelOutputs, 0);
            const int8_t* w = weights;
            for (int64_t t = 0; t < taps.count; ++t) {
                const uint8_t* x = pixels[p] + channel + taps.offsets[t];
                for (int64_t i = 0; i < taps.words; ++i, x += kWordChannels)
                    for (int o = 0; o < kPanelOutputs; ++o)
                        for (int c = 0; c < kWordChannels; ++c) of_pixel[o] += x[c] * *w++;
            }
        }
        weights += taps.count * taps.words * kPanelOutputs * kWordChannels;
    }
}

void depthwise_tile(const uint8_t* const* pixels, int count, int64_t channel, const TapGroups& taps,
                    const int8_t* weights, int64_t channels, int32_t* sums) {
    for (int p = 0; p < count; ++p)
        for (int64_t c = 0; c < channels; ++c) {
            int32_t& sum = sums[c / kPanelOutputs * kPanelSums + p * kPanelOutputs + c % kPanelOutputs];
            sum = 0;
            const int8_t* w = weights + kWordChannels * place_in_block(c, kTilePanels);
            for (int64_t t = 0; t < taps.count * kWordChannels; ++t) {
                sum += pixels[p][channel + taps.offsets[t] + c] * w[t % kWordChannels];
                if (t % kWordChannels == kWordChannels - 1) w += kWordChannels * kTilePanels * kPanelOutputs;
            }
        }
}

}  // namespace

const Tiles kTiles = {dot_tile,       false,       dot_tile, 4,     1,    {12, 12, 12, 12},
                      depthwise_tile, kTilePanels, 4,        false, false};

const Tiles& best_tiles() {
#if defined(__x86_64__)
    switch (simd::level()) {
        case simd::Level::avx512_vnni: return kTilesVnni;
        case simd::Level::avx512: return kTilesAvx512;
        case simd::Level::avx_vnni: return kTilesAvxVnni;
        case simd::Level::avx2: return kTilesAvx2;
        default: break;
    }
#endif
    return kTiles;
}

}  // namespace ptq4cuda
