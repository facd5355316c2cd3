// Winograd's convolution F(2x2, 3x3) in whole numbers: four outputs of a 3x3 kernel with stride 1 of 16 products a
// channel, where 36 are multiplied otherwise.
//
//     Y = A' [(G g G') * (B' d B)] A,   d: a window of 4x4 codes, g: 3x3 weights, Y: 2x2 sums, *: position by
//     position
//
//          1  0 -1  0         2  0  0         1  1  1  0
//     B' = 0  1  1  0     G = 1  1  1    A' = 0  1 -1 -1
//          0 -1  1  0         1 -1  1
//          0  1  0 -1         0  0  2
//
// (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016; their G is half of this one, so that Y is
// four times the sums: a shift by two brings them back, exactly.) Of 8-bit numbers the transformed ones would not
// fit into bytes. Of 4-bit ones they do, and nothing is rounded:
//
//  - Weights of an output are levels on a grid, w = step * level + middle with levels from -8 to 7, and G g G' of
//    levels reaches 72. What the middle adds, middle * Σ codes of the window, is added for each pixel at the end.
//  - Codes up to 63, of 6 bits, become numbers of B' d B that span 252: an offset makes unsigned bytes of them, and
//    its share in the outputs is subtracted.
#pragma once

#include <optional>

#include "conv_tiles.h"

namespace ptq4cuda {

constexpr int kPositions = 16;                 // of a window, row by row
constexpr int64_t kWindowChannels = 16;        // whose windows are transformed together, at least
constexpr int64_t kMostWindowChannels = 2048;  // whose codes add up in 16 bits, 32 of them each
constexpr int kWindowCode = 63;                // the largest code
constexpr int kTileRow = kTilePixels / 2;      // windows side by side whose outputs are finished together

// What each output has beside its weights: fields[f][16] of a panel.
enum WindowField { kStep, kMiddle, kOffsetShare, kWindowFields = kOffsetShare + 4 };

// How the weights of a layer are transformed.
struct WindowWeights {
    std::vector<int8_t> weights;  // [panels][16 positions][words of channels][16][4]
    std::vector<int32_t> fields;  // [panels][kWindowFields][16]
};

// Of weights in panels of a layer that has a shape for it, where the transformed ones fit into bytes, as do codes up
// to `largest`, one for each channel.
std::optional<WindowWeights> window_weights(const ConvShape& shape, const int8_t* panels, const uint8_t* largest);

// Whether a layer's shape is one for it.
inline bool is_windowed(const ConvShape& s) {
    const auto both = [](const Extent& e, int64_t value) { return e.height == value && e.width == value; };
    return s.groups == 1 && both(s.kernel, 3) && both(s.stride, 1) && both(s.dilation, 1) && !s.packed() &&
           s.channels % kWindowChannels == 0 && s.channels <= kMostWindowChannels;
}

// Transforms a window of pixels with `channels` codes each into to[16][stride]. sums: of the codes that each of the
// four outputs is computed of.
void transform_window(const uint8_t* const (&pixels)[kPositions], int64_t channels, int64_t stride, uint8_t* to,
                      int32_t (&sums)[4]);

// Makes of products [16][panels][kTilePixels][16] of windows side by side the sums [2 rows][panels][kTilePixels][16]
// of pixels side by side. `codes`: transform_window's sums.
void transform_products(const int32_t* products, int windows, int64_t panels, const int32_t* fields,
                        const int32_t (*codes)[4], int32_t* sums);

}  // namespace ptq4cuda
