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

Chunks::Chunks(const Taps& taps) {
    const int64_t all = taps.count * taps.words, most = kMatrixBytes / kWordChannels;
    words = static_cast<int>(std::min(all, most));
    bool whole = true;
    for (int64_t done = 0; done < all; done += words) {
        // The last chunk may begin with words of the one before, without their codes.
        const int64_t first = std::min(done, all - words);
        gathered.push_back(count() * kMatrixRows * kMatrixBytes);
        weights.push_back(first * kWordChannels * kPanelOutputs);
        first_piece.push_back(static_cast<int64_t>(pieces.size()));
        for (int64_t word = done, n; word < first + words; word += n) {
            const int64_t in_tap = word % taps.words;
            n = std::min(first + words - word, taps.words - in_tap);
            const int64_t begin = (word - first) * kWordChannels, bytes = n * kWordChannels;
            pieces.push_back({taps.offsets[word / taps.words] + in_tap * kWordChannels - begin,
                              (bytes < kMatrixBytes ? (uint64_t{1} << bytes) - 1 : ~uint64_t{0}) << begin});
            whole = whole && bytes == kMatrixBytes && pieces.back().offset % simd::kLine == 0;
        }
    }
    first_piece.push_back(static_cast<int64_t>(pieces.size()));
    if (whole)
        for (const Piece& piece : pieces) in_place.push_back(piece.offset);
}

const Tiles& best_tiles() {
#if defined(__x86_64__)
    switch (simd::level()) {
        case simd::Level::amx: {
            static const Tiles tiles = [] {
                Tiles t = kTilesVnni;
                t.matrices = &kMatricesAmx;
                return t;
            }();
            return tiles;
        }
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
